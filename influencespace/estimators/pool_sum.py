"""A pass over the pool that adds up a statistic of per-sample gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influencespace.estimators.problem import Batch
from influencespace.models.gradients import Gradients

Sums = tuple[int, Tensor]


@dataclass(frozen=True, kw_only=True)
class PoolSum:
    """Fold: number of pairs that can be judged, and the sum of a statistic over them; the others count in neither."""

    gradients: Gradients
    statistic: Callable[[Tensor], Tensor]
    """Sum over the rows of gradients (m, p)."""

    def zero(self) -> Sums:
        return 0, self.statistic(torch.zeros(0, self.gradients.space.size, dtype=torch.float64))

    def observe(self, state: Sums, batch: Batch) -> Sums:
        rows = self.gradients(batch.inputs, batch.image)
        rows = rows[torch.isfinite(rows).all(1)]
        return self.merge(state, (len(rows), self.statistic(rows)))

    def merge(self, left: Sums, right: Sums) -> Sums:
        return left[0] + right[0], left[1] + right[1]
