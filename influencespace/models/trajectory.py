"""The path that a proxy took in training, replayed step by step, and the adjoint that runs back along it.

Symbols: theta (p,) the parameters, m and v (p,) AdamW's moments, eta_t the learning rate of step t (annealed by a cosine,
as `train_heads` does), B_t its batch, g_t the gradient of the batch loss, L the target loss at the end of the path.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from influencespace.core.arrays import IntArray
from influencespace.core.contrastive import Objective
from influencespace.models.space import Inputs, Space
from influencespace.models.training import HeadsConfig, cosine_factor

Rule = Literal["adamw", "sgd"]

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim.AdamW's own, which `train_heads` uses


class State(NamedTuple):
    """All that the next step depends on, or the derivative of the target loss in it; plain SGD leaves m and v at zero."""

    theta: Tensor  # (p,)
    m: Tensor  # (p,)
    v: Tensor  # (p,)


@dataclass(frozen=True)
class Response:
    """The response of the final target loss to step `index`."""

    index: int
    state: State  # before the step
    gradient: Tensor  # (p,) g_t, by which the step was taken
    of_gradient: Tensor  # (p,) dL/dg_t
    ahead: State  # dL/d(state after the step)


def space_at(space: Space, theta: Tensor) -> Space:
    """The same proxy at other parameters (p,); shares the module, holds no second one."""
    copied = copy.copy(space)
    copied.parameters = space.unflatten(theta)
    return copied


def batch_loss(
    space: Space, theta: Tensor, inputs: Inputs, objective: Objective, weights: Tensor | None = None
) -> Tensor:
    """Mean loss of one batch at theta (p,), or its weighted loss with weights (B,): scalar."""
    u, t = space.embed_at(space.unflatten(theta), inputs)
    return objective.terms(u, t).mean() if weights is None else objective.weighted_loss(u, t, weights)


def loss_gradient(
    space: Space, theta: Tensor, inputs: Inputs, objective: Objective, weights: Tensor | None = None
) -> Tensor:
    """Gradient of the `batch_loss` at theta: (p,) -> (p,)."""
    gradient: Tensor = grad(lambda x: batch_loss(space, x, inputs, objective, weights))(theta)
    return gradient


def hessian_product(
    space: Space,
    theta: Tensor,
    inputs: Inputs,
    objective: Objective,
    x: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Hessian of the `batch_loss` at theta times x (p,) -> (p,): the whole Hessian, forward over reverse."""
    product: Tensor = jvp(lambda q: loss_gradient(space, q, inputs, objective, weights), (theta,), (x,))[1]
    return product


def step(state: State, gradient: Tensor, index: int, rate: float, weight_decay: float, rule: Rule) -> State:
    """One step of torch.optim's AdamW or plain SGD, `index` from 0: pure, coordinate by coordinate.

    Weight decay is decoupled; in plain SGD that equals torch's coupled form.
    """
    theta = state.theta * (1 - rate * weight_decay)
    if rule == "sgd":
        return State(theta - rate * gradient, state.m, state.v)
    m = BETA1 * state.m + (1 - BETA1) * gradient
    v = BETA2 * state.v + (1 - BETA2) * gradient**2
    m_hat = m / (1 - BETA1 ** (index + 1))
    return State(theta - rate * m_hat / preconditioner(v, index), m, v)


def preconditioner(v: Tensor, index: int) -> Tensor:
    """AdamW's D = sqrt(v_hat) + eps after step `index`: (p,) -> (p,). Its derivative is zero, not nan, where v is zero."""
    alive = v > 0
    v_hat = torch.where(alive, v, torch.ones_like(v)) / (1 - BETA2 ** (index + 1))
    return torch.where(alive, v_hat.sqrt(), torch.zeros_like(v)) + EPS


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What replays a proxy's training: where it began, what it saw, and how it stepped.

    Keeps about sqrt(T) states and replays those between: two more trainings' worth of time, sqrt(T) of memory.
    """

    space: Space
    """The proxy's modules and forward; its parameter values are not read."""
    initial: Tensor
    """Parameters before the first step (p,), a copy: training changes the heads in place."""
    config: HeadsConfig
    batches: Sequence[IntArray]
    """Rows of the pool in each step's batch, in their order."""
    inputs: Callable[[IntArray], Inputs]
    """Embeddings of some rows of the pool."""
    objective: Objective
    rule: Rule = "adamw"
    weights: Callable[[IntArray], Tensor] | None = None
    """Weights of some rows of the pool in the loss of their batch (B,) > 0; without, the loss is the mean."""

    def rate(self, index: int) -> float:
        """eta of step `index`."""
        return self.config.learning_rate * cosine_factor(index, self.config.steps)

    def gradient(self, state: State, index: int) -> Tensor:
        """g_t at a state (p,)."""
        inputs = self.inputs(self.batches[index])
        return loss_gradient(self.space, state.theta, inputs, self.objective, self.weights_of(index))

    def weights_of(self, index: int) -> Tensor | None:
        """Weights of the pairs of a step's batch in its loss (B,); None for a mean."""
        return None if self.weights is None else self.weights(self.batches[index])

    def after(self, state: State, index: int) -> State:
        """The state after step `index`."""
        return self.apply(state, self.gradient(state, index), index)

    def apply(self, state: State, gradient: Tensor, index: int) -> State:
        """The state after step `index`, taken by this gradient (p,)."""
        return step(state, gradient, index, self.rate(index), self.config.weight_decay, self.rule)

    @property
    def beginning(self) -> State:
        """The state before the first step."""
        return State(self.initial, torch.zeros_like(self.initial), torch.zeros_like(self.initial))

    @property
    def every(self) -> int:
        """Steps from one stored state to the next: sqrt(T), which takes the least memory."""
        return max(1, math.isqrt(len(self.batches)))

    @cached_property
    def stored(self) -> list[State]:
        """The states before steps 0, k, 2k, ... and last of all the one at the end, by replay."""
        state, kept = self.beginning, []
        for index in range(len(self.batches)):
            if index % self.every == 0:
                kept.append(state)
            state = self.after(state, index)
        return [*kept, state]

    @property
    def stored_steps(self) -> range:
        """After how many steps, within the path, states are stored."""
        return range(self.every, len(self.batches), self.every)

    def space_after(self, step: int) -> Space:
        """The proxy after one of the `stored_steps`."""
        return space_at(self.space, self.stored[step // self.every].theta)

    @property
    def final(self) -> Tensor:
        """Parameters at the end of training (p,)."""
        return self.stored[-1].theta

    def backwards(self) -> Iterator[tuple[int, State]]:
        """Each step from the last to the first with the state before it; at most 2 sqrt(T) states are held."""
        for block in reversed(range(len(self.stored) - 1)):
            first = block * self.every
            states = [self.stored[block]]
            for index in range(first, min(first + self.every, len(self.batches)) - 1):
                states.append(self.after(states[-1], index))
            for offset in reversed(range(len(states))):
                yield first + offset, states[offset]


def adjoint(trajectory: Trajectory, target_gradient: Tensor) -> Iterator[Response]:
    """The response of the final target loss to each step, from the last to the first.

    dL/dg_t is its response to a change of the gradient of step t, through all later steps. target_gradient (p,) is grad L at
    `trajectory.final`. SGD: dL/dg_t = -eta_t lam_{t+1} with lam_t = lam_{t+1} - eta_t H_t lam_{t+1} (reverse-mode
    differentiation of training: Maclaurin et al. 2015, arXiv 1502.03492; of a pair's influence: Bae et al. 2024, arXiv
    2405.12186). AdamW carries the derivative in theta, m and v, which is exact; with D fixed it diverges from retraining
    (tests/estimators/test_unrolled.py) and saves nothing. Raises FloatingPointError, naming the step, on overflow.
    """
    ahead = State(target_gradient, torch.zeros_like(target_gradient), torch.zeros_like(target_gradient))
    for index, state in trajectory.backwards():
        gradient = trajectory.gradient(state, index)
        pull = vjp(lambda state, gradient, t=index: trajectory.apply(state, gradient, t), state, gradient)[1]
        before, of_gradient = pull(ahead)  # through the optimiser alone, with g_t fixed
        yield Response(index, state, gradient, of_gradient, ahead)
        inputs = trajectory.inputs(trajectory.batches[index])
        weights = trajectory.weights_of(index)
        through_loss = hessian_product(
            trajectory.space, state.theta, inputs, trajectory.objective, of_gradient, weights
        )
        ahead = before._replace(theta=before.theta + through_loss)
        if not bool(torch.isfinite(ahead.theta).all()):
            raise FloatingPointError(
                f"the adjoint is not finite at step {index}: training is unstable along its path; lower learning_rate"
            )
