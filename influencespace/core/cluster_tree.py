"""The tree above the clusters of a k-means: clusters are merged two by two, those first that cost the least inertia (Ward 1963).

Symbols: K clusters with n_k rows of mean m_k. Merging i and j adds n_i n_j / (n_i + n_j) |m_i - m_j|^2 to the inertia.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray

MAX_LEAVES = 8192
"""Above as many clusters there is no tree, and only the empty ones go: a forest of them would take half a gigabyte."""
EMPTY = 1e-9
"""Rows of a cluster that has none, so that the distance decides into which it goes."""


def tree_levels(
    count: FloatArray, mean: FloatArray, min_count: float, sizes: Sequence[int]
) -> list[IntArray]:
    """The cluster of each of K clusters (K,) on each level of the tree, from the top: numbered from 0, in the order of the first.

    The last level are the leaves: clusters of fewer than `min_count` rows, and empty ones, are merged into their nearest, the
    smallest first. The levels above have as many clusters as `sizes` says, where the leaves are more.
    """
    if len(count) > MAX_LEAVES:
        return [np.maximum(np.cumsum(count > 0) - 1, 0)]
    forest = _Forest(count, mean)
    while forest.size > 1 and (small := forest.smallest(min_count)) is not None:
        forest.merge(small)
    levels = [forest.labels()]
    for size in sorted({*sizes}, reverse=True):
        if size < forest.size:
            while forest.size > size:
                forest.merge(forest.cheapest())
            levels.append(forest.labels())
    return levels[::-1]


@dataclass
class _Forest:
    """Clusters that are merged: each lives on as the first of its members."""

    count: FloatArray
    mean: FloatArray

    def __post_init__(self) -> None:
        self.size = len(self.count)
        self.count = np.maximum(self.count.astype(np.float64), EMPTY)
        self.alive, self.member_of = np.ones(self.size, bool), np.arange(self.size)
        squares = np.square(self.mean).sum(1)
        gap = np.maximum(squares[:, None] + squares - 2 * self.mean @ self.mean.T, 0)
        self.cost = gap * (self.count * self.count[:, None] / (self.count + self.count[:, None]))
        np.fill_diagonal(self.cost, np.inf)
        self.nearest = self.cost.argmin(1)

    def smallest(self, min_count: float) -> int | None:
        """The smallest cluster of fewer rows than that."""
        size = np.where(self.alive, self.count, np.inf)
        k = int(size.argmin())
        return k if size[k] < min_count else None

    def cheapest(self) -> int:
        """The cluster that is the cheapest to merge."""
        return int(np.where(self.alive, self.cost[np.arange(len(self.cost)), self.nearest], np.inf).argmin())

    def merge(self, cluster: int) -> None:
        """Merge a cluster with its nearest; the costs follow from the costs before (Lance and Williams 1967)."""
        i, j = sorted((cluster, int(self.nearest[cluster])))
        n, ni, nj = self.count, self.count[i], self.count[j]
        costs = ((ni + n) * self.cost[i] + (nj + n) * self.cost[j] - n * self.cost[i, j]) / (ni + nj + n)
        self.count[i], self.alive[j] = ni + nj, False
        costs[~self.alive] = costs[i] = np.inf
        self.cost[i], self.cost[:, i], self.cost[j], self.cost[:, j] = costs, costs, np.inf, np.inf
        self.member_of[self.member_of == j] = i
        self.size -= 1
        stale = self.alive & ((self.nearest == i) | (self.nearest == j))
        stale[i] = True
        self.nearest[stale] = self.cost[stale].argmin(1)
        closer = self.alive & (costs < self.cost[np.arange(len(costs)), self.nearest])
        self.nearest[closer] = i

    def labels(self) -> IntArray:
        """The cluster of each of the first clusters (K,), numbered from 0."""
        numbered: IntArray = np.unique(self.member_of, return_inverse=True)[1].astype(np.int64)
        return numbered
