"""Unrolled influence: what the removal of a pair from its batches does to the target loss, through all later steps.

The target loss at the end of the recorded training is differentiated backwards along the path (`models.trajectory`).

A batch's loss with weights w (B,) is that of the objective (`core.contrastive`): w_z = 1 is the batch, w_z = 0 the batch
without z.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass as options
from torch import Tensor
from torch.func import grad, vmap

from influencespace.core.contrastive import Objective
from influencespace.core.contrastive_influence import removal
from influencespace.errors import STRICT, InputError
from influencespace.estimators.problem import Batch, Fit, FloatArray, Problem, immediately
from influencespace.models.space import Inputs, Space
from influencespace.models.trajectory import Response, Trajectory, adjoint, space_at

Form = Literal["exact", "taylor", "whole"]
CHUNK = 64  # gradients in memory at once: 64 p numbers, and a few times that for a step of each


@torch.no_grad()
def removal_derivative(
    space: Space, inputs: Inputs, direction: Tensor, objective: Objective, form: Form = "exact"
) -> Tensor:
    """Change of the batch loss's slope along a direction (p,) when a pair leaves the batch: (B,), one for each pair.

    `exact`: D_direction [l(w_z = 0) - l(w_z = 1)], the whole removal. `taylor`: -d/dw_z D_direction l at w_z = 1.
    """
    return removal(objective, space.tangents(inputs, direction[None]), form)[0]


def gradients_without(space: Space, theta: Tensor, inputs: Inputs, objective: Objective) -> Iterator[Tensor]:
    """Gradient of the batch loss without each pair in turn, at theta, by a backward pass for each pair: (B, p) in chunks."""

    def loss(x: Tensor, w: Tensor) -> Tensor:
        u, t = space.embed_at(space.unflatten(x), inputs)
        return objective.weighted_loss(u, t, w)

    without = 1 - torch.eye(len(inputs[0]), dtype=theta.dtype, device=theta.device)
    for weights in torch.split(without, CHUNK):
        yield vmap(grad(loss), in_dims=(None, 0))(theta, weights)


def removal_through_step(trajectory: Trajectory, response: Response) -> Tensor:
    """Change of the target loss when step t is taken without each of its pairs in turn: (B,), exact in the step itself."""
    index, inputs = response.index, trajectory.inputs(trajectory.batches[response.index])
    as_it_was = trajectory.apply(response.state, response.gradient, index)
    changes = []
    for gradients in gradients_without(trajectory.space, response.state.theta, inputs, trajectory.objective):
        removed = trajectory.apply(response.state, gradients, index)
        theta, m, v = ((less - full) @ slope for slope, less, full in zip(response.ahead, removed, as_it_was))
        changes.append(theta + m + v)
    return torch.cat(changes)


def removals(trajectory: Trajectory, response: Response, form: Form) -> Tensor:
    """Predicted rise of the target loss when a pair leaves the batch of one step: (B,)."""
    if form == "whole":
        return removal_through_step(trajectory, response)
    space = space_at(trajectory.space, response.state.theta)
    inputs = trajectory.inputs(trajectory.batches[response.index])
    return removal_derivative(space, inputs, response.of_gradient, trajectory.objective, form)


def removal_scores(problem: Problem, trajectory: Trajectory, form: Form = "exact") -> FloatArray:
    """Predicted rise of the target loss when a pair is removed from all its batches: (N,), nan for a pair in none.

    Holds 9 bytes a pair of the pool: each step adds to any of them.
    """
    scores = np.zeros(problem.pool_size)
    trained = np.zeros(problem.pool_size, bool)
    target_gradient = problem.gradient_at(space_at(trajectory.space, trajectory.final))
    for response in adjoint(trajectory, target_gradient):
        rows = trajectory.batches[response.index]
        np.add.at(scores, rows, removals(trajectory, response, form).double().cpu().numpy())
        trained[rows] = True
    return np.where(trained, scores, np.nan)


@dataclass(frozen=True)
class RowScorer:
    """Looks up the score of a pool pair by its row."""

    by_row: FloatArray  # (N,)

    def __call__(self, batch: Batch) -> FloatArray:
        """Scores (n,). Raises InputError for rows that are not of the pool: only a trained pair has a path."""
        outside = batch.row[(batch.row < 0) | (batch.row >= len(self.by_row))]
        if len(outside):
            raise InputError(
                f"row {outside[0]} is not one of the pool's {len(self.by_row)}: unrolled influence exists only for "
                "pairs that the proxy was trained on; score others with ecif or tracin"
            )
        return self.by_row[batch.row]


@options(frozen=True, kw_only=True, config=STRICT)
class Unrolled:
    """Unrolled influence along the real path, with its real batches: positive = removing the pair raises the target loss.

    score_z = sum over the steps t whose batch holds z of dL/dg_t . (g_t of the batch without z - g_t), in units of the
    target loss. SGD: eta_t <lam_{t+1}, g_t - g_t without z> (algorithms.md, 3). Its truth is leave-one-out retraining on the
    same batches less the pair. Where a trainer fills the slot with another pair, compare with the mean score.
    First order in the parameters: with few pairs, high learning rates or many steps single removals are no longer small.
    """

    form: Form = "exact"
    """What is exact and what is first order in a removal. `exact`: the loss exact, the optimiser's step to first order.
    `whole`: both exact; equal for SGD, nearer to the truth for AdamW, whose first steps are almost signs
    (tests/estimators/test_unrolled.py), at one backward pass for each pair of each batch.
    `taylor`: the derivative in the pair's weight."""

    def fit(self, problem: Problem) -> Fit:
        """Runs the adjoint once, in the time of a few trainings. Raises InputError without a trajectory."""
        if problem.trajectory is None:
            raise InputError(
                "unrolled influence needs the proxy's trajectory (initial parameters and every batch) and the problem "
                "has none: record it in training, or use tracin, which needs checkpoints, or ecif, which needs neither"
            )
        return immediately(RowScorer(removal_scores(problem, problem.trajectory, self.form)))
