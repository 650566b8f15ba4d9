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

from influencespace.core.linalg import Sketch, no_sketch, sketch_bytes
from influencespace.errors import InputError
from influencespace.estimators.influence import (
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
        values = {"both": found.by_batch, "own": found.own, "negative": found.negative}[self.role][0]
        return mean_of_known(values)


def along(problem: Problem, direction: Tensor, role: Role = "both", form: str = "exact") -> RoleScorer:
    """The scorer of influences along one direction (p,) at the end of training."""
    scorer = InfluenceScorer(
        problem.space, direction[None], problem.bank, problem.objective, problem.batch_size, form
    )
    return RoleScorer(scorer, role)


def curvature_of(problem: Problem, config: CurvatureConfig) -> Sketch:
    """Sketch of the scaled Gauss-Newton matrix, doubled up to `max_rank` until its tail is below the damping.

    Raises InputError where the first one does not fit in the problem's memory; it is not doubled beyond it.
    """
    contexts = [context.inputs for context in problem.bank]
    size = problem.space.size
    rank, most = (min(wanted, size) for wanted in (config.rank, config.max_rank))
    if problem.memory is not None:
        if (need := sketch_bytes(size, rank)) > problem.memory:
            raise InputError(
                f"a sketch of {size:,} parameters x rank {rank} takes {need / 1e9:,.3f} GB of memory and there are "
                f"{problem.memory / 1e9:,.3f} GB; take fewer parameters, a lower rank, or ecif with solver=plain, without one"
            )
        most = min(most, problem.memory // sketch_bytes(size, 1))
    while True:
        sketch = sketch_curvature(
            problem.space, contexts, problem.objective, problem.preconditioner, rank, config.seed
        )
        if sketch.tail_ratio(problem.damping) <= 1 or 2 * rank > most:
            return sketch
        rank *= 2


def direction_of(problem: Problem, config: CurvatureConfig, sketched: bool = True) -> Tensor:
    """v = (G + mu D)^-1 grad L_target (p,), by conjugate gradients on the bank's contexts, preconditioned by a sketch or not."""
    gradient = problem.target_gradient  # first, because it says what is wrong with a broken proxy
    solution = solve_directions(
        problem.space,
        [context.inputs for context in problem.bank],
        problem.objective,
        problem.preconditioner,
        curvature_of(problem, config) if sketched else no_sketch(gradient),
        problem.damping,
        gradient[None],
        config,
    )
    return solution.x[0]


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Ecif:
    """Influence through the curvature, in the roles and the form that are asked for: the default.

    Positive: more weight on the pair lowers the target loss; nan where every context holds its image; in the unit that
    `CurvatureConfig.damping_factor` says. Raises ValueError for a damping of its own: it is the problem's.
    """

    role: Role = "both"
    form: Literal["exact", "taylor"] = "exact"
    """Of the negative role: `exact` equals the leave-one-out difference of the batch loss; `taylor` is its first order."""
    solver: Literal["conjugate_gradients", "woodbury", "plain"] = "conjugate_gradients"
    """Conjugate gradients are preconditioned by a sketch, `woodbury` inverts the sketch alone, its tail taken as the damping:
    quick; `plain` is conjugate gradients without a sketch, for more parameters than memory has room for `rank` times."""
    curvature: CurvatureConfig = plain_field(default_factory=CurvatureConfig)

    def __post_init__(self) -> None:
        if self.curvature.damping_factor != CurvatureConfig().damping_factor:
            raise ValueError(
                f"the estimator's curvature has a damping_factor of {self.curvature.damping_factor:g}, which it does not read: "
                "the damping is the problem's; give it as curvature.damping_factor of the run"
            )

    def fit(self, problem: Problem) -> Fit:
        config = self.curvature if self.solver != "woodbury" else replace(self.curvature, max_iterations=0)
        direction = direction_of(problem, config, sketched=self.solver != "plain")
        return immediately(along(problem, direction, self.role, self.form))
