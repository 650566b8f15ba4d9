"""TracIn: what training on a pair did to the target loss, step by step, to first order, at kept checkpoints.

Source: Pruthi et al. 2020, arXiv 2002.08484 (TracInCP). Higher is more worth keeping, as in the paper (proponents).
"""

from functools import partial

from pydantic.dataclasses import dataclass as options

from influencespace.errors import STRICT
from influencespace.estimators.checkpoints import CheckpointSum, require_checkpoints
from influencespace.estimators.ecif import along
from influencespace.estimators.problem import Batch, Checkpoint, Fit, FloatArray, Problem, immediately


def first_order(
    preconditioned: bool, index: int, checkpoint: Checkpoint, then: Problem, batch: Batch
) -> FloatArray:
    """eta_t grad L_target(theta_t) . D^-1 grad F_z(theta_t) at one checkpoint, or without D: (n,)."""
    direction = then.target_gradient / then.preconditioner if preconditioned else then.target_gradient
    return checkpoint.learning_rate * along(then, direction)(batch)


@options(frozen=True, kw_only=True, config=STRICT)
class TracIn:
    """score_z = sum over checkpoints of eta_t grad L_target(theta_t) . D^-1 grad F_z(theta_t), positive = lowers the loss.

    F_z is what the pair adds to its batch in both roles (`core.contrastive.added_loss`): grad F_z . v is a derivative along v,
    so no per-sample gradients are taken. Checkpoints count alike: keep them at equal distances. In units of the target loss
    once multiplied by the steps between checkpoints over the pool's size.
    """

    preconditioned: bool = True
    """AdamW steps by D^-1 times the gradient: scale by its D, the end's for all checkpoints (ones, no change, for SGD).
    The default because leave-one-out retraining prefers it (tests/estimators/test_tracin.py)."""

    def fit(self, problem: Problem) -> Fit:
        """Raises InputError without checkpoints."""
        require_checkpoints(problem, "tracin")
        return immediately(CheckpointSum(problem, partial(first_order, self.preconditioned)))
