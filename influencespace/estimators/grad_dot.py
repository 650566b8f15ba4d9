"""Gradient dot product: influence with the identity in place of the curvature.

score(z) = grad L_target . grad F_z at the end of training, what one step of plain gradient descent on z does to the
target (the last term of TracIn, Pruthi et al. 2020). Positive is a fall of the target loss. One forward-mode pass along
the target gradient: no per-sample gradient.
"""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as options

from influencespace.estimators.ecif import along
from influencespace.estimators.problem import Fit, Problem, immediately


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class GradDot:
    """Needs no pass over the pool."""

    def fit(self, problem: Problem) -> Fit:
        return immediately(along(problem, problem.target_gradient))
