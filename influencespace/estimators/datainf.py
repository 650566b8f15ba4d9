"""DataInf: the inverse of a mean of rank-one matrices, taken as the mean of their inverses (Kwon et al. 2024, eq. 5).

With per-sample gradients g_li of block l (one of the proxy's parameter tensors) over n pairs, v_l the target gradient
and lam_l = 0.1 / (n d_l) sum_i |g_li|^2, the paper's influence of pair k is

    sum_l (1/lam_l) [ (1/n) sum_i (v_l . g_li)(g_li . g_lk) / (lam_l + |g_li|^2) - v_l . g_lk ],

of which more is *harmful*; the score here is its negative, so positive is a fall of the target loss. It is linear in
g_lk: two passes over the pool, one for lam_l and one for the direction that all pairs are scored along.

Gradients are projected for the sum over i and for lam_l alone. The last term, v_l . g_lk, is by far the largest, and a
projection would hide it in noise: target and pair are almost orthogonal, and an inner product of k numbers has an error of
1 / sqrt(k) of the lengths (tests/estimators/test_datainf.py). It needs no gradient, so it is taken whole.
"""

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.errors import STRICT
from influencespace.estimators.ecif import along
from influencespace.estimators.pool_sum import PoolSum
from influencespace.estimators.problem import Fit, Problem, per_sample_gradients
from influencespace.models.projected import reduced_space


def squared_norms(sizes: Sequence[int], rows: Tensor) -> Tensor:
    """First pass: sum of |g_l|^2 for each block (L,)."""
    return torch.stack([block.square().sum() for block in torch.split(rows, list(sizes), 1)])


def corrections(sizes: Sequence[int], target: Tensor, damping: Tensor, rows: Tensor) -> Tensor:
    """Second pass: sum_i g_li (v_l . g_li) / (lam_l + |g_li|^2) over all blocks (p,); target v (p,), damping lam (L,)."""
    blocks = zip(torch.split(rows, list(sizes), 1), torch.split(target, list(sizes)), damping)
    return torch.cat([((g @ v) / (lam + g.square().sum(1))) @ g for g, v, lam in blocks])


@options(frozen=True, kw_only=True, config=STRICT)
class DataInf:
    """Blocks are the proxy's parameter tensors, e.g. image head and text head."""

    dimension: int = Field(default=256, ge=1)
    """Numbers that a block's gradient is projected to, where it has more, in all but the product with the target's."""
    relative_damping: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """The paper's 0.1 in lam_l; d_l is the block's own size, as the projection keeps norms."""

    def fit(self, problem: Problem) -> Fit:
        reduced = reduced_space(problem.space, self.dimension, problem.seed)
        gradients = per_sample_gradients(problem, reduced.space)
        target = problem.gradient_at(reduced.space).detach().double().cpu()
        count, squares = yield PoolSum(gradients=gradients, statistic=partial(squared_norms, reduced.sizes))
        sizes = torch.tensor(reduced.original_sizes, dtype=torch.float64)
        damping = self.relative_damping * squares / (max(count, 1) * sizes)
        damping = damping.clamp_min(torch.finfo(torch.float64).tiny)  # a block without any gradient
        statistic = partial(corrections, reduced.sizes, target, damping)
        count, corrected = yield PoolSum(gradients=gradients, statistic=statistic)
        correction = corrected / max(count, 1) / damping.repeat_interleave(torch.tensor(reduced.sizes))
        main = problem.target_gradient.detach().double().cpu() / damping.repeat_interleave(sizes.long())
        # the score is linear in the gradient: one forward-mode pass, no per-sample gradient
        return along(problem, (main - reduced.transpose(correction)).to(problem.preconditioner))
