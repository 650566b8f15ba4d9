"""Spherical k-means as a mergeable statistic: any partition of the rows, in any order, gives the same centroids.

Symbols: X (n, d) unit rows, C (K, d) unit centroids. A step folds the `Assignment` of a mini-batch over ranges of rows and adds
it to what is remembered of earlier batches: a short memory first, whose noise leads out of poor places, a longer one at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from influencespace.core.arrays import IntArray

BLOCK = 1024
"""Rows whose products with all centroids are held at once."""
SHORT, LONG = 0.2, 0.8
"""The share of the memory that a step keeps, in the first three quarters of all steps and after."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Per centroid the rows that are nearest to it and their sum; of all rows the sum of squares. By float64."""

    count: Tensor  # (K,)
    total: Tensor  # (K, d)
    squares: Tensor  # ()

    @classmethod
    def nothing(cls, C: Tensor) -> "Assignment":
        """Of no rows."""
        count, total = C.new_zeros(len(C), dtype=torch.float64), torch.zeros_like(C, dtype=torch.float64)
        return cls(count=count, total=total, squares=count.new_zeros(()))

    def merge(self, other: "Assignment") -> "Assignment":
        return Assignment(
            count=self.count + other.count,
            total=self.total + other.total,
            squares=self.squares + other.squares,
        )

    def faded(self, share: float) -> "Assignment":
        """So much of it."""
        return Assignment(count=share * self.count, total=share * self.total, squares=share * self.squares)

    def means(self, otherwise: Tensor) -> Tensor:
        """The mean of each centroid's rows (K, d); of a centroid without rows its row of `otherwise`."""
        mean = self.total / self.count.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        return torch.where((self.count > 0)[:, None], mean, otherwise.double())

    def cpu(self) -> "Assignment":
        """In the memory of the CPU."""
        return Assignment(count=self.count.cpu(), total=self.total.cpu(), squares=self.squares.cpu())

    @property
    def inertia(self) -> float:
        """The sum of squared distances of all rows to the means of their clusters."""
        used = self.count > 0
        return float(self.squares - (self.total[used].square().sum(1) / self.count[used]).sum())


def nearest(X: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Index and cosine of each row's nearest centroid: (n,), (n,).

    On a CPU by the matrix product of numpy, which is as quick as FAISS and a sixth quicker than torch's (8,192 x 1,024 rows,
    1,000 centroids, one core of an EPYC).
    """
    found = [_products(rows, C).max(1) for rows in torch.split(X, BLOCK)] or [(X @ C.T).max(1)]
    return torch.cat([index for _, index in found]), torch.cat([cosine for cosine, _ in found])


def _products(X: Tensor, C: Tensor) -> Tensor:
    if X.device.type == "cpu":
        return torch.from_numpy(X.numpy() @ C.numpy().T)
    return X @ C.T


def assign(X: Tensor, C: Tensor) -> Assignment:
    """The statistic of some rows, on their device."""
    index, _ = nearest(X, C)
    total = torch.zeros_like(C, dtype=torch.float64)
    squares = total.new_zeros(())
    for rows, places in zip(torch.split(X, BLOCK), torch.split(index, BLOCK)):
        double = rows.double()
        total.index_add_(0, places, double)
        squares += double.square().sum()
    return Assignment(count=torch.bincount(index, minlength=len(C)).double(), total=total, squares=squares)


def unit_rows(X: Tensor) -> Tensor:
    """Rows scaled to unit length; a zero row stays zero."""
    return torch.nn.functional.normalize(X, dim=-1)


def seed_centroids(X: Tensor, K: int, seed: int) -> Tensor:
    """Greedy k-means++ on a sample of unit rows: X (n, d) -> (K, d) (Arthur and Vassilvitskii 2007).

    Of 2 + log K candidates for each centroid, drawn by their squared distance, the one that lowers the sum of squared distances
    most. Raises ValueError when the sample has fewer than K rows.
    """
    if len(X) < K:
        raise ValueError(f"{K} clusters were asked for, but there are only {len(X)} pairs to seed them from")
    _, rows = kmeans_plusplus(X.cpu().numpy(), K, random_state=seed % 2**32)
    return X[torch.from_numpy(rows).to(X.device)]


def step(C: Tensor, memory: Assignment, batch: Assignment, done: float) -> tuple[Tensor, Assignment]:
    """One mini-batch step: centroids (K, d) and what is remembered -> both anew; `done` is the share of all steps before it.

    A centroid that nothing is remembered of stays.
    """
    memory = memory.faded(SHORT if done < 0.75 else LONG).merge(batch)
    C = torch.where((memory.count > 0)[:, None], unit_rows(memory.total), C.double()).to(C.dtype)
    return C, memory


def balance(
    C: Tensor, memory: Assignment, count: Tensor, X: Tensor, shares: tuple[float, float], seed: int
) -> tuple[Tensor, Assignment]:
    """Split oversize clusters in two, by rows X (m, d) of theirs: centroids (K', d) and what is remembered, both anew.

    `count` (K,) are the rows of each cluster lately. One with less than the first of two shares of all rows, or none, gives its
    centroid to a half of the largest. One with more than the second share is split even where none is given, and K' > K. A
    changed centroid remembers nothing. A cluster of fewer than two distinct rows of X is not split.
    """
    C, own, same = C.clone(), nearest(X, C)[0], torch.ones(len(C), dtype=torch.bool)
    fewest, most = (share * float(count.sum()) for share in shares)
    small = (count < fewest) | (count == 0)
    free: list[int] = small.nonzero().flatten().tolist()
    added: list[Tensor] = []
    for k in torch.argsort(count, descending=True, stable=True).tolist():
        size = float(count[k])
        if small[k] or not (size > most or (free and size >= 2 * fewest)):
            break
        rows = X[own == k]
        pair = seed_centroids(rows, 2, seed + k) if len(rows) > 1 else rows
        if len(pair) < 2 or bool((pair[0] == pair[1]).all()):
            continue
        C[k], same[k] = pair[0], False
        if free:
            place = free.pop(0)
            C[place], same[place] = pair[1], False
        else:
            added.append(pair[1:])
    more = torch.cat([C[:0], *added])
    new = Assignment.nothing(more)
    kept = Assignment(
        count=torch.cat([memory.count * same, new.count]),
        total=torch.cat([memory.total * same[:, None], new.total]),
        squares=memory.squares,
    )
    return torch.cat([C, more]), kept


def davies_bouldin(statistic: Assignment, block: int = 1024) -> float:
    """DB = mean_i max_{j != i} (s_i + s_j) / |m_i - m_j| (Davies and Bouldin 1979); lower is better, blocked over K^2.

    m_i is the mean of the unit rows of cluster i, s_i the root of their mean squared distance to it. Empty clusters are left out;
    nan for fewer than two.
    """
    used = statistic.count > 0
    m = statistic.total[used] / statistic.count[used][:, None]
    s = (1 - m.square().sum(1)).clamp_min(0).sqrt()
    if len(m) < 2:
        return float("nan")
    worst = m.new_zeros(len(m))
    for start in range(0, len(m), block):
        rows = slice(start, start + block)
        gap = torch.cdist(m[rows], m).clamp_min(1e-9)
        ratio = (s[rows, None] + s[None, :]) / gap
        ratio.diagonal(start).zero_()
        worst[rows] = ratio.max(1).values
    return float(worst.mean())


def stable_level(indices: Sequence[float], tolerance: float) -> int:
    """The level of a tree to stop at, by the Davies-Bouldin indices of its levels: nan for a level without one.

    The first level whose index differs from the next by less than the share `tolerance` of itself; the level of the lowest
    index where there is none.
    """
    index = np.asarray(indices, np.float64)
    settled = np.abs(np.diff(index)) < tolerance * index[:-1]  # nan is not settled
    return int(settled.argmax() if settled.any() else np.nan_to_num(index, nan=np.inf).argmin())


def grouped(statistic: Assignment, group: IntArray) -> Assignment:
    """The statistic of groups of clusters: group (K,), numbered from 0."""
    index, size = torch.from_numpy(group), int(group.max(initial=-1)) + 1
    count = statistic.count.new_zeros(size).index_add_(0, index, statistic.count)
    total = statistic.total.new_zeros(size, statistic.total.shape[1]).index_add_(0, index, statistic.total)
    return Assignment(count=count, total=total, squares=statistic.squares)
