"""M-FLYT: learns how to mix given scores of pairs into one, by the target loss one training step later.

In each step a batch is weighted by the softmax of its mixed scores, the proxy takes a step of the weighted loss, and the target
loss after it is differentiated by the mix, through the step (Shechter and Carmon 2025, arXiv 2503.08805). The weighted loss is
the objective's own, in which a pair's weight does not count in its own normalisers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.models.space import Inputs
from influencespace.models.trajectory import State, Trajectory, batch_loss, loss_gradient


@dataclass(frozen=True)
class MixStep:
    """One step of the training: its batch, the scores of its pairs, and the target batch that judges it."""

    index: int
    inputs: Inputs
    scores: Tensor  # (B, K)
    target: Inputs


def loss_ahead(mix: Tensor, trajectory: Trajectory, state: State, one: MixStep) -> tuple[Tensor, State]:
    """Mean loss of the target batch after a step from a state by the loss weighted by a mix (K,), and the state after it.

    Weights are B softmax(scores @ mix), of mean one.
    """
    space, objective = trajectory.space, trajectory.objective
    weights = len(one.scores) * (one.scores @ mix).softmax(0)
    gradient = loss_gradient(space, state.theta, one.inputs, objective, weights)
    after = trajectory.apply(state, gradient, one.index)
    return batch_loss(space, after.theta, one.target, objective), after


def learn_mix(
    trajectory: Trajectory,
    scores: Callable[[IntArray], FloatArray],
    target: Sequence[Inputs],
    *,
    rate: float = 0.05,
) -> FloatArray:
    """The mix (K,) of standardised scores of the pool's pairs, by their rows (B,) -> (B, K): `scores @ mix` is higher for a pair
    more worth keeping.

    Begins with equal weights; each step of the trajectory, whose own weights are not read, takes the next of the target's
    batches, in turn, and one step of Adam at `rate` on the mix. The proxy trains on, by the mix that there was before. Raises
    FloatingPointError, naming the step, when the mix is not finite.
    """
    state = trajectory.beginning
    mix = state.theta.new_zeros(scores(trajectory.batches[0]).shape[1])
    optimizer = torch.optim.Adam([mix], lr=rate)
    for index, rows in enumerate(trajectory.batches):
        of_batch = torch.from_numpy(scores(rows)).to(mix)
        one = MixStep(index, trajectory.inputs(rows), of_batch, target[index % len(target)])
        mix.grad, state = grad(loss_ahead, has_aux=True)(mix, trajectory, state, one)
        optimizer.step()
        if not bool(torch.isfinite(mix).all()):
            raise FloatingPointError(f"the mix is not finite at step {index}; lower rate")
    learnt: FloatArray = mix.double().cpu().numpy()
    return learnt
