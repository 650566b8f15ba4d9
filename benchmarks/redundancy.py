"""Copies of pairs found and left out, and what goes first where a smaller set is asked for, on real pairs.

Thresholds are judged by planted copies, rules by real retraining. Needs the real data; see docs/benchmarks.md.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from common import Benchmark, cached, code_version
from curation import by_image
from pools import SCENARIOS, DirtyCuration
from world import RUNTIME, Setting, World, measure_on_real_pairs

from influencespace.core import coreset
from influencespace.core.kmeans import unit_rows
from influencespace.core.metrics import bootstrap_means, interval
from influencespace.core.select import SelectionConfig, top_fraction
from influencespace.core.strata import rank_within
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.similarity import random_score
from influencespace.stages.proxies.proxies import TargetHalves, choosing_loss, train_subset
from influencespace.stages.selection.evidence import Scores, decide
from influencespace.stages.selection.redundancy import RedundancyConfig, redundancy

FloatArray = np.ndarray
Rules = Mapping[str, Callable[[], np.ndarray]]  # which pairs each keeps (n,)
# One threshold at a time beside the default of the other.
CONFIGS = [RedundancyConfig(image=value) for value in (0.65, 0.7, 0.75, 0.8, 0.85, 0.9)] + [
    RedundancyConfig(text=value) for value in (0.95, 0.97, 0.98, 1.0)
]
UNIFORM = SelectionConfig(weighting="uniform")


def curation_of(world: World, name: str, quick: bool) -> DirtyCuration:
    scenario = SCENARIOS[name]
    setting = Setting(wrong=scenario.share, captions=scenario.captions, steps=50 if quick else 200)
    return DirtyCuration(world, setting, name)


def leaders_by(curation: DirtyCuration, config: RedundancyConfig) -> np.ndarray:
    """The leader of each pair by another config, on the curation's proxies and clusters."""
    folder = curation.folder / "redundancy" / code_version() / f"{config.image:g}-{config.text:g}"
    proxy, cluster = curation.folder / "proxy", curation.folder / "cluster"
    redundancy(curation.pool, proxy, cluster, {}, config, folder, RUNTIME)
    return read_columns(folder / "copies.parquet")["leader"]


def same_pair(curation: DirtyCuration) -> np.ndarray:
    """A number for each pair that copies share: of its caption, and of the picture that it shows, compressed anew or not (n,)."""
    found = torch.from_numpy(np.asarray(curation.pool.table.images))
    sources = curation.sources
    shown = [
        (found @ torch.from_numpy(np.array(known)).T).max(1)
        for known in (sources.pool.table.images, sources.altered("recompressed")[0])
    ]
    picture = torch.where(shown[0].values >= shown[1].values, shown[0].indices, shown[1].indices).numpy()
    number: np.ndarray = np.unique(
        np.stack([picture[curation.pool.image], curation.pool.text]), axis=1, return_inverse=True
    )[1]
    return number.reshape(-1)


def copies(bench: Benchmark, world: World, quick: bool) -> None:
    """Which planted copies thresholds find, and what they take from a clean pool."""
    planted, clean = (curation_of(world, name, quick) for name in ("duplicates", "clean"))
    for curation in (planted, clean):
        curation.run()

    def measured(config: RedundancyConfig) -> dict[str, Any]:
        pair, leader = same_pair(planted), leaders_by(planted, config)
        found = np.flatnonzero(leader != np.arange(len(leader)))
        right = pair[found] == pair[leader[found]]
        untouched = leaders_by(clean, config) == np.arange(len(clean.pool))
        return {
            "recall": float(right.sum() / (len(pair) - len(np.unique(pair)))),
            "precision": float(right.mean()),
            "pruned_of_clean": float(1 - untouched.mean()),
        }

    for config in CONFIGS:
        result = cached(world.cache, ["copies", config, planted.setting.steps], lambda c=config: measured(c))  # type: ignore[misc]
        bench.row(image=config.image, text=config.text, **result)
        if config == RedundancyConfig():
            for name, least in (("recall", 0.95), ("precision", 0.95)):
                bench.target(
                    name=f"copies by the default thresholds, {name}",
                    target=f"at least {least}",
                    measured=result[name],
                    reached=result[name] >= least,
                )
            bench.target(
                name="share of clean pairs taken for copies",
                target="at most 0.01",
                measured=result["pruned_of_clean"],
                reached=result["pruned_of_clean"] <= 0.01,
            )


@dataclass(frozen=True)
class Retrained:
    """Proxies trained on what rules keep, at equal steps."""

    curation: DirtyCuration

    @cached_property
    def scores(self) -> Scores:
        return self.curation.run()

    @cached_property
    def quality(self) -> dict[str, np.ndarray]:
        return read_columns(self.curation.folder / "proxy" / "quality.parquet")

    @cached_property
    def random(self) -> np.ndarray:
        return random_score([str(uid) for uid in self.curation.pool.column("uid")])

    def measure(self, kept: np.ndarray, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Loss on the choosing half of the target, and recall by test image (seeds, images)."""
        train, given = self.curation.config.train, self.curation
        halves = TargetHalves(given.target, given.config.seed)
        weight = kept.astype(np.float64)
        heads = [train_subset(given.pool, weight, train, train.steps, seed).heads for seed in seeds]
        return {
            "choosing_loss": float(np.mean([choosing_loss(each, halves, train) for each in heads])),
            "shares": [by_image(each, given.test).tolist() for each in heads],
            "kept": float(kept.mean()),
        }

    def table(self, bench: Benchmark, part: list[Any], rules: Rules) -> dict[str, np.ndarray]:
        """Retrain by every rule, write the rows, and return recall by test image."""
        seeds = tuple(bench.seeds)
        found = {
            name: cached(
                self.curation.world.cache,
                [*part, name, self.curation.setting, seeds],
                lambda rule=rule: self.measure(rule(), seeds),  # type: ignore[misc]
            )
            for name, rule in rules.items()
        }
        shares = {name: np.array(result["shares"]) for name, result in found.items()}
        for name, result in found.items():
            gap = bootstrap_means(shares["curated"]) - bootstrap_means(shares[name])
            bench.row(
                method=name,
                kept=result["kept"],
                choosing_loss=result["choosing_loss"],
                mean_recall=float(shares[name].mean()),
                curated_minus_this=float(shares["curated"].mean() - shares[name].mean()),
                paired_interval=list(interval(gap)),
            )
        return shares


def retraining(bench: Benchmark, world: World, quick: bool) -> None:
    """A third of the pool copies: the default decision against the pool without its copies."""
    curation = curation_of(world, "duplicates", quick)
    given, keep = Retrained(curation), int((~curation.wrong).sum())
    shares = given.table(
        bench,
        ["without copies"],
        {
            "curated": lambda: decide(given.scores, UNIFORM).kept,
            "curated, copies kept": lambda: decide(Scores(given.scores.folder), UNIFORM).kept,
            "everything": lambda: np.ones(len(curation.pool), bool),
            "random": lambda: top_fraction(given.random, keep),
            "clip_score": lambda: top_fraction(curation.pool.clip_score, keep),
            "oracle": lambda: ~curation.wrong,
        },
    )
    gap = bootstrap_means(shares["curated"]) - bootstrap_means(shares["oracle"])
    measured = float(shares["curated"].mean() - shares["oracle"].mean())
    bench.target(
        name="mean recall of curated minus the pool without copies",
        target="at least -0.5",
        measured=measured,
        interval=interval(gap),
        reached=measured >= -0.5,
    )


def size(share: float, bench: Benchmark, world: World, quick: bool) -> None:
    """What to drop where nothing is wrong and a share of the pool is asked for."""
    curation = curation_of(world, "clean", quick)
    given, pool = Retrained(curation), curation.pool
    keep = round(share * len(pool))
    shares = given.table(
        bench,
        ["size", share],
        {
            "curated": lambda: (
                decide(given.scores, SelectionConfig(weighting="uniform", target_size=share)).kept
            ),
            "everything": lambda: np.ones(len(pool), bool),
            "random": lambda: top_fraction(given.random, keep),
            "clip_score": lambda: top_fraction(pool.clip_score, keep),
            "proxy_clip_score": lambda: top_fraction(given.quality["clip_in"], keep),
            "quality": lambda: top_fraction(given.scores.strata["quality"], keep),
            "predicted influence": lambda: top_fraction(given.scores.predicted, keep),
            "captions by quality": lambda: top_fraction(captions_first(given), keep),
            "clip_score, captions first": lambda: top_fraction(crowded(pool.clip_score, pool), keep),
            "least alike": lambda: top_fraction(-alike(given), keep),
            "k_center": lambda: by_cluster(given, share, lambda X, rows, m: coreset.k_center(X, m)),
            "herding": lambda: by_cluster(given, share, lambda X, rows, m: coreset.herding(X, m)),
            "d2": lambda: by_cluster(given, share, lambda X, rows, m: coreset.d2(X, worth(given)[rows], m)),
        },
    )
    whole = float(shares["everything"].mean())
    bench.target(
        name=f"mean recall at {share:g} of a clean pool, as a share of everything's",
        target="at least 0.99",
        measured=float(shares["curated"].mean()) / whole,
        reached=float(shares["curated"].mean()) >= 0.99 * whole,
    )
    for name in ("random", "clip_score"):
        gap = interval(bootstrap_means(shares["curated"]) - bootstrap_means(shares[name]))
        bench.target(
            name=f"mean recall at {share:g} of a clean pool, curated minus {name}",
            target="surely above 0",
            measured=float(shares["curated"].mean() - shares[name].mean()),
            interval=gap,
            reached=gap[0] > 0,
        )


def worth(given: Retrained) -> FloatArray:
    """Quality between 0 and 1 (n,)."""
    quality = given.scores.strata["quality"]
    scaled: FloatArray = (quality - quality.min()) / (quality.max() - quality.min())
    return scaled


def captions_first(given: Retrained) -> FloatArray:
    """The best caption of every image before any second one (n,)."""
    return worth(given) - rank_within(given.curation.pool.image, worth(given))


def crowded(score: FloatArray, pool: PairSet) -> FloatArray:
    """A score, each further caption of an image half a standard deviation lower (n,)."""
    lower: FloatArray = score - 0.5 * score.std() * rank_within(pool.image, score)
    return lower


def alike(given: Retrained) -> FloatArray:
    """The lesser of the cosines of image and caption with the most alike pair of higher quality in the cluster (n,)."""
    cluster, quality = (given.scores.strata[name] for name in ("cluster", "quality"))
    out = np.full(len(quality), -1.0)
    for label in np.unique(cluster):
        rows = np.flatnonzero(cluster == label)
        rows = rows[np.argsort(-quality[rows], kind="stable")]
        U, T = given.curation.pool.inputs(rows)
        both = torch.minimum(U @ U.T, T @ T.T).tril(-1)
        both[torch.ones_like(both).triu().bool()] = -1
        out[rows] = both.max(1).values.numpy()
    return out


def by_cluster(
    given: Retrained, share: float, choose: Callable[[torch.Tensor, np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """The same share of every cluster, by image and caption together: which pairs are kept (n,)."""
    cluster = given.scores.strata["cluster"]
    kept = np.zeros(len(cluster), bool)
    for label in np.unique(cluster):
        rows = np.flatnonzero(cluster == label)
        X = unit_rows(torch.cat(given.curation.pool.inputs(rows), 1))
        kept[rows[choose(X, rows, max(1, round(share * len(rows))))]] = True
    return kept


PARTS = {
    "copies": copies,
    "retraining": retraining,
    **{
        f"size_{share:.0%}".rstrip("%"): lambda *given, share=share: size(share, *given)
        for share in (0.7, 0.5)
    },
}

if __name__ == "__main__":
    sys.exit(measure_on_real_pairs(__doc__ or "", "redundancy", ((0,), (0, 1, 2)), PARTS))
