"""What each setting of the curation is worth: one changed at a time, on real pairs of which 30 % are wrong.

Judged by the planted truth: how well the score tells wrong from right (AUROC), what the rule prunes and how much of that
is wrong. Needs the real data; see docs/benchmarks.md.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from common import DECIDING, SCORING, Benchmark, cached, code_version
from curation import Curation, by_image
from world import Setting, World, measure_on_real_pairs

from influencespace.core.metrics import auroc, bootstrap_means, interval
from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import fingerprint
from influencespace.data.pair_set import PairSet
from influencespace.estimators.influence import CurvatureConfig
from influencespace.models.fusion import FusionConfig
from influencespace.stages.proxies.proxies import ALL, Proxy, ProxyConfig, train_subset
from influencespace.stages.scoring.cluster import ClusterConfig
from influencespace.stages.scoring.influence import InfluenceConfig
from influencespace.stages.selection.evidence import decide
from influencespace.stages.training.dynamic import Reweighting, train_dynamically

Changes = Mapping[str, Any]
STEPS = 100


@dataclass(frozen=True)
class Varied(Curation):
    """The stages up to the decision with some settings changed; nothing changed is the default."""

    changes: Changes = field(default_factory=dict)
    """By the name of a stage: fields of its config; `target` is a number of images."""

    def changed(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = self.changes.get(stage, {})
        return found

    @property
    def config(self) -> ProxyConfig:
        return replace(super().config, **self.changed("proxy"))

    @property
    def clusters(self) -> ClusterConfig:
        return ClusterConfig(**self.changed("cluster"))

    @property
    def curvature(self) -> CurvatureConfig:
        return CurvatureConfig(**self.changed("curvature"))

    @property
    def attribution(self) -> InfluenceConfig:
        return InfluenceConfig(**self.changed("attribute"))

    @property
    def choice(self) -> SelectionConfig:
        return SelectionConfig(**self.changed("curate"))

    @property
    def folder(self) -> Path:
        mark = fingerprint([self.setting, {**self.changes, "curate": None}, code_version(SCORING)])
        return self.world.cache / "curations" / mark

    @cached_property
    def target(self) -> PairSet:
        whole = self.world.dev(self.setting.target)
        if "target" not in self.changes:
            return whole
        images = np.random.default_rng(0).permutation(np.unique(whole.image))[: self.changes["target"]]
        path = self.folder / "target.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, whole.rows[np.isin(whole.image, images)])
        return PairSet(whole.folder, path)

    def compared(self) -> dict[str, Any]:
        """AUROC of single influences, of their means by stratum, of the smooth curve along quality, and of all axes."""
        scores = self.run()
        strata, wrong = scores.strata, self.wrong
        single = np.full(len(wrong), np.nan)
        single[scores.influence["pair"]] = scores.influence["influence"]
        known = np.isfinite(single)
        leaf = scores.pooled.mean[strata["cluster"], strata["quantile"]]
        curve = scores.pooled.parent.mean[strata["quantile"]]
        pruned = ~decide(scores, self.choice).kept
        return {
            "single_pairs": auroc(-single[known], wrong[known]),
            "strata": auroc(-leaf, wrong),
            "quality_alone": auroc(-curve, wrong),
            "all_axes": auroc(-scores.pair_scores[0], wrong),
            "pruned": float(pruned.mean()),
            "precision": float(wrong[pruned].mean()) if pruned.any() else None,
        }

    def axes(self) -> dict[str, float]:
        """AUROC of each opinion on whether a pair matches."""
        strata = self.run().strata
        return {name: auroc(-strata[name], self.wrong) for name in ("given", "seen", "held_out", "quality")}

    def weighted(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Recall by test image of proxies trained by the weights that are decided: (seeds, images)."""
        weight = decide(self.run(), self.choice).weight
        train = self.config.train
        return {
            "shares": [
                by_image(train_subset(self.pool, weight, train, train.steps, seed).heads, self.test).tolist()
                for seed in seeds
            ]
        }


def one_by_one(name: str, values: Mapping[str, Changes], bench: Benchmark, world: World, quick: bool) -> None:
    """One row for each value of a setting."""
    for value in list(values)[:2] if quick else values:
        curation = Varied(world, setting_of(values[value]), values[value])
        found = cached(world.cache, ["ablation", curation.setting, values[value]], curation.compared)
        bench.row(setting=name, value=value, **found)


def setting_of(changes: Changes) -> Setting:
    return Setting(wrong=0.3, captions=2, steps=changes.get("steps", STEPS))


def opinions(bench: Benchmark, world: World, quick: bool) -> None:
    """Whose opinion of a match tells wrong from right: the frozen encoder's, or the proxies'."""
    curation = Varied(world, setting_of({}))
    found = cached(world.cache, ["opinions", curation.setting], curation.axes)
    for name, value in found.items():
        bench.row(opinion=name, auroc=value)


def weight_cap(bench: Benchmark, world: World, quick: bool) -> None:
    """Mean recall of proxies trained by influence weights of different caps, at half a standard deviation's temperature."""
    seeds = tuple(bench.seeds)
    rules: dict[str, Changes] = {"uniform": {"weights": "uniform"}}
    for cap in (1.5, 3.0, 5.0, 20.0):
        rules[f"{cap:g}"] = {"weights": "influence", "temperature": 0.5, "max_weight": cap}
    shares = {}
    for name, rule in rules.items():
        curation = Varied(world, setting_of({}), {"curate": rule})
        found = cached(world.cache, ["cap", name, seeds], partial(curation.weighted, seeds))
        shares[name] = np.array(found["shares"])
    for name, values in shares.items():
        difference = bootstrap_means(values) - bootstrap_means(shares["uniform"])
        bench.row(
            cap=name,
            mean_recall=float(values.mean()),
            minus_uniform=float(values.mean() - shares["uniform"].mean()),
            paired_interval=list(interval(difference)),
        )


@dataclass(frozen=True)
class Dynamic(Curation):
    """Proxies whose sampler is re-weighted while they train, beside those whose sampler is not."""

    def retrained_by(self, method: str, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Recall by test image, (seeds, images), of `curated`, `everything`, or so many steps between two re-weightings."""
        scores, steps = self.run(), self.setting.steps
        decided = self.confirmed(scores)
        weight = decide(scores, decided).weight if method != "everything" else np.ones(len(self.pool))
        reweighting = Reweighting(
            pool=self.pool,
            target=self.target,
            proxies=self.config,
            proxy=Proxy(self.folder / "proxy", ALL),
            scores=scores,
            decided=decided,
        )
        began, shares = time.process_time(), []
        for seed in seeds:
            if method.isdecimal():
                trained = train_dynamically(self.pool, weight, reweighting, int(method), steps, seed)
            else:
                trained = train_subset(self.pool, weight, self.config.train, steps, seed)
            shares.append(by_image(trained.heads, self.test).tolist())
        seconds = (time.process_time() - began) / len(seeds)
        chosen = {"weights": decided.weights, "temperature": reweighting.rule.temperature}
        return {"shares": shares, "cpu_seconds": seconds, "kept": float((weight > 0).mean()), **chosen}


def dynamic(bench: Benchmark, world: World, quick: bool) -> None:
    """Mean recall with the sampler re-weighted every so many of 200 steps, on a pool with wrong captions and on a clean one."""
    seeds = tuple(bench.seeds)
    code = (*DECIDING, "estimators/momentary.py", "stages/dynamic.py")
    for wrong in (0.3,) if quick else (0.3, 0.0):
        curation = Dynamic(
            world, Setting(wrong=wrong, captions=2 if quick else 5, steps=STEPS if quick else 200)
        )
        found = {
            method: cached(
                world.cache,
                ["reweighted", curation.setting, method, seeds],
                partial(curation.retrained_by, method, seeds),
                code,
            )
            for method in ("curated", "everything", "25", "50", "100")
        }
        shares = {method: np.array(result.pop("shares")) for method, result in found.items()}
        for method, values in shares.items():
            difference = bootstrap_means(values) - bootstrap_means(shares["curated"])
            bench.row(
                wrong=wrong,
                method=f"dynamic, every {method} steps" if method.isdecimal() else method,
                mean_recall=float(values.mean()),
                minus_curated=float(values.mean() - shares["curated"].mean()),
                paired_interval=list(interval(difference)),
                **found[method],
            )


def stage(name: str, option: str, *values: Any) -> dict[str, Changes]:
    return {str(value): {name: {option: value}} for value in values}


TARGETS: dict[str, Changes] = {str(images): {"target": images} for images in (25, 50, 100, 250)}
SETTINGS: dict[str, dict[str, Changes]] = {
    "clusters": stage("cluster", "k", 1, 4, 16, 64),
    "sketch_rank": {str(rank): {"curvature": {"rank": rank, "max_rank": rank}} for rank in (4, 32, 128)},
    # the sketch speeds the solve up, and decides nothing: a small one, since little damping would ask for a large one
    "damping": {
        f"{factor:g}": {"curvature": {"damping_factor": factor, "max_rank": 64}}
        for factor in (1.0, 10.0, 100.0, 1000.0)
    },
    "bank": stage("proxy", "contexts", 2, 4, 8),
    "proxies_age": {str(steps): {"steps": steps} for steps in (50, 100, 200, 400)},
    "target_images": {**TARGETS, "all": {}},
    "fusion": {
        how: {"cluster": {"fusion": FusionConfig(name=how)}}
        for how in ("concatenation", "weighted_sum", "product", "attention_pooling")
    },
}
PARTS: dict[str, Callable[[Benchmark, World, bool], None]] = {
    **{name: partial(one_by_one, name, values) for name, values in SETTINGS.items()},
    "opinions": opinions,
    "weight_cap": weight_cap,
    "dynamic": dynamic,
}


if __name__ == "__main__":
    sys.exit(measure_on_real_pairs(__doc__ or "", "ablations", ((0,), (0, 1, 2)), PARTS))
