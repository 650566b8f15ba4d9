"""Metagradient descent on data weights: train, differentiate the end of the training by every weight, move the weights, repeat.

A round differentiates one whole training by the weights of its pairs, exactly, and moves each weight by a step of fixed size
against its derivative (Engstrom et al. 2025, arXiv 2503.13751: metagradients by replay, steps by sign). Their metaparameters are
counts of pairs; here they are weights in the loss of the same batches, with the same initial parameters in every round.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.func import vjp

from influencespace.core.arrays import FloatArray
from influencespace.models.trajectory import Response, Trajectory, adjoint, loss_gradient

RATE = 0.2  # of a weight, per vote
MIN_WEIGHT, MAX_WEIGHT = 0.05, 2.0  # the logarithm of a weight enters the loss


def step_gradient(trajectory: Trajectory, response: Response) -> Tensor:
    """Derivative of the final target loss by the weights of one step's batch (B,), through this step and all later ones."""
    index, theta = response.index, response.state.theta
    inputs = trajectory.inputs(trajectory.batches[index])
    weights = trajectory.weights_of(index)
    if weights is None:
        weights = theta.new_ones(len(inputs[0]))

    def by_weight(w: Tensor) -> Tensor:
        return loss_gradient(trajectory.space, theta, inputs, trajectory.objective, w)

    gradient: Tensor = vjp(by_weight, weights)[1](response.of_gradient)[0]
    return gradient


def weight_gradients(trajectory: Trajectory, target_gradient: Tensor, pool_size: int) -> FloatArray:
    """Derivative of the final target loss by each pair's weight in the losses of its batches: (N,), zero for a pair in none.

    Positive: more weight on the pair raises the target loss. target_gradient (p,) is that of the target loss at
    `trajectory.final`. Raises FloatingPointError, naming the step, as `adjoint` does.
    """
    gradients = np.zeros(pool_size)
    for response in adjoint(trajectory, target_gradient):
        by_weight = step_gradient(trajectory, response).double().cpu().numpy()
        np.add.at(gradients, trajectory.batches[response.index], by_weight)
    return gradients


@dataclass(frozen=True)
class Descent:
    """Where a descent stands after some rounds, for N pairs: all that the next round depends on."""

    votes: FloatArray  # (N,) rounds in which more weight lowered the target loss, less those in which it raised it
    total: FloatArray  # (N,) minus the sum of the rounds' gradients

    @staticmethod
    def begin(pool_size: int) -> "Descent":
        """Before the first round: all weights are one."""
        return Descent(np.zeros(pool_size), np.zeros(pool_size))

    @property
    def weights(self) -> FloatArray:
        """Weight of each pair in the loss of the next round's training (N,)."""
        return np.clip(1 + RATE * self.votes, MIN_WEIGHT, MAX_WEIGHT)

    @property
    def score(self) -> FloatArray:
        """Higher is more worth keeping (N,): the votes, and among equal votes the total, scaled to be below one half."""
        largest = np.abs(self.total).max(initial=0.0)
        return self.votes + 0.49 * self.total / (largest or 1.0)


def round_of(
    descent: Descent, trajectory: Trajectory, target_gradient: Callable[[Tensor], Tensor]
) -> Descent:
    """The descent after one more round: pure, so that a saved descent continues as if it had never stopped.

    The trajectory's weights are the descent's, looked up by row. `target_gradient` is that of the target loss at parameters
    (p,) -> (p,). A pair that is in no batch has no vote. Raises FloatingPointError as `adjoint` does.
    """
    gradient = weight_gradients(trajectory, target_gradient(trajectory.final), len(descent.votes))
    return Descent(descent.votes - np.sign(gradient), descent.total - gradient)
