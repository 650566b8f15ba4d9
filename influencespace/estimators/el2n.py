"""EL2N for contrastive models: the length of a pair's error vectors against the bank (Paul et al. 2021).

error(z) = sqrt(|P_z - e_z|^2 + |Q_z - e_z|^2), P the softmax of z's image over its own text and the context's, Q that of
its text over images, averaged over the contexts without the pair's image. Of a pointwise loss it is the length of its
derivative by the predictions, |p - y| for cross-entropy. The paper keeps the pairs of *high* error, as
it prunes easy pairs of clean data. Wrong captions have high error too, and here they are what is to be found: the score
is -error, so higher is more worth keeping. Ask for `keep="hard"` to have the paper's order.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.contrastive import Pointwise, info_nce_only
from influencespace.estimators.problem import (
    Batch,
    Fit,
    FloatArray,
    Problem,
    immediately,
    mean_of_known,
    where_strange,
)
from influencespace.models.space import Space


def errors(u: Tensor, t: Tensor, cu: Tensor, ct: Tensor, scale: float, batch_size: int) -> Tensor:
    """Lengths of the error vectors in one context: unit u, t (n, d), context (M, d) -> (n,), each at most 2.

    The context's M pairs stand for batch_size - 1: each for r alike, whose probabilities have a share each.
    """
    r = (batch_size - 1) / cu.shape[0]
    own = scale * (u * t).sum(-1, keepdim=True)
    squared = torch.zeros_like(own[:, 0])
    for z, w in ((u, ct), (t, cu)):
        logits = torch.cat([own, scale * z @ w.T + float(np.log(r))], 1)
        P = logits.softmax(1)
        squared = squared + P[:, 1:].sum(1).square() + P[:, 1:].square().sum(1) / r
    return squared.sqrt()


@torch.no_grad()
def el2n(space: Space, problem: Problem, sign: float, batch: Batch) -> FloatArray:
    """Mean errors (n,) times sign; nan where no context can judge the pair."""
    u, t = space.embed(batch.inputs)
    if isinstance(problem.objective, Pointwise):
        lengths: FloatArray = problem.objective.slopes(u, t).norm(dim=-1).double().cpu().numpy()
        return sign * lengths
    scale = info_nce_only(problem.objective, "el2n").scale
    contexts = [space.embed(context.inputs) for context in problem.bank]
    found = torch.stack([errors(u, t, *c, scale, problem.batch_size) for c in contexts], 1)
    return sign * mean_of_known(where_strange(found.double().cpu().numpy(), problem.bank, batch.image))


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class El2n:
    """Needs neither the target nor a pass over the pool."""

    when: Literal["end", "early"] = "end"
    """`early`: at the first kept checkpoint, before wrong pairs are learned (the paper's ten epochs), where there is one."""
    keep: Literal["easy", "hard"] = "easy"
    """`easy` finds wrong captions; `hard` is the paper's order, for pruning clean data."""

    def fit(self, problem: Problem) -> Fit:
        early = self.when == "early" and len(problem.checkpoints) > 0
        space = problem.checkpoints[0].load() if early else problem.space
        alone = replace(problem, checkpoints=(), trajectory=None)  # need not travel with the scorer
        return immediately(partial(el2n, space, alone, -1.0 if self.keep == "easy" else 1.0))
