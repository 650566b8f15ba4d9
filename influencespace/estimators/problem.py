"""The problem that every estimator gets, and the one contract that all of them keep.

An estimator is fitted once and then scores any pair: higher is more worth keeping, whatever the sign in its paper. What
has to see the pool first asks for passes over it, each a mergeable statistic: one core, a loop or a cluster give the same.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influencespace.core.conjugate_gradients import Solution
from influencespace.core.contrastive import Objective, Pointwise
from influencespace.core.nystrom import Sketch
from influencespace.errors import InputError
from influencespace.estimators.influence import Curvature, NegativeBatch, target_gradients
from influencespace.models.gradients import Gradients, PairGradients, Recorded, SampleGradients
from influencespace.models.space import Inputs, Space
from influencespace.models.trajectory import Trajectory

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some pairs of the pool."""

    uid: Sequence[str]  # (n,)
    inputs: Inputs  # two (n, D), embeddings by the given encoder
    image: IntArray  # (n,) image of each pair
    row: IntArray  # (n,) row of each pair in the pool

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The proxy after `step` steps of its training, loaded where it is used, and the learning rate of the last of them."""

    step: int
    learning_rate: float
    load: Callable[[], Space]


def checkpoints_of(path: Trajectory) -> list[Checkpoint]:
    """The proxies along a recorded path whose states are stored."""
    return [
        Checkpoint(step=step, learning_rate=path.rate(step - 1), load=partial(path.space_after, step))
        for step in path.stored_steps
    ]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A trained proxy, the pool that it was trained on, and the target whose loss is to fall."""

    space: Space
    objective: Objective
    batch_size: int
    """The trainer's global batch B."""
    pool_size: int
    """N."""
    trained_on: int | None = None
    """Pairs of the pool that the proxy was trained on, where they are not all."""
    bank: Sequence[NegativeBatch]
    target: Sequence[NegativeBatch]
    """The target's pairs, each in one batch."""
    preconditioner: Tensor
    """AdamW's D = sqrt(v_hat) + eps at the end of training (p,); ones for SGD."""
    damping: float
    """mu of H = G + mu D."""
    checkpoints: Sequence[Checkpoint] = ()
    """Along the training path, first to last; empty where none were kept."""
    trajectory: Trajectory | None = None
    """The whole training path, where it was recorded."""
    memory: int | None = None
    """Bytes that a sketch of the curvature may take; None for all that there are."""
    seed: int = 0

    @property
    def curvature(self) -> Curvature:
        """The scaled Gauss-Newton matrix over the bank, as a product map."""
        return Curvature(
            space=self.space,
            batches=[batch.inputs for batch in self.bank],
            objective=self.objective,
            preconditioner=self.preconditioner,
        )

    @cached_property
    def target_gradient(self) -> Tensor:
        """Gradient of the mean target loss (p,)."""
        return self.gradient_at(self.space)

    def gradient_at(self, space: Space) -> Tensor:
        """Gradient of the mean target loss at the parameters of `space` (p,).

        Raises InputError where the target has fewer than two pairs, or where the gradient is not finite.
        """
        pairs = sum(len(batch.image) for batch in self.target)
        if pairs < 2:
            raise InputError(
                f"the target has {pairs} pair(s): a contrastive loss needs two, and a useful target a hundred or more"
            )
        batches = [batch.inputs for batch in self.target]
        one_fold = [np.zeros(len(batch.image), np.int64) for batch in self.target]
        gradient = target_gradients(space, batches, one_fold, 1, self.objective)[0]
        if not bool(torch.isfinite(gradient).all()):
            raise InputError(
                "the gradient of the target loss is not finite: the proxy's parameters or the target's embeddings hold "
                "nan or infinity, or the temperature is too low; train it again with a lower learning rate"
            )
        return gradient


class Scorer(Protocol):
    """Scores pairs row by row, whatever the batch they come in."""

    def __call__(self, batch: Batch) -> FloatArray:
        """Scores (n,): higher is more worth keeping. nan where no negative batch can judge the pair."""


class Fold(Protocol):
    """One pass over the pool, as a statistic that can be merged."""

    def zero(self) -> Any:
        """The statistic of no pairs."""

    def observe(self, state: Any, batch: Batch) -> Any:
        """The statistic with a batch added."""

    def merge(self, left: Any, right: Any) -> Any:
        """The statistic of both."""


Fit = Generator[Fold, Any, Scorer]
"""Yields each pass that it needs, is sent its result, and returns the scorer."""


class Estimator(Protocol):
    """One idea of what a pair is worth."""

    def fit(self, problem: Problem) -> Fit:
        """Raises InputError where the problem lacks what the estimator needs."""


@runtime_checkable
class Directional(Protocol):
    """An estimator whose score is the influence along solved directions: it has standard errors of target and negatives."""

    @property
    def sketched(self) -> bool:
        """Whether `solution` uses a sketch of the curvature."""

    def solution(self, problem: Problem, gradients: Tensor, sketch: Sketch | None = None) -> Solution:
        """Directions for gradients of target losses: (V, p) -> (V, p)."""

    def scorer(self, problem: Problem, directions: Tensor) -> Any:
        """An `ecif.RoleScorer` along directions (V, p)."""

    def fit(self, problem: Problem) -> Fit:
        """As `Estimator.fit`, along the mean gradient of the target."""


def fitted(fit: Fit, run: Callable[[Fold], Any]) -> Scorer:
    """Drive a fit to its scorer; `run` does one pass over the pool."""
    try:
        wanted = next(fit)
        while True:
            wanted = fit.send(run(wanted))
    except StopIteration as end:
        scorer: Scorer = end.value
        return scorer


def scores(estimator: Estimator, problem: Problem, batches: Sequence[Batch]) -> FloatArray:
    """Fit on the batches and score all of them in the plain loop: the truth that every distribution must equal."""

    def run(statistic: Fold) -> Any:
        state = statistic.zero()
        for batch in batches:
            state = statistic.observe(state, batch)
        return state

    scorer = fitted(estimator.fit(problem), run)
    return np.concatenate([scorer(batch) for batch in batches])


def mean_of_known(values: FloatArray) -> FloatArray:
    """Mean over negative batches, the last axis; those that cannot judge a pair are nan: (..., C) -> (...)."""
    known = np.isfinite(values)
    count = known.sum(-1)
    mean: FloatArray = np.where(known, values, 0.0).sum(-1) / np.where(count > 0, count, np.nan)
    return mean


def mean_over_bank(values: FloatArray, bank: Sequence[Recorded], image: IntArray) -> FloatArray:
    """Mean of values (n, C) over the negative batches without the pair's image: (n,), nan where there is none."""
    judged = ~np.stack([np.isin(image, batch.image) for batch in bank], 1)
    return mean_of_known(np.where(judged, values, np.nan))


def per_sample_gradients(problem: Problem, space: Space) -> Gradients:
    """Gradients of what each sample adds to the summed loss, by the parameters of `space`, which may be a projected one."""
    objective = problem.objective
    if isinstance(objective, Pointwise):
        return SampleGradients(space=space, value=objective.loss)
    return PairGradients(space=space, bank=problem.bank, objective=objective, batch_size=problem.batch_size)


def immediately(scorer: Scorer) -> Fit:
    """The fit of an estimator that needs no pass."""
    yield from ()
    return scorer
