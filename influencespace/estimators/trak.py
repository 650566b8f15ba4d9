"""TRAK for contrastive models: influence of a linearised margin, in random features (Park et al. 2023, section 5.1).

A pair's output is its margin against a negative batch, f_z = [m(image to text) + m(text to image)] / 2 with
m = S_zz - log(sum over the batch of e^S), so that its loss is softplus(-m) both ways and grad loss = -(1 - p) grad f.
With Phi the pool's projected gradients of f and K = (Phi^T Phi + ridge I)^-1, the score is

    score(z) = grad L_target . K . [-(1 - p_z) grad f_z].

The bracket is the gradient of z's own loss, p_z its mean probability of the right match, as the paper weights by Q = 1 - p;
grad L_target is the same sum over target pairs. Positive is a fall of the target loss. The published code leaves the
temperature out of the margin and holds the batch's embeddings constant; here the margin is the loss's own, and whole.
For a classifier f is the log odds of the right class, as in the paper's section 3.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.contrastive import (
    Normalisers,
    PairLogits,
    Pointwise,
    cross_entropy,
    info_nce_only,
    pair_logits,
)
from influencespace.errors import STRICT, InputError
from influencespace.estimators.pool_sum import PoolSum
from influencespace.estimators.problem import Batch, Fit, FloatArray, Problem, mean_over_bank
from influencespace.models.gradients import Gradients, PairGradients, SampleGradients
from influencespace.models.projected import reduced_space
from influencespace.models.space import Space


def margins(S: PairLogits, factor: float) -> Tensor:
    """Log odds of the right match of n pairs, image to text and text to image: (2, n).

    factor is r = (B-1)/M, the negatives that one pair of the negative batch stands for.
    """
    return S.own - torch.stack([S.image.logsumexp(1), S.text.logsumexp(1)]) - math.log(factor)


def mean_margin(S: PairLogits, normalisers: Normalisers, factor: float) -> Tensor:
    """f_z (n,), as a value for PairGradients."""
    return margins(S, factor).mean(0)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """A classifier's margin log p_y - log(1 - p_y): logits (n, K), one-hot labels (n, K) -> (n,) (the paper's eq. 7)."""
    right = (logits * labels).sum(-1)
    return right - torch.where(labels > 0, -torch.inf, logits).logsumexp(-1)


def gram(rows: Tensor) -> Tensor:
    """Phi^T Phi (k, k)."""
    return rows.T @ rows


@dataclass(frozen=True, kw_only=True)
class TrakScorer:
    """Scores along K grad L_target."""

    gradients: Gradients
    direction: Tensor

    @torch.no_grad()
    def __call__(self, batch: Batch) -> FloatArray:
        along: FloatArray = (self.gradients(batch.inputs, batch.image) @ self.direction).numpy()
        g = self.gradients
        weights = pair_weights(g, batch) if isinstance(g, PairGradients) else sample_weights(g, batch)
        return -weights * along


def pair_weights(gradients: PairGradients, batch: Batch) -> FloatArray:
    """1 - p_z, the mean over both ways and over the negative batches without the pair's image: (n,)."""
    g, scale = gradients, gradients.objective.scale
    u, t = g.space.embed(batch.inputs)
    values = []
    for negatives in g.bank:
        batch_u, batch_t = g.space.embed(negatives.inputs)
        odds = margins(pair_logits(u, t, batch_u, batch_t, scale), (g.batch_size - 1) / len(batch_u))
        values.append((-odds).sigmoid().mean(0).double().cpu().numpy())
    return mean_over_bank(np.stack(values, 1), g.bank, batch.image)


def sample_weights(gradients: SampleGradients, batch: Batch) -> FloatArray:
    """1 - p_z of a classifier: (n,)."""
    logits, labels = gradients.space.embed(batch.inputs)
    return (-log_odds(logits, labels)).sigmoid().double().cpu().numpy()


def margin_gradients(problem: Problem, space: Space) -> Gradients:
    """Per-sample gradients of the margin. Raises InputError for losses other than InfoNCE and cross-entropy."""
    objective = problem.objective
    if isinstance(objective, Pointwise):
        if objective.loss is not cross_entropy:
            raise InputError(
                "trak is for classifiers: its margin needs the cross-entropy among pointwise losses"
            )
        return SampleGradients(space=space, value=log_odds)
    return PairGradients(
        space=space,
        bank=problem.bank,
        objective=info_nce_only(objective, "trak"),
        batch_size=problem.batch_size,
        value=mean_margin,
        centred=False,
    )


@options(frozen=True, kw_only=True, config=STRICT)
class Trak:
    """One model in place of the paper's ensemble."""

    dimension: int = Field(default=1024, ge=1)
    """Numbers that each parameter tensor's gradient is projected to, where it has more: with few, target and pair, which are
    all but orthogonal, meet in the projection's noise. The kernel holds (dimension x tensors)^2 numbers."""
    relative_ridge: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Ridge over the kernel's mean diagonal. The paper has none, for pools far larger than the features; here it also keeps
    the sampling noise of the target gradient small, as the damping does in the other estimators."""

    def fit(self, problem: Problem) -> Fit:
        space = reduced_space(problem.space, self.dimension, problem.seed).space
        gradients = margin_gradients(problem, space)
        target = problem.gradient_at(space).detach().double().cpu()
        _, kernel = yield PoolSum(gradients=gradients, statistic=gram)
        ridge = max(self.relative_ridge * float(kernel.diagonal().mean()), torch.finfo(torch.float64).tiny)
        kernel = kernel + ridge * torch.eye(len(kernel), dtype=torch.float64)
        return TrakScorer(gradients=gradients, direction=torch.linalg.solve(kernel, target))
