"""EL2N for contrastive models: the length of a pair's error vectors against negative batches (Paul et al. 2021).

error(z) = sqrt(|P_z - e_z|^2 + |Q_z - e_z|^2), P the softmax of z's image over its own text and those of a negative batch, Q that
of its text over images, averaged over the batches without the pair's image. For a pointwise loss it is the length of its
derivative by the predictions, |p - y| for cross-entropy. The paper keeps the pairs of *high* error, as
it prunes easy pairs of clean data. Wrong captions have high error too, and here these are to be removed: the score
is -error, so higher is more worth keeping. `keep="hard"` is the paper's order.
"""

from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.contrastive import Pointwise, info_nce_only
from influencespace.errors import STRICT
from influencespace.estimators.checkpoints import without_path
from influencespace.estimators.problem import (
    Batch,
    Fit,
    FloatArray,
    Problem,
    immediately,
    mean_over_bank,
)
from influencespace.models.space import Space


def errors(u: Tensor, t: Tensor, batch_u: Tensor, batch_t: Tensor, scale: float, batch_size: int) -> Tensor:
    """Lengths of the error vectors against one negative batch: unit u, t (n, d), batch (M, d) -> (n,), each at most 2.

    Its M pairs stand for batch_size - 1: each for r equal ones, which share its probability.
    """
    r = (batch_size - 1) / batch_u.shape[0]
    own = scale * (u * t).sum(-1, keepdim=True)
    squared = torch.zeros_like(own[:, 0])
    for z, w in ((u, batch_t), (t, batch_u)):
        logits = torch.cat([own, scale * z @ w.T + float(np.log(r))], 1)
        P = logits.softmax(1)
        squared = squared + P[:, 1:].sum(1).square() + P[:, 1:].square().sum(1) / r
    return squared.sqrt()


@torch.no_grad()
def el2n(space: Space, problem: Problem, sign: float, batch: Batch) -> FloatArray:
    """Mean errors (n,) times sign; nan where no negative batch can judge the pair."""
    u, t = space.embed(batch.inputs)
    if isinstance(problem.objective, Pointwise):
        lengths: FloatArray = problem.objective.slopes(u, t).norm(dim=-1).double().cpu().numpy()
        return sign * lengths
    scale = info_nce_only(problem.objective, "el2n").scale
    bank = [space.embed(negatives.inputs) for negatives in problem.bank]
    values = torch.stack([errors(u, t, *negatives, scale, problem.batch_size) for negatives in bank], 1)
    return sign * mean_over_bank(values.double().cpu().numpy(), problem.bank, batch.image)


@options(frozen=True, kw_only=True, config=STRICT)
class El2n:
    """Needs neither the target nor a pass over the pool."""

    when: Literal["end", "early"] = "end"
    """`early`: at the first kept checkpoint, before wrong pairs are learned (the paper's ten epochs), if any was kept."""
    keep: Literal["easy", "hard"] = "easy"
    """`easy` finds wrong captions; `hard` is the paper's order, for pruning clean data."""

    def fit(self, problem: Problem) -> Fit:
        early = self.when == "early" and len(problem.checkpoints) > 0
        space = problem.checkpoints[0].load() if early else problem.space
        sign = -1.0 if self.keep == "easy" else 1.0
        return immediately(partial(el2n, space, without_path(problem), sign))
