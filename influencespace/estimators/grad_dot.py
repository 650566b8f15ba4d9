"""Gradient dot product: influence with the identity in place of the curvature.

score(z) = grad L_target . grad F_z at the end of training, what one step of plain gradient descent on z does to the
target (the last term of TracIn, Pruthi et al. 2020). Positive is a fall of the target loss. One forward-mode pass along
the target gradient: no per-sample gradient.
"""

from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.conjugate_gradients import Solution
from influencespace.core.nystrom import Sketch
from influencespace.errors import STRICT
from influencespace.estimators.ecif import RoleScorer, along
from influencespace.estimators.problem import Fit, Problem, immediately


@options(frozen=True, kw_only=True, config=STRICT)
class GradDot:
    """Needs no pass over the pool."""

    sketched = False

    def solution(self, problem: Problem, gradients: Tensor, sketch: Sketch | None = None) -> Solution:
        """The gradients (V, p) as they are."""
        return Solution(x=gradients, iterations=0, residual=0.0)

    def scorer(self, problem: Problem, directions: Tensor) -> RoleScorer:
        """Scores along directions (V, p)."""
        return along(problem, directions)

    def fit(self, problem: Problem) -> Fit:
        return immediately(along(problem, problem.target_gradient))
