"""The problem of a model that was trained elsewhere: its towers are the proxy, and its optimiser is unknown."""

from collections.abc import Sequence

import torch
from torch import Tensor

from influencespace.core.contrastive import Contrastive
from influencespace.estimators.influence import Curvature, NegativeBatch
from influencespace.estimators.problem import Problem
from influencespace.models.space import Inputs, Space

RESPONSE_STEPS = 10.0
"""Steps of steepest descent for which the trainer's response stands: few, so that the curvature is trusted where it is large."""


def tower_problem(
    space: Space,
    *,
    objective: Contrastive,
    batch_size: int,
    pool_size: int,
    bank: Sequence[NegativeBatch],
    target: Sequence[NegativeBatch],
    memory: int | None = None,
    seed: int = 0,
) -> Problem:
    """Influence on the target of training a model a little further on pairs of the pool.

    As there is no optimiser's state, D = 1; the damping is that of early stopping (`steepest_descent_damping`) on the
    first negative batch.
    """
    D = torch.ones(space.size, dtype=space.like.dtype, device=space.like.device)
    return Problem(
        space=space,
        objective=objective,
        batch_size=batch_size,
        pool_size=pool_size,
        bank=bank,
        target=target,
        preconditioner=D,
        damping=steepest_descent_damping(space, bank[0].inputs, objective, D),
        memory=memory,
        seed=seed,
    )


def steepest_descent_damping(space: Space, batch: Inputs, objective: Contrastive, D: Tensor) -> float:
    """mu = 1 / sum of learning rates for `RESPONSE_STEPS` steps of steepest descent, each g.g / g.Gg long.

    g is the gradient of the batch's mean loss. 1 for a g that is zero or without curvature.
    """
    pairs = len(batch[0])
    weights = torch.full((1, pairs), 1 / pairs, dtype=space.like.dtype, device=space.like.device)
    g = space.loss_gradients(batch, weights, objective)
    products = Curvature(space=space, batches=[batch], objective=objective, preconditioner=D)
    curvature = float((g * products(g)).sum() / g.square().sum())
    return curvature / RESPONSE_STEPS if curvature > 0 else 1.0
