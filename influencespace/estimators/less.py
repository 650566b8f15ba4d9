"""LESS: cosine of the target gradient with the step that Adam would take on a pair (Xia et al. 2024, definition 3.1).

score(z) = sum_i eta_i cos(grad L_target(theta_i), D^-1 grad F_z(theta_i)) / sum_i eta_i over checkpoints i with learning
rates eta_i. Positive is a fall of the target loss; within [-1, 1], without its units. Adam's step has its second
moments fixed at the problem's preconditioner D, and no momentum, which all pairs share.

The inner product is one exact forward-mode pass; the norm |D^-1 grad F_z| comes from passes along random directions
(exact where there are no more parameters than directions), so no per-sample gradient is formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.projection import random_projection
from influencespace.errors import STRICT
from influencespace.estimators.checkpoints import without_path
from influencespace.estimators.ecif import along
from influencespace.estimators.influence import InfluenceScorer
from influencespace.estimators.problem import Batch, Fit, FloatArray, Problem, immediately, mean_of_known


def projection_rows(size: int, dimension: int, seed: int) -> Tensor:
    """Directions along which the derivatives' norm is the gradient's: (k, p), in expectation or, for k = p, exactly."""
    if size <= dimension:
        return torch.eye(size, dtype=torch.float64)
    return random_projection(size, dimension, seed=seed, kind="rademacher").T


@dataclass(frozen=True, kw_only=True)
class CosineAt:
    """The cosine at one checkpoint; its rate is the checkpoint's weight."""

    then: Problem
    """As it was at the checkpoint."""
    rate: float
    dimension: int

    @cached_property
    def influence(self) -> InfluenceScorer:
        """Along D^-1 grad L_target / |grad L_target| and along D^-1 times the random directions."""
        D, target = self.then.preconditioner, self.then.target_gradient.detach()
        rows = projection_rows(len(D), self.dimension, self.then.seed).to(D)
        return along(self.then, torch.cat([(target / target.norm())[None], rows]) / D).influence

    def __call__(self, batch: Batch) -> FloatArray:
        means = mean_of_known(self.influence(batch.inputs, batch.image).by_batch)
        norms = np.linalg.norm(means[1:], axis=0)
        cosine: FloatArray = means[0] / np.where(norms > 0, norms, np.nan)
        return cosine


def mean_cosine(cosines: Sequence[CosineAt], batch: Batch) -> FloatArray:
    """The mean of the cosines, weighted by learning rate: (n,)."""
    rates = np.array([cosine.rate for cosine in cosines])
    mean: FloatArray = rates @ np.stack([cosine(batch) for cosine in cosines]) / rates.sum()
    return mean


@options(frozen=True, kw_only=True, config=STRICT)
class Less:
    """Over the kept checkpoints, or at the end of training where none were kept."""

    dimension: int = Field(default=64, ge=1)
    """Random directions for the norm: its relative error is about 1 / sqrt(2 dimension). Memory grows with each."""
    checkpoints: int = Field(default=4, ge=1)
    """Maximum number, evenly spaced, the last among them; the paper has four epochs."""

    def fit(self, problem: Problem) -> Fit:
        kept, alone = problem.checkpoints, without_path(problem)
        moments = [(alone, 1.0)]
        if kept:
            chosen = np.unique(np.linspace(len(kept) - 1, 0, self.checkpoints).round().astype(int))
            moments = [(replace(alone, space=kept[i].load()), kept[i].learning_rate) for i in chosen]
        cosines = [CosineAt(then=then, rate=rate, dimension=self.dimension) for then, rate in moments]
        return immediately(partial(mean_cosine, cosines))
