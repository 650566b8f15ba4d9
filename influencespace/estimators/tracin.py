"""TracIn: what training on a pair did to the target loss, step by step, to first order, at kept checkpoints.

Source: Pruthi et al. 2020, arXiv 2002.08484 (TracInCP). Higher is more worth keeping, as in the paper (proponents).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.errors import InputError
from influencespace.estimators.ecif import along
from influencespace.estimators.problem import (
    Batch,
    Checkpoint,
    Fit,
    FloatArray,
    Problem,
    immediately,
)


def at_checkpoints(problem: Problem) -> Iterator[tuple[Checkpoint, Problem]]:
    """The problem as it was at each checkpoint, first to last; one proxy is in memory at a time."""
    for checkpoint in problem.checkpoints:
        yield checkpoint, replace(problem, space=checkpoint.load())


def require_checkpoints(problem: Problem, name: str) -> None:
    """Raises InputError where no checkpoints were kept."""
    if not problem.checkpoints:
        raise InputError(
            f"{name} follows the proxy along its training and the problem has no checkpoints: keep some in training, "
            "or use ecif, which needs the trained proxy only"
        )


def first_order_step(target_gradient: Tensor, D: Tensor | None) -> Tensor:
    """The direction along which a pair's loss tells what a step on it does to the target: g, or D^-1 g for AdamW (p,)."""
    return target_gradient if D is None else target_gradient / D


@dataclass(frozen=True)
class TracInScorer:
    """Scores pairs by all checkpoints, loaded one after the other for each batch: give it large batches."""

    problem: Problem
    preconditioned: bool

    def __call__(self, batch: Batch) -> FloatArray:
        scores = np.zeros(len(batch))
        for checkpoint, then in at_checkpoints(self.problem):
            D = then.preconditioner if self.preconditioned else None
            direction = first_order_step(then.target_gradient, D)
            scores += checkpoint.learning_rate * along(then, direction)(batch)
        return scores


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TracIn:
    """score_z = sum over checkpoints of eta_t grad L_target(theta_t) . D^-1 grad F_z(theta_t), positive = lowers the loss.

    F_z is what the pair adds to its batch in both roles (`core.contrastive.added_loss`): grad F_z . v is a derivative along v, so
    no per-sample gradients are taken. Checkpoints count alike: keep them at equal distances. In units of the target loss
    once multiplied by the steps between checkpoints over the pool's size.
    """

    preconditioned: bool = True
    """AdamW steps by D^-1 times the gradient: scale by its D, the end's for all checkpoints (ones, no change, for SGD).
    The default because leave-one-out retraining prefers it (tests/estimators/test_tracin.py)."""

    def fit(self, problem: Problem) -> Fit:
        """Raises InputError without checkpoints."""
        require_checkpoints(problem, "tracin")
        return immediately(TracInScorer(problem, self.preconditioned))
