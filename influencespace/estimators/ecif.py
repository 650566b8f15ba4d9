"""ECIF: a pair's influence in both of its roles, as an anchor and as everybody else's negative, by a closed form.

Source: arXiv 2411.11667, in the bank form: against recorded contexts that do not hold the pair's image, with the negative
role's derivative as checked against autograd (some digests print a sum of inverse probabilities).
"""

from dataclasses import dataclass, replace
from dataclasses import field as plain_field
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.linalg import Sketch
from influencespace.estimators.nystrom import (
    CurvatureConfig,
    InfluenceScorer,
    sketch_curvature,
    solve_directions,
)
from influencespace.estimators.problem import Batch, Fit, FloatArray, Problem, immediately, mean_of_known

Role = Literal["both", "own", "negative"]


@dataclass(frozen=True)
class RoleScorer:
    """Mean influence over the contexts that can judge a pair, in one role or both."""

    influence: InfluenceScorer
    role: Role = "both"

    def __call__(self, batch: Batch) -> FloatArray:
        found = self.influence(batch.inputs, batch.image)
        values = {"both": found.by_context, "own": found.own, "negative": found.negative}[self.role][0]
        return mean_of_known(values)


def along(problem: Problem, direction: Tensor, role: Role = "both", form: str = "exact") -> RoleScorer:
    """The scorer of influences along one direction (p,) at the end of training."""
    scorer = InfluenceScorer(
        problem.space, direction[None], problem.bank, problem.objective, problem.batch_size, form
    )
    return RoleScorer(scorer, role)


def curvature_of(problem: Problem, config: CurvatureConfig) -> Sketch:
    """Sketch of the scaled Gauss-Newton matrix, doubled up to `max_rank` until its tail is below the damping."""
    contexts = [context.inputs for context in problem.bank]
    rank, most = (min(size, problem.space.size) for size in (config.rank, config.max_rank))
    while True:
        sketch = sketch_curvature(
            problem.space, contexts, problem.objective, problem.preconditioner, rank, config.seed
        )
        if sketch.tail_ratio(problem.damping) <= 1 or 2 * rank > most:
            return sketch
        rank *= 2


def direction_of(problem: Problem, config: CurvatureConfig) -> Tensor:
    """v = (G + mu D)^-1 grad L_target (p,), by preconditioned conjugate gradients on the bank's contexts."""
    gradient = problem.target_gradient  # first, because it says what is wrong with a broken student
    solution = solve_directions(
        problem.space,
        [context.inputs for context in problem.bank],
        problem.objective,
        problem.preconditioner,
        curvature_of(problem, config),
        problem.damping,
        gradient[None],
        config,
    )
    return solution.x[0]


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Ecif:
    """Influence through the curvature, in the roles and the form that are asked for."""

    role: Role = "both"
    form: Literal["exact", "taylor"] = "exact"
    """Of the negative role: `exact` equals the leave-one-out difference of the batch loss; `taylor` is its first order."""
    solver: Literal["conjugate_gradients", "woodbury"] = "conjugate_gradients"
    """`woodbury` inverts the sketch alone, its tail taken as the damping: quick; the other is preconditioned by it."""
    curvature: CurvatureConfig = plain_field(default_factory=CurvatureConfig)

    def fit(self, problem: Problem) -> Fit:
        config = self.curvature if self.solver != "woodbury" else replace(self.curvature, max_iterations=0)
        return immediately(along(problem, direction_of(problem, config), self.role, self.form))
