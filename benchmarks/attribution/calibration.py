"""Calibration: what is predicted of the target loss for strata at weights 0, 1/2 and 2, against proxies really trained so.

Strata of real pairs with 30 % wrong captions: semantic cluster x decile of the pretrained encoder's CLIP score. A stratum's
weight acts on the loss of the very batches that there were, or on the sampling, with batches of their own, as a run retrains.
Also the reliability of scores: how alike they are from seed to seed.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import wanted
from benchmarks.attribution.attribution_setup import Study
from benchmarks.attribution.scoring import SCORES, agreement, path_of, pearson, target_loss
from benchmarks.bench import Bench, Benchmark
from benchmarks.cache import each_seed
from benchmarks.data.datasets import Dataset
from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import training_batches
from influencespace.core.kmeans import assign, nearest, seed_centroids, unit_rows
from influencespace.core.metrics import interval
from influencespace.core.strata import quantile_of
from influencespace.models.fusion import concatenation
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import Trajectory

BENCHMARK = Benchmark(data="flickr8k", quick_seeds=(0, 1))
TRUTHS = ("loss_weights", "sampling_weights")
WEIGHTS = (0.0, 0.5, 2.0)
QUANTILES, CLUSTERS = 10, 2
WHOLE = 3  # proxies of all pairs for each of a stratum: what every change is measured from
DRAWS = 500
ESTIMATORS = ("ecif, early stopping", "unrolled", "ecif", "grad_dot")
IN_UNITS = ESTIMATORS[:2]
"""Those whose scores are in units of the target loss, so that a slope of one is right."""


def looked_up(by_row: Tensor, rows: IntArray) -> Tensor:
    """Weights of some rows of the pool (B,)."""
    return by_row[torch.from_numpy(rows)]


def strata_of(study: Study) -> IntArray:
    """Stratum of each pair (N,): cluster * QUANTILES + decile of quality within the cluster."""
    u, t = study.pool.inputs
    X = concatenation(u, t)
    C = seed_centroids(X, CLUSTERS, 0)
    for _ in range(20):
        C = unit_rows(assign(X, C).total).to(X.dtype)
    cluster = nearest(X, C)[0].numpy()
    quality = (unit_rows(u) * unit_rows(t)).sum(1).double().numpy()
    stratum = np.empty(study.size, np.int64)
    for k in range(CLUSTERS):
        rows = np.flatnonzero(cluster == k)
        stratum[rows] = k * QUANTILES + quantile_of(quality[rows], QUANTILES)
    return stratum


def whole_losses(study: Study, seed: int) -> dict[str, Any]:
    """Target losses of proxies of all pairs: on the path's own batches, and the mean over batches of their own."""
    problem = study.problem(seed)
    path, ones = path_of(problem), np.ones(study.size)
    again = [sampled(study, path, ones, seed + 1000 * (k + 1)) for k in range(WHOLE)]
    losses = [target_loss(problem, other) for other in (path, *again)]
    return {"loss_weights": losses[0], "sampling_weights": float(np.mean(losses[1:]))}


def sampled(study: Study, path: Trajectory, weights: FloatArray, seed: int) -> Trajectory:
    """The path with batches of its own, drawn by weight."""
    config = study.config
    batches = training_batches(weights, study.pool.image, config.batch_size, config.steps, seed)
    return replace(path, batches=list(batches))


def weighted_losses(study: Study, truth: str, weight: float, seed: int) -> dict[str, Any]:
    """Target loss of a proxy trained again with each stratum in turn at the weight."""
    problem = study.problem(seed)
    path, stratum = path_of(problem), strata_of(study)
    losses = []
    for number in range(CLUSTERS * QUANTILES):
        weights = np.where(stratum == number, weight, 1.0)
        again = sampled(study, path, weights, seed + 7 * number)
        if truth == "loss_weights":
            by_row = torch.from_numpy(weights).to(path.initial)
            again = replace(path, weights=partial(looked_up, by_row))
        losses.append(target_loss(problem, again))
    return {"losses": losses}


def scores_of(study: Study, seed: int) -> dict[str, Any]:
    """Scores of every pair; those in units of the loss as what the target loss would rise without the pair, times N."""
    problem = study.problem(seed)
    scale = dict.fromkeys(ESTIMATORS, 1) | {"unrolled": study.size}
    return {name: (SCORES[name](problem) * scale[name]).tolist() for name in ESTIMATORS}


def predicted_changes(score: FloatArray, stratum: IntArray, weight: float) -> FloatArray:
    """First order of the target loss when a stratum's weight goes from 1 to `weight`, in a loss that is a weighted mean: (S,).

    With share f the stratum's share of the loss moves by (w - 1) f / (1 + (w - 1) f), at the cost of all others alike.
    """
    share = np.bincount(stratum) / len(stratum)
    moved = (weight - 1) * share / (1 + (weight - 1) * share)
    means = np.array([np.nanmean(score[stratum == number]) for number in range(len(share))])
    changes: FloatArray = -moved * (means - np.nanmean(score))
    return changes


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Predicted and real changes of the target loss, (seeds, weights, strata) each."""

    predicted: dict[str, FloatArray]
    real: FloatArray


def study_of(bench: Bench) -> Study:
    config = HeadsConfig(dimension=64, batch_size=128, steps=bench.pick(100, 30))
    return Study(dataset=Dataset.of(bench), pairs=bench.pick(None, 1000), wrong=0.3, config=config).tuned()


def scores_by_seed(bench: Bench, study: Study) -> dict[str, FloatArray]:
    """Of every pair by each estimator (seeds, N)."""
    runs = each_seed(study.dataset.cache, bench.seeds, ["calibration scores", study.key], scores_of, study)
    return {name: np.array([run[name] for run in runs]) for name in ESTIMATORS}


def changes_of(bench: Bench, truth: str) -> Changes:
    study = study_of(bench)
    cache, stratum = study.dataset.cache, strata_of(study)
    whole = each_seed(cache, bench.seeds, ["whole", WHOLE, study.key], whole_losses, study)
    real = []
    for weight in WEIGHTS:
        key = ["weighted", truth, QUANTILES, CLUSTERS, weight, study.key]
        runs = each_seed(cache, bench.seeds, key, weighted_losses, study, truth, weight)
        real.append([np.array(run["losses"]) - before[truth] for run, before in zip(runs, whole)])
    predicted = {
        name: np.array(
            [[predicted_changes(score, stratum, weight) for weight in WEIGHTS] for score in scores]
        )
        for name, scores in scores_by_seed(bench, study).items()
    }
    return Changes(predicted=predicted, real=np.array(real).swapaxes(0, 1))


def crossing(changes: FloatArray) -> float:
    """Where the change by removal turns from a fall to a rise, in deciles of quality, interpolated: (S,) by stratum."""
    by_decile = changes.reshape(CLUSTERS, QUANTILES).mean(0)
    if not (by_decile > 0).any():
        return float(QUANTILES)
    first = int(np.argmax(by_decile > 0))
    if first == 0:
        return 0.0
    below, above = by_decile[first - 1], by_decile[first]
    return float(first - above / (above - below))


def slope(predicted: FloatArray, real: FloatArray) -> float:
    """Of the real change over the predicted one."""
    return float(np.polyfit(predicted.ravel(), real.ravel(), 1)[0])


def calibrated(truth: str, bench: Bench) -> None:
    """Slope, Pearson and zero crossing of ensembles of proxies."""
    changes = changes_of(bench, truth)
    real = changes.real.mean(0)  # (weights, strata)
    strata = real.shape[1]
    draws = [np.random.default_rng(d).integers(0, strata, strata) for d in range(DRAWS)]
    repeats = {"estimator": "(retraining, from seed to seed)", "weight": "all"}
    turn = crossing(real[0])
    bench.row(
        **repeats, slope=None, slope_interval=None, pearson=agreement(changes.real, pearson), crossing=turn
    )
    for name in ESTIMATORS:
        predicted = changes.predicted[name].mean(0)
        apart = crossing(predicted[0])
        for label, at in [
            *((f"{w:g}", slice(i, i + 1)) for i, w in enumerate(WEIGHTS)),
            ("all", slice(None)),
        ]:
            a, b = predicted[at], real[at]
            around = interval(np.array([slope(a[:, drawn], b[:, drawn]) for drawn in draws]))
            bench.row(
                estimator=name,
                weight=label,
                slope=slope(a, b),
                slope_interval=list(around),
                pearson=pearson(a, b),
                crossing=apart if label == "all" else None,
            )
        if name in IN_UNITS:  # of all weights, the last
            what = truth.replace("_", " ")
            bench.target(
                f"{what}, slope of the real change over that by `{name}`",
                wanted.between(0.5, 1.5),
                slope(a, b),
                around,
            )
            name = f"{what}, zero crossing by `{name}` less the real one, in deciles"
            bench.target(name, wanted.one_quantile, apart - turn)


for _truth in TRUTHS:
    BENCHMARK.parts[_truth] = partial(calibrated, _truth)


@BENCHMARK.part
def points(bench: Bench) -> None:
    """Every stratum's predicted and real change, means over seeds: what the figure shows."""
    for truth in TRUTHS:
        changes = changes_of(bench, truth)
        for name in IN_UNITS:
            for weight, predicted, real in zip(
                WEIGHTS, changes.predicted[name].mean(0), changes.real.mean(0)
            ):
                dots = {"predicted": predicted.tolist(), "real": real.tolist()}
                bench.row(truth=truth, estimator=name, weight=weight, **dots)


@BENCHMARK.part
def reliability(bench: Bench) -> None:
    """Rank correlation of scores from seed to seed, of single pairs and of the means of strata."""
    study = study_of(bench)
    stratum = strata_of(study)
    for name, pairs in scores_by_seed(bench, study).items():
        known = np.isfinite(pairs).all(0)
        means = np.array([predicted_changes(score, stratum, 0.0) for score in pairs])
        bench.row(
            estimator=name, single_pairs=agreement(pairs[:, known], rank), strata=agreement(means, rank)
        )


def rank(a: FloatArray, b: FloatArray) -> float:
    return float(spearmanr(a, b).statistic)
