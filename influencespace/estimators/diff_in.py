"""Diff-In: the second-order part of a pair's influence along the training path, as published, with our sign.

Source: arXiv 2508.14648. Its I(z, V) = sum_t a_t <grad L_V(theta_t), H_B G_z + H_z G_B> with a_t = -t eta_t^2 / (N m)
is positive where a pair harms; the score is -I. G_z, H_z are gradient and Hessian of F_z, what the pair adds to its batch
in both roles (`core.contrastive.added_loss`); G_B, H_B those of the mean loss of a batch B; m is the number of checkpoints.
"""

from collections.abc import Callable

import numpy as np
import torch
from pydantic.dataclasses import dataclass as options
from torch import Tensor
from torch.func import jvp

from influencespace.core.contrastive import Pointwise, role_losses
from influencespace.errors import STRICT
from influencespace.estimators.checkpoints import CheckpointSum, require_checkpoints
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.problem import (
    Batch,
    Checkpoint,
    Fit,
    FloatArray,
    Problem,
    immediately,
    mean_of_known,
    mean_over_bank,
)
from influencespace.models.space import Inputs
from influencespace.models.trajectory import hessian_product, loss_gradient


def presence(problem: Problem, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """F_z in each negative batch, as a function of the parameters: (p,) -> (C, n).

    Its derivative along a direction is `InfluenceScorer.by_batch`: the mean negative loss of recorded pairs in the
    batches that are not theirs is subtracted.
    """
    space, objective, size = problem.space, problem.objective, problem.batch_size
    if isinstance(objective, Pointwise):
        return lambda theta: objective.terms(*space.embed_at(space.unflatten(theta), inputs))[None]

    def values(theta: Tensor) -> Tensor:
        parameters = space.unflatten(theta)
        pairs = space.embed_at(parameters, inputs)
        bank = [space.embed_at(parameters, batch.inputs) for batch in problem.bank]
        rows, of_others = [], []
        for k, batch in enumerate(bank):
            others = [pairs, *bank[:k], *bank[k + 1 :]]
            u, t = (torch.cat(side) for side in zip(*others))
            own, negative = role_losses(objective, u, t, *batch, size)
            rows.append((own + negative)[: len(pairs[0])])
            of_others.append(negative[len(pairs[0]) :].mean())
        return torch.stack(rows) - torch.stack(of_others).mean()

    return values


def bracket(
    values: Callable[[Tensor], Tensor], theta: Tensor, g: Tensor, G_B: Tensor, H_B_g: Tensor
) -> Tensor:
    """<g, H_B G_z + H_z G_B> of all z, the derivative along g of <G_B, G_z>: three forward-mode passes, (C, n).

    The first term is D_{H_B g} F_z, the second D_g D_{G_B} F_z with G_B held fixed.
    """
    through_batch: Tensor = jvp(values, (theta,), (H_B_g,))[1]
    through_pair: Tensor = jvp(lambda x: jvp(values, (x,), (G_B,))[1], (theta,), (g,))[1]
    return through_batch + through_pair


@torch.no_grad()
def interaction(then: Problem, negatives: NegativeBatch, batch: Batch) -> FloatArray:
    """<grad L_target, H_B G_z + H_z G_B> (n,) at the parameters of `then.space`, for the batch B = `negatives`."""
    space, g = then.space, then.target_gradient
    theta = space.flatten(space.parameters)
    G_B = loss_gradient(space, theta, negatives.inputs, then.objective)
    H_B_g = hessian_product(space, theta, negatives.inputs, then.objective, g)
    by_batch = bracket(presence(then, batch.inputs), theta, g, G_B, H_B_g).T.double().cpu().numpy()
    if isinstance(then.objective, Pointwise):
        return mean_of_known(by_batch)
    return mean_over_bank(by_batch, then.bank, batch.image)


def second_order(index: int, checkpoint: Checkpoint, then: Problem, batch: Batch) -> FloatArray:
    """The term of one checkpoint (n,), against a negative batch drawn by the problem's seed."""
    count = len(then.checkpoints)
    drawn = np.random.default_rng(then.seed).integers(len(then.bank), size=count)[index]
    weight = checkpoint.step * checkpoint.learning_rate**2 / ((then.trained_on or then.pool_size) * count)
    return weight * interaction(then, then.bank[drawn], batch)


@options(frozen=True, kw_only=True, config=STRICT)
class DiffIn:
    """score_z = sum_t t eta_t^2 / (N m) <grad L_target, H_B G_z + H_z G_B>(theta_t): the published formula, sign flipped.

    It leaves out the first-order term <grad L_target, G_z>, which is `tracin` and part of `unrolled`, and AdamW: confirm it by
    retraining before you trust it (tests/estimators/test_diff_in.py compares it with leave-one-out).
    B is a negative batch, drawn by the problem's seed for each checkpoint; Hessian products are exact, by forward
    over reverse, where the paper's code takes differences of gradients.
    """

    def fit(self, problem: Problem) -> Fit:
        """Raises InputError without checkpoints."""
        require_checkpoints(problem, "diff_in")
        return immediately(CheckpointSum(problem, second_order))
