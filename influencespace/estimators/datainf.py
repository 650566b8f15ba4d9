"""DataInf: the inverse of a mean of rank-one matrices, taken as the mean of their inverses (Kwon et al. 2024, eq. 5).

With per-sample gradients g_li of block l (one of the proxy's parameter tensors) over n pairs, v_l the target gradient
and lam_l = 0.1 / (n d_l) sum_i |g_li|^2, the paper's influence of pair k is

    sum_l (1/lam_l) [ (1/n) sum_i (v_l . g_li)(g_li . g_lk) / (lam_l + |g_li|^2) - v_l . g_lk ],

of which more is *harmful*; the score here is its negative, so positive is a fall of the target loss. It is linear in
g_lk: two passes over the pool, one for lam_l and one for the direction that all pairs are scored along.

Gradients are projected for the sum over i and for lam_l alone. The last term, v_l . g_lk, is the larger by far, and a
projection would drown it: target and pair are all but orthogonal, and an inner product of k numbers errs by 1 / sqrt(k) of
the lengths (tests/estimators/test_datainf.py). It needs no gradient, so it is taken whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.estimators.ecif import along
from influencespace.estimators.problem import Batch, Fit, Problem, per_sample_gradients
from influencespace.models.gradients import Gradients
from influencespace.models.projected import reduced_space

Sums = tuple[int, Tensor]


def finite_rows(gradients: Gradients, batch: Batch) -> Tensor:
    """Gradients of a batch's pairs (m, p) that can be judged: the others count in no statistic."""
    rows = gradients(batch.inputs, batch.image)
    return rows[torch.isfinite(rows).all(1)]


def added(left: Sums, right: Sums) -> Sums:
    """The sums of two disjoint parts."""
    return left[0] + right[0], left[1] + right[1]


@dataclass(frozen=True, kw_only=True)
class SquaredNorms:
    """First pass: (number of pairs, sum of |g_l|^2 for each block (L,))."""

    gradients: Gradients
    sizes: Sequence[int]

    def zero(self) -> Sums:
        return 0, torch.zeros(len(self.sizes), dtype=torch.float64)

    def observe(self, state: Sums, batch: Batch) -> Sums:
        rows = finite_rows(self.gradients, batch)
        squares = [block.square().sum() for block in torch.split(rows, list(self.sizes), 1)]
        return added(state, (len(rows), torch.stack(squares)))

    def merge(self, left: Sums, right: Sums) -> Sums:
        return added(left, right)


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """Second pass: (number of pairs, sum_i g_li (v_l . g_li) / (lam_l + |g_li|^2) over all blocks (p,))."""

    gradients: Gradients
    sizes: Sequence[int]
    target: Tensor
    """v (p,)."""
    damping: Tensor
    """lam (L,)."""

    def zero(self) -> Sums:
        return 0, torch.zeros(sum(self.sizes), dtype=torch.float64)

    def observe(self, state: Sums, batch: Batch) -> Sums:
        rows = finite_rows(self.gradients, batch)
        sizes = list(self.sizes)
        parts = [
            ((g @ v) / (lam + g.square().sum(1))) @ g
            for g, v, lam in zip(torch.split(rows, sizes, 1), torch.split(self.target, sizes), self.damping)
        ]
        return added(state, (len(rows), torch.cat(parts)))

    def merge(self, left: Sums, right: Sums) -> Sums:
        return added(left, right)


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
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
        norms = SquaredNorms(gradients=gradients, sizes=reduced.sizes)
        count, squares = yield norms
        sizes = torch.tensor(reduced.original_sizes, dtype=torch.float64)
        damping = self.relative_damping * squares / (max(count, 1) * sizes)
        damping = damping.clamp_min(torch.finfo(torch.float64).tiny)  # a block without any gradient
        state: Any = yield Corrections(
            gradients=gradients, sizes=reduced.sizes, target=target, damping=damping
        )
        correction = state[1] / max(state[0], 1) / damping.repeat_interleave(torch.tensor(reduced.sizes))
        main = problem.target_gradient.detach().double().cpu() / damping.repeat_interleave(sizes.long())
        # the score is linear in the gradient: one forward-mode pass, no per-sample gradient
        return along(problem, (main - reduced.transpose(correction)).to(problem.preconditioner))
