"""ECIF: a pair's influence in both of its roles, as an anchor and as a negative of all others, by a closed form.

Source: arXiv 2411.11667, against recorded negative batches that do not hold the pair's image, with the negative
role's derivative as checked against autograd (some digests print a sum of inverse probabilities).
"""

from dataclasses import dataclass, replace
from dataclasses import field as plain_field
from typing import Literal

from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.conjugate_gradients import Solution
from influencespace.core.nystrom import Sketch, no_sketch, sketch_bytes
from influencespace.errors import STRICT, InputError
from influencespace.estimators.influence import (
    CurvatureConfig,
    Influence,
    InfluenceScorer,
    sketch_curvature,
    solve,
)
from influencespace.estimators.problem import Batch, Fit, FloatArray, Problem, immediately, mean_of_known

Role = Literal["both", "own", "negative"]


@dataclass(frozen=True)
class RoleScorer:
    """Mean influence over the negative batches that can judge a pair, in one role or both."""

    influence: InfluenceScorer
    role: Role = "both"

    def by_batch(self, batch: Batch) -> tuple[Influence, FloatArray]:
        """Influence in both roles, and that of the chosen role along V directions in each of C batches (V, n, C)."""
        influence = self.influence(batch.inputs, batch.image)
        values = {"both": influence.by_batch, "own": influence.own, "negative": influence.negative}
        return influence, values[self.role]

    def __call__(self, batch: Batch) -> FloatArray:
        return mean_of_known(self.by_batch(batch)[1][0])


def along(problem: Problem, directions: Tensor, role: Role = "both", form: str = "exact") -> RoleScorer:
    """The scorer of influences along directions (V, p), or one (p,), at the end of training."""
    directions = directions.reshape(-1, directions.shape[-1])
    scorer = InfluenceScorer(
        problem.space, directions, problem.bank, problem.objective, problem.batch_size, form
    )
    return RoleScorer(scorer, role)


def sketch_of(problem: Problem, config: CurvatureConfig) -> Sketch:
    """Sketch of the scaled Gauss-Newton matrix, doubled up to `max_rank` until its tail is below the damping.

    Raises InputError where the first one does not fit in the problem's memory; it is not doubled beyond it.
    """
    size = problem.space.size
    rank, limit = (min(wanted, size) for wanted in (config.rank, config.max_rank))
    if problem.memory is not None:
        if (need := sketch_bytes(size, rank)) > problem.memory:
            raise InputError(
                f"a sketch of {size:,} parameters x rank {rank} takes {need / 1e9:,.3f} GB of memory and there are "
                f"{problem.memory / 1e9:,.3f} GB; take fewer parameters, a lower rank, or ecif with solver=plain, without one"
            )
        limit = min(limit, problem.memory // sketch_bytes(size, 1))
    while True:
        sketch = sketch_curvature(problem.curvature, rank, problem.seed)
        if sketch.tail_ratio(problem.damping) <= 1 or 2 * rank > limit:
            return sketch
        rank *= 2


@options(frozen=True, kw_only=True, config=STRICT)
class Ecif:
    """Influence through the curvature, in the chosen roles and form: the default.

    Positive: more weight on the pair lowers the target loss; nan where every negative batch holds its image; in the unit that
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

    @property
    def sketched(self) -> bool:
        """Whether `solution` uses a sketch of the curvature."""
        return self.solver != "plain"

    def solution(self, problem: Problem, gradients: Tensor, sketch: Sketch | None = None) -> Solution:
        """(G + mu D)^-1 g for each row of gradients (V, p), by a sketch that may exist already."""
        config = self.curvature if self.solver != "woodbury" else replace(self.curvature, max_iterations=0)
        if sketch is None:
            sketch = sketch_of(problem, config) if self.sketched else no_sketch(gradients[0])
        return solve(problem.curvature, problem.preconditioner, sketch, problem.damping, gradients, config)

    def scorer(self, problem: Problem, directions: Tensor) -> RoleScorer:
        """Scores along solved directions (V, p)."""
        return along(problem, directions, self.role, self.form)

    def fit(self, problem: Problem) -> Fit:
        gradient = problem.target_gradient  # first, because it says what is wrong with a broken proxy
        return immediately(self.scorer(problem, self.solution(problem, gradient[None]).x))
