"""What each setting of the curation is worth: one changed at a time, on real pairs of which 30 % are wrong.

Judged by the planted truth: how well the score separates wrong from right (AUROC), what the rule prunes and how much of that
is wrong.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.bench import Bench, Benchmark
from benchmarks.curation.curation import Changes, Curation
from benchmarks.curation.quality import wrong
from benchmarks.curation.retrain_eval import Retrained, recall_by_image
from benchmarks.data.datasets import Dataset
from influencespace.core.arrays import FloatArray
from influencespace.models.training import Alone
from influencespace.stages.proxies.train_many import Given, train
from influencespace.stages.training.dynamic import DynamicTrainer

BENCHMARK = Benchmark(data="flickr8k")
STEPS = 100
DYNAMIC = (25, 50, 100)  # steps between two re-weightings


@dataclass(frozen=True)
class Varied(Curation):
    """The stages up to the decision with some settings changed."""

    def compared(self) -> dict[str, Any]:
        """AUROC of single influences, of their means by stratum, of the smooth curve along quality, and of all axes."""
        evidence, pooled = self.evidence, self.evidence.pooled
        cluster, quantile = self.strata["cluster"], self.strata["quantile"]
        pruned = ~self.decide().kept
        return {
            "single_pairs": self.auroc(-self.single),
            "strata": self.auroc(-pooled.mean[cluster, quantile]),
            "quality_alone": self.auroc(-pooled.parent.mean[quantile]),
            "all_axes": self.auroc(-evidence.carried_over(self.strata)["score"]),
            "pruned": float(pruned.mean()),
            "precision": float(self.wrong[pruned].mean()) if pruned.any() else None,
        }

    def opinions(self) -> dict[str, Any]:
        """AUROC of each opinion on whether a pair matches."""
        axes = ("pretrained", "in_sample", "out_of_fold", "quality")
        return {name: self.auroc(-self.strata[name]) for name in axes}


def default(bench: Bench) -> Varied:
    return Varied(Dataset.of(bench), wrong(0.3, captions=2, steps=STEPS))


def one_by_one(name: str, values: Mapping[str, Changes], bench: Bench) -> None:
    """One row for each value of a setting."""
    base = default(bench)
    for value in bench.pick(list(values), list(values)[:2]):
        changes = dict(values[value])
        images, steps = changes.pop("images", None), changes.pop("steps", STEPS)
        curation = base.variant(changes) if changes else base
        scenario = replace(base.scenario, target_images=images)
        varied = replace(curation, setting=replace(base.setting, scenario=scenario, steps=steps))
        bench.row(setting=name, value=value, **varied.cached("ablation", varied.compared))


def of(option: str, *values: Any) -> dict[str, Changes]:
    return {f"{value:g}" if isinstance(value, float) else str(value): {option: value} for value in values}


SETTINGS: dict[str, Mapping[str, Changes]] = {
    "clusters": of("cluster.k", 1, 4, 16, 64),
    "sketch_rank": {str(rank): {"curvature.rank": rank, "curvature.max_rank": rank} for rank in (4, 32, 128)},
    # the sketch speeds the solve up, and decides nothing: a small one, since little damping would ask for a large one
    "damping": {
        value: {**changes, "curvature.max_rank": 64}
        for value, changes in of("curvature.damping_factor", 1.0, 10.0, 100.0, 1000.0).items()
    },
    "negative_batches": of("proxy.negative_batches", 2, 4, 8),
    "proxies_age": of("steps", 50, 100, 200, 400),
    "target_images": {**of("images", 25, 50, 100, 250), "all": {}},
    "fusion": of("cluster.fusion.name", "concatenation", "weighted_sum", "product", "attention_pooling"),
}
for _name, _values in SETTINGS.items():
    BENCHMARK.parts[_name] = partial(one_by_one, _name, _values)


@BENCHMARK.part
def opinions(bench: Bench) -> None:
    """Whose opinion of a match separates wrong from right: the pretrained encoder's, or the proxies'."""
    curation = default(bench)
    for name, value in curation.cached("opinions", curation.opinions).items():
        bench.row(opinion=name, auroc=value)


def rows(bench: Bench, result: Retrained, than: str, cells: Mapping[str, Mapping[str, Any]]) -> None:
    """Each method's mean recall beside that of one of them."""
    for method in result.shares:
        gap, around = result.compared(than, method)
        gaps = {f"minus_{than}": gap, "paired_interval": list(around)}
        bench.row(**cells[method], mean_recall=result.mean(method), **gaps)


@BENCHMARK.part
def weight_cap(bench: Bench) -> None:
    """Mean recall of proxies trained by influence weights of different caps, at half a standard deviation's temperature."""
    curation = default(bench)
    weights = {"uniform": curation.decide().weight}
    for cap in (1.5, 3.0, 5.0, 20.0):
        weights[f"{cap:g}"] = curation.decide(weighting="influence", temperature=0.5, max_weight=cap).weight
    recalls = curation.recalls(weights, bench.seeds)["shares"]
    result = Retrained(shares={name: np.array(shares) for name, shares in recalls.items()})
    rows(bench, result, "uniform", {name: {"cap": name} for name in weights})


def dynamically(curation: Curation, method: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Recall by test image, (seeds, images), of `curated`, `everything`, or so many steps between two re-weightings."""
    pool, trainer = curation.pool, DynamicTrainer.of(curation.run)
    weight = np.ones(len(pool)) if method == "everything" else curation.decide().weight
    config = curation.config.proxy.train
    began, shares = time.process_time(), []
    for seed in seeds:
        if method.isdecimal():
            trained = replace(trainer, refresh=int(method))(pool, Given(weight), config, seed, Alone(), "cpu")
        else:
            trained = train(pool, Given(weight), config, seed)
        u, t = (side.detach() for side in trained.heads(*curation.test.inputs(slice(None))))
        shares.append(recall_by_image(u, t, curation.test.image).tolist())
    seconds = (time.process_time() - began) / len(seeds)
    reweighting = trainer.reweighting
    chosen = {"weights": reweighting.decided.weighting, "temperature": reweighting.rule.temperature}
    return {"shares": shares, "cpu_seconds": seconds, "kept": float((weight > 0).mean()), **chosen}


@BENCHMARK.part
def dynamic(bench: Bench) -> None:
    """Mean recall with the sampler re-weighted every so many of 200 steps, on a pool with wrong captions and on a clean one."""
    for share in bench.pick((0.3, 0.0), (0.3,)):
        setting = wrong(share, bench.pick(5, 2), bench.pick(200, STEPS))
        curation = Curation(Dataset.of(bench), setting, {"selection.weighting": "auto"})
        cells: dict[str, dict[str, Any]] = {}
        shares: dict[str, FloatArray] = {}
        for method in ("curated", "everything", *map(str, DYNAMIC)):
            make = partial(dynamically, curation, method, bench.seeds)
            result = curation.cached(["dynamic", method, bench.seeds], make)
            shares[method] = np.array(result.pop("shares"))
            label = f"dynamic, every {method} steps" if method.isdecimal() else method
            cells[method] = {"wrong": share, "method": label, **result}
        rows(bench, Retrained(shares=shares), "curated", cells)
