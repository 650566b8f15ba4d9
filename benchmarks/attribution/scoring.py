"""What is measured of estimators: scores of a whole pool by every line of the table, for a proxy that was really trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.cache import cached
from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import training_batches
from influencespace.estimators.ecif import Ecif
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch, damping_of
from influencespace.estimators.problem import Estimator, Problem, scores
from influencespace.estimators.proxy_problem import batch_of, rows_of
from influencespace.estimators.table import TABLE
from influencespace.estimators.unrolled import Unrolled
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.space import Space
from influencespace.models.training import HeadsConfig, train_heads
from influencespace.models.trajectory import Trajectory, space_at

Score = Callable[[Problem], FloatArray]
OURS = ("ecif", "nystrom", "unrolled")
IN_UNITS = ("ecif, early stopping", "unrolled", "unrolled, whole", "unrolled, taylor")
"""Estimators whose scores are changes of the target loss, so that a slope means something; ecif's default damping shrinks."""
BLIND = ("clip_score", "neg_clip_loss", "el2n", "self_influence", "random")
"""What never looks at the target."""


S = TypeVar("S", bound="Setup")


class Setup(ABC):
    """A pool of which some samples are wrong, a clean target, and how a proxy is trained."""

    config: HeadsConfig

    @property
    @abstractmethod
    def validation(self) -> NegativeBatch:
        """Samples for the choice of a learning rate alone."""

    @property
    @abstractmethod
    def key(self) -> str:
        """What its results depend on, beside the seeds of proxies and the code."""

    @abstractmethod
    def problem(self, seed: int, target: NegativeBatch | None = None) -> Problem:
        """A proxy trained on the pool, and what its influence is on."""


def tuned(study: S, rates: Sequence[float], cache: Path) -> S:
    """The study at the learning rate that a user would choose: whose proxy does best on samples that nothing else looks at."""

    def at(rate: float) -> S:
        return replace(study, config=replace(study.config, learning_rate=rate))  # type: ignore[type-var]

    def losses() -> dict[str, Any]:
        problems = {str(rate): at(rate).problem(0, study.validation) for rate in rates}
        return {rate: float(losses_on(problem, problem.space).mean()) for rate, problem in problems.items()}

    by_rate = cached(cache, ["rates", type(study).__name__, study.key], losses)
    return at(float(min(by_rate, key=lambda rate: by_rate[rate])))


@torch.no_grad()
def losses_on(problem: Problem, space: Space) -> FloatArray:
    """Loss of every target pair in the problem's negative batches (T,)."""
    terms = [problem.objective.terms(*space.embed(batch.inputs)) for batch in problem.target]
    return np.concatenate([term.double().cpu().numpy() for term in terms])


def path_of(problem: Problem) -> Trajectory:
    """The training of the problem's proxy, which every problem here has."""
    assert problem.trajectory is not None
    return problem.trajectory


def target_loss(problem: Problem, path: Trajectory) -> float:
    """The target loss at the end of a path."""
    return float(losses_on(problem, space_at(path.space, path.final)).mean())


def damping_at(problem: Problem, factor: float) -> float:
    """The damping of so many times what early stopping amounts to."""
    path = path_of(problem)
    rates = sum(path.rate(index) for index in range(len(path.batches)))
    return damping_of(CurvatureConfig(damping_factor=factor), rates, path.config.weight_decay)


def score_all(estimator: Estimator, problem: Problem) -> FloatArray:
    """Scores of the whole pool, whose pairs the problem's own path holds."""
    rows = np.arange(problem.pool_size)
    pool = NegativeBatch(inputs=path_of(problem).inputs(rows), image=rows)
    parts = np.array_split(rows, max(1, len(rows) // 1024))
    return scores(estimator, problem, [batch_of(pool, part) for part in parts])


def _of(make: Callable[[], Estimator]) -> Score:
    return lambda problem: score_all(make(), problem)


def _damped(factor: float) -> Score:
    return lambda problem: score_all(Ecif(), replace(problem, damping=damping_at(problem, factor)))


def _sketched(rank: int) -> Score:
    return _of(partial(Ecif, solver="woodbury", curvature=CurvatureConfig(rank=rank, max_rank=rank)))


SCORES: Mapping[str, Score] = {
    **{name: _of(make) for name, make in TABLE.items()},
    "ecif, early stopping": _damped(1.0),
    "ecif, damping factor 10": _damped(10.0),
    "ecif, damping factor 1000": _damped(1000.0),
    "nystrom, rank 4": _sketched(4),
    "nystrom, rank 128": _sketched(128),
    "ecif, taylor": _of(partial(Ecif, form="taylor")),
    "ecif, own role": _of(partial(Ecif, role="own")),
    "ecif, negative role": _of(partial(Ecif, role="negative")),
    "unrolled, whole": _of(partial(Unrolled, form="whole")),
    "unrolled, taylor": _of(partial(Unrolled, form="taylor")),
}
"""What is measured: the whole table, and other forms of those in units of the loss."""


def trained_heads(
    pool: NegativeBatch,
    weights: FloatArray,
    config: HeadsConfig,
    seed: int,
    batches: Iterable[IntArray] | None = None,
) -> Heads:
    """Heads trained on a pool by weight (n,), or on these batches."""
    images, texts = pool.inputs
    heads = initial_heads(images.shape[1], texts.shape[1], config.dimension, seed).to(images)
    if batches is None:
        batches = training_batches(weights, pool.image, config.batch_size, config.steps, seed)
    return train_heads(partial(rows_of, pool.inputs), batches, heads, config).heads


def agreement(repeats: FloatArray, measure: Callable[[FloatArray, FloatArray], float]) -> float | None:
    """Mean of a correlation over all pairs of repeats (R, n); None for one."""
    values = [measure(a, b) for a, b in combinations(repeats, 2)]
    return float(np.mean(values)) if values else None


def pearson(a: FloatArray, b: FloatArray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
