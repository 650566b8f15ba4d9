"""The pieces of influence through the curvature: negative batches, damping, the Nystrom sketch, the solve, the scorer.

H = G + mu D is the response of the trainer: G the Gauss-Newton matrix over negative batches, D AdamW's preconditioner,
mu = c / sum of learning rates + weight decay. Everything is done in coordinates scaled by D^1/2, in which
H = G~ + mu I. score(z) = grad L_target . H^-1 . grad l_z, so positive is a predicted fall of the target loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.conjugate_gradients import Solution, conjugate_gradients
from influencespace.core.contrastive import Objective, Pointwise, contrastive
from influencespace.core.contrastive_influence import (
    BatchSummary,
    Tangents,
    influence,
    pointwise_influence,
    summarise,
)
from influencespace.core.nystrom import Sketch, nystrom, probes
from influencespace.errors import STRICT
from influencespace.models.space import Inputs, Space

IntArray = NDArray[np.int64]
Products = Callable[[Tensor], Tensor]
"""Maps rows (V, p) to the scaled curvature times each of them (V, p)."""


@options(frozen=True, kw_only=True, config=STRICT)
class CurvatureConfig:
    """The Hessian's sketch and damping."""

    rank: int = Field(default=32, ge=1)
    """Probes of the sketch; doubled up to `max_rank` until the smallest kept eigenvalue is below the damping."""
    max_rank: int = Field(default=256, ge=1)
    damping_factor: float = Field(default=100.0, gt=0)
    """c in mu = c / (sum of learning rates) + weight decay. 1 is early stopping's own response; larger values trust the
    curvature less, and shrink all scores: only at 1 are they in the unit of the target loss. Too small a value amplifies the
    sampling noise of the target gradient."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Relative residual at which conjugate gradients stop."""
    max_iterations: int = Field(default=50, ge=0)
    target_folds: int = Field(default=10, ge=2)
    """Folds of the target's images, one direction each: their spread is the target's standard error."""


@dataclass(frozen=True, kw_only=True)
class NegativeBatch:
    """Inputs of one recorded batch of negatives, and the image of each of its pairs."""

    inputs: Inputs  # two (M, D)
    image: IntArray  # (M,)


def target_gradients(
    space: Space, batches: Sequence[Inputs], folds: Sequence[IntArray], count: int, objective: Objective
) -> Tensor:
    """Gradient of the target loss by fold of the target's images: (F, p), whose mean is the gradient of the mean loss.

    `folds` has the fold of each pair of each batch. Negatives are the whole batch, whatever the fold.
    """
    pairs = sum(len(fold) for fold in folds)
    total = torch.zeros(count, space.size, dtype=torch.float64)
    for inputs, fold in zip(batches, folds):
        weights = torch.nn.functional.one_hot(torch.from_numpy(fold), count).T.double() * (count / pairs)
        total += space.loss_gradients(inputs, weights.to(space.like), objective).double().cpu()
    return total.to(space.like)


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """The map rows -> G~ rows for G~ = D^-1/2 G D^-1/2, G the Gauss-Newton matrix averaged over negative batches.

    Batches are summed in their order in float64, so that any split of the rows gives the same products.
    """

    space: Space
    batches: Sequence[Inputs]
    objective: Objective
    preconditioner: Tensor  # D (p,)

    def __call__(self, rows: Tensor) -> Tensor:
        """G~ times rows (V, p): (V, p)."""
        root = self.preconditioner.rsqrt()
        total = torch.zeros(rows.shape, dtype=torch.float64)
        for inputs in self.batches:
            total += self.space.gauss_newton(inputs, rows * root, self.objective).double().cpu()
        return (total / len(self.batches)).to(rows) * root


def damping_of(config: CurvatureConfig, sum_of_learning_rates: float, weight_decay: float) -> float:
    """mu = weight decay + c / sum of learning rates: weight decay and early stopping as the trainer applies them."""
    return weight_decay + config.damping_factor / sum_of_learning_rates


def floored(D: Tensor) -> Tensor:
    """AdamW's preconditioner without near-zero entries, which would let parameters that hardly move dominate.

    The floor, a thousandth of the mean, changes nothing for a proxy whose inputs are all alive.
    """
    return D.clamp_min(1e-3 * float(D.mean()))


def sketch_curvature(curvature: Curvature, rank: int, seed: int) -> Sketch:
    """Nystrom sketch of G~ from `rank` seeded probes, sixteen in each pass over the batches."""
    D = curvature.preconditioner
    Omega = probes(len(D), range(min(rank, len(D))), seed, D.dtype).to(D.device)
    return nystrom(Omega, torch.cat([curvature(rows) for rows in torch.split(Omega.T, 16)]).T)


def solve(
    products: Products, D: Tensor, sketch: Sketch, damping: float, gradients: Tensor, config: CurvatureConfig
) -> Solution:
    """v = H^-1 g for each row of gradients (F, p), in the parameters' own coordinates.

    `products` maps rows (V, p) to G~ rows: a `Curvature`, or the same spread over workers. D (p,) is the preconditioner.
    """
    root = D.rsqrt()
    solution = conjugate_gradients(
        products,
        sketch,
        damping,
        gradients * root,
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )
    return Solution(x=solution.x * root, iterations=solution.iterations, residual=solution.residual)


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Influence of n pairs along V directions against each of C negative batches; nan where one holds the pair's image.

    A pointwise loss has no negatives: C is 1, and `negative` is zero.
    """

    own: NDArray[np.float64]  # (V, n, C)
    negative: NDArray[np.float64]  # (V, n, C), its mean over recorded pairs subtracted

    @property
    def by_batch(self) -> NDArray[np.float64]:
        return self.own + self.negative


class HasTangents(Protocol):
    """What a scorer needs of a Space."""

    def tangents(self, inputs: Inputs, directions: Tensor) -> Tangents:
        """Embeddings of n pairs and their derivatives along directions (V, p)."""


@dataclass(frozen=True)
class InfluenceScorer:
    """Scores any pair against recorded negative batches: frozen, row by row, whatever the partition of the rows."""

    space: HasTangents
    directions: Tensor  # (V, p)
    bank: Sequence[NegativeBatch]
    objective: Objective
    batch_size: int
    form: str = "exact"

    @cached_property
    def offset(self) -> NDArray[np.float64]:
        """Mean negative influence of recorded pairs against the batches that are not theirs (V,).

        One extra negative lifts every loss, whoever it is: the influence of z's presence in place of another pair's is wanted.
        Raises ValueError for a single negative batch.
        """
        if len(self.bank) < 2:
            raise ValueError(
                "influence needs two negative batches or more: pairs of each are scored against the others"
            )
        means = []
        for k in range(len(self.bank)):
            others = [tangents for j, tangents in enumerate(self._bank_tangents) if j != k]
            negative = [self._against(k, other)[1] for other in others]
            means.append(torch.cat(negative, 1).double().mean(1))
        return torch.stack(means).mean(0).cpu().numpy()

    def __call__(self, inputs: Inputs, image: IntArray) -> Influence:
        """Influence of pairs by their inputs (two (n, D)) and the image of each (n,)."""
        pairs = self._tangents(inputs)
        if isinstance(self.objective, Pointwise):
            alone = pointwise_influence(self.objective, pairs).double().cpu().numpy()[..., None]
            return Influence(own=alone, negative=np.zeros_like(alone))
        own, negative = [], []
        for k, recorded in enumerate(self.bank):
            a, b = (x.double().cpu().numpy() for x in self._against(k, pairs))
            shared = np.isin(image, recorded.image)
            own.append(np.where(shared, np.nan, a))
            negative.append(np.where(shared, np.nan, b - self.offset[:, None]))
        return Influence(own=np.stack(own, -1), negative=np.stack(negative, -1))

    @cached_property
    def _bank_tangents(self) -> list[Tangents]:
        return [self._tangents(batch.inputs) for batch in self.bank]

    @cached_property
    def _summaries(self) -> list[BatchSummary]:
        """What scores against each negative batch need, computed once."""
        objective = contrastive(self.objective, "a negative batch")
        return [summarise(objective, tangents, self.batch_size) for tangents in self._bank_tangents]

    def _against(self, k: int, pairs: Tangents) -> tuple[Tensor, Tensor]:
        return influence(
            contrastive(self.objective, "a negative batch"), pairs, self._summaries[k], self.form
        )

    @torch.no_grad()
    def _tangents(self, inputs: Inputs) -> Tangents:
        return self.space.tangents(inputs, self.directions)
