"""Self-influence: what training on a pair does to the pair's own loss (Koh and Liang 2017; LoGra's projection).

With P the projection and H = G + mu D, g_z . P (P^T H P)^-1 P^T . g_z, always >= 0. It is large for pairs that the
proxy can fit only by itself, so a large value is suspicious (mislabelled or rare), and the score is its *negative*: higher is
more worth keeping. It does not use the target.
"""

from dataclasses import dataclass

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.errors import STRICT
from influencespace.estimators.influence import Curvature
from influencespace.estimators.problem import (
    Batch,
    Fit,
    FloatArray,
    Problem,
    immediately,
    per_sample_gradients,
)
from influencespace.models.gradients import Gradients
from influencespace.models.projected import ReducedSpace, reduced_space


def projected_curvature(problem: Problem, reduced: ReducedSpace) -> Tensor:
    """P^T (G + mu D) P over the negative batches (k, k), in float64."""
    like = problem.preconditioner
    rows = torch.eye(reduced.space.size, dtype=like.dtype, device=like.device)
    curvature = Curvature(
        space=reduced.space,
        batches=[batch.inputs for batch in problem.bank],
        objective=problem.objective,
        preconditioner=torch.ones_like(rows[0]),
    )
    blocks = [curvature(rows[start : start + 16]) for start in range(0, len(rows), 16)]
    G = torch.cat(blocks).detach().double().cpu()
    return (G + G.T) / 2 + problem.damping * reduced.diagonal(like).double().cpu()


@dataclass(frozen=True, kw_only=True)
class SelfInfluenceScorer:
    """Minus |L^-1 g_z|^2, L the lower Cholesky factor of the curvature."""

    gradients: Gradients
    factor: Tensor

    def __call__(self, batch: Batch) -> FloatArray:
        rows = self.gradients(batch.inputs, batch.image)
        solved = torch.linalg.solve_triangular(self.factor, rows.T, upper=False)
        scores: FloatArray = -solved.square().sum(0).numpy()
        return scores


@options(frozen=True, kw_only=True, config=STRICT)
class SelfInfluence:
    """Needs no pass over the pool: the curvature comes from the negative batches."""

    dimension: int = Field(default=256, ge=1)
    """Numbers that each parameter tensor's gradient is projected to, where it has more."""

    def fit(self, problem: Problem) -> Fit:
        reduced = reduced_space(problem.space, self.dimension, problem.seed)
        gradients = per_sample_gradients(problem, reduced.space)
        factor: Tensor = torch.linalg.cholesky(projected_curvature(problem, reduced))
        return immediately(SelfInfluenceScorer(gradients=gradients, factor=factor))
