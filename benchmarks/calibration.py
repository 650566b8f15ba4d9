"""Calibration: what is predicted of the target loss for strata at weights 0, 1/2 and 2, against proxies really trained so.

Strata of real pairs with 30 % wrong captions: semantic cluster x decile of the given encoder's CLIP score. A stratum's weight
acts on the loss of the very batches that there were, or on the sampling, with batches of their own, as a run retrains.
Also the reliability of scores: how alike they are from seed to seed. Needs the real data; see docs/benchmarks.md.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from common import ESTIMATING, TRAINING, Benchmark, cached
from scipy.stats import spearmanr
from study import FloatArray, Study, losses_on, table, tuned
from torch import Tensor
from torch.func import functional_call, grad
from world import World, measure_on_real_pairs

from influencespace.core.batches import training_batches
from influencespace.core.kmeans import assign, nearest, seed_centroids, unit_rows
from influencespace.core.metrics import interval
from influencespace.core.strata import quantile_of
from influencespace.estimators.problem import IntArray
from influencespace.models.fusion import concatenation
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import State, Trajectory, space_at

TRUTHS = ("loss_weights", "sampling_weights")
WEIGHTS = (0.0, 0.5, 2.0)
QUANTILES, CLUSTERS = 10, 2
WHOLE = 3  # proxies of all pairs for each of a stratum: what every change is measured from
ESTIMATORS = ("ecif, early stopping", "unrolled", "ecif", "grad_dot")
IN_UNITS = ESTIMATORS[:2]
"""Those whose scores are in units of the target loss, so that a slope of one is right."""


@dataclass(frozen=True, kw_only=True)
class WeightedTrajectory(Trajectory):
    """A path whose batch losses weigh each pair, as an anchor and as a negative: 1 is the path as it was."""

    weights: Tensor  # (N,)

    def gradient(self, state: State, index: int) -> Tensor:
        rows = self.batches[index]
        inputs, w = self.inputs(rows), self.weights[torch.from_numpy(rows)]

        def loss(theta: Tensor) -> Tensor:
            u, t = functional_call(self.space.proxy, self.space.unflatten(theta), inputs)
            return self.objective.weighted_loss(u, t, w)

        gradient: Tensor = grad(loss)(state.theta)
        return gradient


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
    path = problem.trajectory
    assert path is not None
    ones = np.ones(study.size)
    again = [sampled(study, path, ones, seed + 1000 * (k + 1)) for k in range(WHOLE)]
    losses = [float(losses_on(problem, space_at(path.space, other.final)).mean()) for other in (path, *again)]
    return {"loss_weights": losses[0], "sampling_weights": float(np.mean(losses[1:]))}


def sampled(study: Study, path: Trajectory, weights: FloatArray, seed: int) -> Trajectory:
    """The path with batches of its own, drawn by weight."""
    config = study.config
    batches = training_batches(weights, study.pool.image, config.batch_size, config.steps, seed)
    return replace(path, batches=list(batches))


def weighted_losses(study: Study, truth: str, weight: float, seed: int) -> dict[str, Any]:
    """Target loss of a proxy trained again with each stratum in turn at the weight."""
    problem = study.problem(seed)
    path = problem.trajectory
    assert path is not None
    stratum = strata_of(study)
    losses = []
    for number in range(CLUSTERS * QUANTILES):
        weights = np.where(stratum == number, weight, 1.0)
        if truth == "loss_weights":
            again: Trajectory = WeightedTrajectory(
                space=path.space,
                initial=path.initial,
                config=path.config,
                batches=path.batches,
                inputs=path.inputs,
                objective=path.objective,
                rule=path.rule,
                weights=torch.from_numpy(weights).to(path.initial),
            )
        else:
            again = sampled(study, path, weights, seed + 7 * number)
        losses.append(float(losses_on(problem, space_at(path.space, again.final)).mean()))
    return {"losses": losses}


def scores_of(study: Study, seed: int) -> dict[str, Any]:
    """Scores of every pair; those in units of the loss as what the target loss would rise without the pair, times N."""
    problem = study.problem(seed)
    found = {name: table()[name](problem) for name in ESTIMATORS}
    return {
        name: (score * (study.size if name == "unrolled" else 1)).tolist() for name, score in found.items()
    }


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
class Timing:
    """Predicted and real changes of the target loss, (seeds, weights, strata) each."""

    predicted: dict[str, FloatArray]
    real: FloatArray


def measured(bench: Benchmark, world: World, truth: str, quick: bool) -> Timing:
    study = study_of(world, quick)
    stratum = strata_of(study)
    real: list[FloatArray] = []
    predicted: dict[str, list[list[FloatArray]]] = {name: [] for name in ESTIMATORS}
    for seed in bench.seeds:
        key = [study.key, seed]
        whole = cached(world.cache, ["whole", WHOLE, *key], partial(whole_losses, study, seed), TRAINING)
        changes = [
            cached(
                world.cache,
                ["weighted", truth, QUANTILES, CLUSTERS, weight, *key],
                partial(weighted_losses, study, truth, weight, seed),
                TRAINING,
            )["losses"]
            for weight in WEIGHTS
        ]
        real.append(np.array(changes) - whole[truth])
        scores = found_scores(world, study, seed)
        for name in ESTIMATORS:
            predicted[name].append([predicted_changes(scores[name], stratum, weight) for weight in WEIGHTS])
    return Timing(predicted={k: np.array(v) for k, v in predicted.items()}, real=np.array(real))


def found_scores(world: World, study: Study, seed: int) -> dict[str, FloatArray]:
    found = cached(
        world.cache, ["calibration scores", study.key, seed], partial(scores_of, study, seed), ESTIMATING
    )
    return {name: np.array(found[name]) for name in ESTIMATORS}


def study_of(world: World, quick: bool) -> Study:
    config = HeadsConfig(dimension=64, batch_size=128, steps=30 if quick else 100)
    return tuned(Study(world=world, pairs=1000 if quick else None, wrong=0.3, config=config))


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


def line(predicted: FloatArray, real: FloatArray) -> tuple[float, float]:
    """Slope of the real change over the predicted one, and their Pearson correlation."""
    return float(np.polyfit(predicted, real, 1)[0]), float(np.corrcoef(predicted, real)[0, 1])


def calibration_part(truth: str, bench: Benchmark, world: World, quick: bool) -> None:
    """Slope, Pearson and zero crossing of ensembles of proxies."""
    found = measured(bench, world, truth, quick)
    real = found.real.mean(0)  # (weights, strata)
    strata = real.shape[1]
    draws = [np.random.default_rng(d).integers(0, strata, strata) for d in range(500)]
    repeats = [
        float(np.corrcoef(found.real[i].ravel(), found.real[j].ravel())[0, 1])
        for i in range(len(found.real))
        for j in range(i)
    ]
    bench.row(
        estimator="(retraining, from seed to seed)",
        weight="all",
        slope=None,
        slope_interval=None,
        pearson=float(np.mean(repeats)) if repeats else None,
        crossing=crossing(real[0]),
    )
    for name in ESTIMATORS:
        predicted = found.predicted[name].mean(0)
        chosen: list[tuple[str, slice]] = [(f"{w:g}", slice(i, i + 1)) for i, w in enumerate(WEIGHTS)]
        for label, at in [*chosen, ("all", slice(None))]:
            slope, pearson = line(predicted[at].ravel(), real[at].ravel())
            slopes = np.array([line(predicted[at][:, d].ravel(), real[at][:, d].ravel())[0] for d in draws])
            bench.row(
                estimator=name,
                weight=label,
                slope=slope,
                slope_interval=list(interval(slopes)),
                pearson=pearson,
                crossing=crossing(predicted[0]) if label == "all" else None,
            )
        if name in IN_UNITS:
            targets(bench, name, truth, slope, interval(slopes), crossing(predicted[0]) - crossing(real[0]))


def points_part(bench: Benchmark, world: World, quick: bool) -> None:
    """Every stratum's predicted and real change, means over seeds: what the picture shows."""
    for truth in TRUTHS:
        found = measured(bench, world, truth, quick)
        for name in IN_UNITS:
            for weight, predicted, real in zip(WEIGHTS, found.predicted[name].mean(0), found.real.mean(0)):
                points = {"predicted": predicted.tolist(), "real": real.tolist()}
                bench.row(truth=truth, estimator=name, weight=weight, **points)


def targets(
    bench: Benchmark, name: str, truth: str, slope: float, around: tuple[float, float], apart: float
) -> None:
    bench.target(
        name=f"{truth.replace('_', ' ')}, slope of the real change over that by `{name}`",
        target="0.5 to 1.5",
        measured=slope,
        interval=around,
        reached=0.5 <= slope <= 1.5,
    )
    bench.target(
        name=f"{truth.replace('_', ' ')}, zero crossing by `{name}` less the real one, in deciles",
        target="within one quantile",
        measured=apart,
        reached=abs(apart) <= 1,
    )


def reliability_part(bench: Benchmark, world: World, quick: bool) -> None:
    """Rank correlation of scores from seed to seed, of single pairs and of the means of strata."""
    study = study_of(world, quick)
    stratum = strata_of(study)
    runs = [found_scores(world, study, seed) for seed in bench.seeds]
    for name in ESTIMATORS:
        pairs = np.array([run[name] for run in runs])
        means = np.array([predicted_changes(score, stratum, 0.0) for score in pairs])
        bench.row(estimator=name, single_pairs=from_seed_to_seed(pairs), strata=from_seed_to_seed(means))


def from_seed_to_seed(repeats: FloatArray) -> float:
    """Mean rank correlation between two repeats (R, n)."""
    known = np.isfinite(repeats).all(0)
    found = [
        spearmanr(repeats[i, known], repeats[j, known]).statistic
        for i in range(len(repeats))
        for j in range(i)
    ]
    return float(np.mean(found))


PARTS: dict[str, Callable[[Benchmark, World, bool], None]] = {
    **{truth: partial(calibration_part, truth) for truth in TRUTHS},
    "points": points_part,
    "reliability": reliability_part,
}


if __name__ == "__main__":
    sys.exit(measure_on_real_pairs(__doc__ or "", "calibration", ((0, 1), (0, 1, 2)), PARTS))
