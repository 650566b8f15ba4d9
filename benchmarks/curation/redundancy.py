"""Copies of pairs found and left out, and what is removed first where a smaller set is asked for, on real pairs.

Thresholds are judged by planted copies, rules by real retraining.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.curation.curation import Changes
from benchmarks.curation.retrain_eval import Retrained
from benchmarks.curation.scenario_curation import ScenarioCuration, scenario_setting
from benchmarks.data.datasets import Dataset
from benchmarks.data.distinct import Distinct
from benchmarks.methods.alike import within_clusters
from influencespace.core import coreset
from influencespace.core.arrays import BoolArray, FloatArray, IntArray
from influencespace.core.kmeans import unit_rows
from influencespace.core.select import top_fraction
from influencespace.core.strata import rank_within
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.stages.selection.redundancy import RedundancyConfig

BENCHMARK = Benchmark(data="flickr8k")
IMAGE, TEXT = (0.65, 0.7, 0.75, 0.8, 0.85, 0.9), (0.95, 0.97, 0.98, 1.0)
THRESHOLDS: list[Changes] = [
    *({"redundancy.image": value} for value in IMAGE),
    *({"redundancy.text": value} for value in TEXT),
]
"""One at a time beside the default of the other."""


def curation_of(bench: Bench, name: str) -> ScenarioCuration:
    return ScenarioCuration(Dataset.of(bench), scenario_setting(bench, name))


def leaders(curation: ScenarioCuration, changes: Changes) -> IntArray:
    """The pair that each pair is a copy of, by other thresholds on the curation's proxies and clusters (n,)."""
    run = curation.variant(changes).until("redundancy")
    return read_columns(run.at("redundancy") / "copies.parquet")["leader"]


def same_pair(curation: ScenarioCuration) -> IntArray:
    """A number for each pair that copies share: of its caption, and of the picture that it shows, compressed anew or not (n,)."""
    pool, sources = Distinct(curation.pool), curation.sources
    result = torch.from_numpy(pool.images)
    shown = [
        (result @ torch.from_numpy(np.array(known)).T).max(1)
        for known in (sources.pool.images, sources.altered("recompressed")[0])
    ]
    picture = torch.where(shown[0].values >= shown[1].values, shown[0].indices, shown[1].indices).numpy()
    both = np.stack([picture[pool.image], pool.text])
    number: IntArray = np.unique(both, axis=1, return_inverse=True)[1]
    return number.reshape(-1)


def found_copies(planted: ScenarioCuration, clean: ScenarioCuration, changes: Changes) -> dict[str, Any]:
    """Which planted copies thresholds find, and what they take from a clean pool."""
    pair, leader = same_pair(planted), leaders(planted, changes)
    result = np.flatnonzero(leader != np.arange(len(leader)))
    right = pair[result] == pair[leader[result]]
    untouched = leaders(clean, changes) == np.arange(len(clean.pool))
    return {
        "recall": float(right.sum() / (len(pair) - len(np.unique(pair)))),
        "precision": float(right.mean()),
        "pruned_of_clean": float(1 - untouched.mean()),
    }


@BENCHMARK.part
def copies(bench: Bench) -> None:
    """Which planted copies thresholds find, and what they take from a clean pool."""
    planted, clean = (curation_of(bench, name) for name in ("duplicates", "clean"))
    for changes in THRESHOLDS:
        result = planted.cached(["copies", changes], partial(found_copies, planted, clean, changes))
        config = planted.variant(changes).config.redundancy
        bench.row(image=config.image, text=config.text, **result)
        if config == RedundancyConfig():
            for name in ("recall", "precision"):
                bench.target(f"copies by the default thresholds, {name}", wanted.at_least(0.95), result[name])
            bench.target(
                "share of clean pairs taken for copies", wanted.at_most(0.01), result["pruned_of_clean"]
            )


def by_rule(
    bench: Bench, curation: ScenarioCuration, rules: Mapping[str, Callable[[], BoolArray | FloatArray]]
) -> Retrained:
    """Retrain on what every rule keeps, at equal steps, and write the rows."""
    runs = {}
    for name, rule in rules.items():
        weight = rule().astype(np.float64)
        runs[name] = weight, [curation.retrained(weight, seed) for seed in bench.seeds]
    result = Retrained(
        shares={name: np.array([run["shares"] for run in each]) for name, (_, each) in runs.items()},
        kept={name: float(weight.mean()) for name, (weight, _) in runs.items()},
    )
    for name, (_, each) in runs.items():
        loss = float(np.mean([run["choosing_loss"] for run in each]))
        bench.row(**result.row(name), choosing_loss=loss)
    return result


@BENCHMARK.part
def retraining(bench: Bench) -> None:
    """A third of the pool copies: the default decision against the pool without its copies."""
    curation = curation_of(bench, "duplicates")
    filters = curation.filters(int((~curation.wrong).sum()))
    rules: dict[str, Callable[[], BoolArray | FloatArray]] = {
        "curated": lambda: curation.decide().kept,
        "curated, copies kept": lambda: curation.variant({"redundancy.find": False}).decide().kept,
        "everything": lambda: np.ones(len(curation.pool), bool),
        "random": lambda: filters["random"],
        "clip_score": lambda: filters["clip_score"],
        "oracle": lambda: ~curation.wrong,
    }
    result = by_rule(bench, curation, rules)
    name = "mean recall of curated minus the pool without copies"
    bench.target(name, wanted.at_least(-0.5), *result.compared("oracle"))


def size(share: float, bench: Bench) -> None:
    """What to drop where nothing is wrong and a share of the pool is asked for."""
    curation = curation_of(bench, "clean")
    pool, keep = curation.pool, round(share * len(curation.pool))
    filters, strata = curation.filters(keep), curation.strata
    quality, cluster = strata["quality"], strata["cluster"]
    worth = (quality - quality.min()) / (quality.max() - quality.min())
    X = unit_rows(torch.cat(pool.inputs(slice(None)), 1))
    # each further caption of an image half a standard deviation lower
    crowded = pool.clip_score - 0.5 * pool.clip_score.std() * rank_within(pool.image, pool.clip_score)

    def by_score(score: FloatArray) -> Callable[[], BoolArray]:
        return lambda: top_fraction(score, keep)

    def by_cluster(choose: Callable[[IntArray, int], IntArray]) -> Callable[[], BoolArray]:
        return lambda: within_clusters(choose, cluster, share)

    rules: dict[str, Callable[[], BoolArray | FloatArray]] = {
        "curated": lambda: curation.decide(target_size=share).kept,
        "everything": lambda: np.ones(len(pool), bool),
        **{name: partial(filters.__getitem__, name) for name in ("random", "clip_score", "neg_clip_loss")},
        "quality": by_score(quality),
        "predicted influence": by_score(curation.evidence.carried_over(strata)["predicted"]),
        # the best caption of every image before any second one
        "captions by quality": by_score(worth - rank_within(pool.image, worth)),
        "clip_score, captions first": by_score(crowded),
        "least alike": lambda: top_fraction(-alike(pool, cluster, quality), keep),
        "k_center": by_cluster(lambda rows, m: coreset.k_center(X[rows], m)),
        "herding": by_cluster(lambda rows, m: coreset.herding(X[rows], m)),
        "d2": by_cluster(lambda rows, m: coreset.d2(X[rows], worth[rows], m)),
    }
    result = by_rule(bench, curation, rules)
    ratio = result.mean("curated") / result.mean("everything")
    bench.target(
        f"mean recall at {share:g} of a clean pool, as a share of everything's", wanted.at_least(0.99), ratio
    )
    for name in ("random", "clip_score"):
        what = f"mean recall at {share:g} of a clean pool, curated minus {name}"
        bench.target(what, wanted.significantly_above(0), *result.compared(name))


for _share in (0.7, 0.5):
    BENCHMARK.parts[f"size_{100 * _share:.0f}"] = partial(size, _share)


def alike(pool: PairSet, cluster: IntArray, quality: FloatArray) -> FloatArray:
    """The lesser of the cosines of image and caption with the most alike pair of higher quality in the cluster (n,)."""
    out = np.full(len(quality), -1.0)
    for label in np.unique(cluster):
        rows = np.flatnonzero(cluster == label)
        rows = rows[np.argsort(-quality[rows], kind="stable")]
        U, T = pool.inputs(rows)
        both = torch.minimum(U @ U.T, T @ T.T).tril(-1)
        both[torch.ones_like(both).triu().bool()] = -1
        out[rows] = both.max(1).values.numpy()
    return out
