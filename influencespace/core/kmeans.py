"""Spherical k-means as a mergeable statistic: any partition of the rows, in any order, gives the same centroids.

Symbols: X (n, d) unit rows, C (K, d) unit centroids. A mini-batch step folds the `Assignment` statistic over chunks and
moves each centroid towards the mean of its rows with the rate 1 / (rows it ever got) (Sculley 2010).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from influencespace.core.arrays import IntArray


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Per centroid: rows, their sum, and the sum of their distances to it, all in float64 so that order hardly matters."""

    count: Tensor  # (K,)
    total: Tensor  # (K, d)
    distance: Tensor  # (K,) Euclidean

    def merge(self, other: "Assignment") -> "Assignment":
        return Assignment(
            count=self.count + other.count,
            total=self.total + other.total,
            distance=self.distance + other.distance,
        )


def nearest(X: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Index and cosine of each row's nearest centroid: (n,), (n,)."""
    cosine, index = (X @ C.T).max(1)
    return index, cosine


def assign(X: Tensor, C: Tensor) -> Assignment:
    """The statistic of some rows."""
    index, cosine = nearest(X, C)
    K, d = C.shape
    total = torch.zeros(K, d, dtype=torch.float64, device=X.device).index_add_(0, index, X.double())
    # for unit vectors |x - c|^2 = 2 - 2 cos
    gap = (2 - 2 * cosine.double()).clamp_min(0).sqrt()
    return Assignment(
        count=torch.bincount(index, minlength=K).double(),
        total=total,
        distance=torch.zeros(K, dtype=torch.float64, device=X.device).index_add_(0, index, gap),
    )


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


def step(C: Tensor, seen: Tensor, batch: Assignment, spare: Tensor) -> tuple[Tensor, Tensor]:
    """One mini-batch step: centroids (K, d) and rows ever seen (K,) -> both, updated.

    A centroid that has never had a row is re-seeded from `spare` (m, d), rows drawn for that.
    """
    seen = seen + batch.count
    moved = C.double() * (seen - batch.count)[:, None] + batch.total
    C = torch.where((seen > 0)[:, None], unit_rows(moved), C.double()).to(C.dtype)
    empty = (seen == 0).nonzero().flatten()
    for slot, k in enumerate(empty.tolist()):
        C[k] = spare[slot % len(spare)]
    return C, seen


def davies_bouldin(C: Tensor, statistic: Assignment, block: int = 1024) -> float:
    """DB = mean_i max_{j != i} (s_i + s_j) / |c_i - c_j| (Davies and Bouldin 1979); lower is better, blocked over K^2.

    Empty clusters are left out; nan for fewer than two.
    """
    used = statistic.count > 0
    C, s = C[used].double(), (statistic.distance[used] / statistic.count[used])
    if len(C) < 2:
        return float("nan")
    worst = C.new_zeros(len(C))
    for start in range(0, len(C), block):
        rows = slice(start, start + block)
        gap = torch.cdist(C[rows], C).clamp_min(1e-9)
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


def split_centroids(C: Tensor, X: Tensor, seed: int) -> tuple[Tensor, IntArray]:
    """Two children for each centroid, seeded from its own rows of the sample: (2K, d) at most and each child's parent.

    A centroid with fewer than two rows in the sample keeps one child, itself.
    """
    index, _ = nearest(X, C)
    children, parents = [], []
    for k in range(len(C)):
        rows = X[index == k]
        pair = seed_centroids(rows, 2, seed + k) if len(rows) >= 2 else C[k : k + 1]
        children.append(pair)
        parents += [k] * len(pair)
    return torch.cat(children), np.array(parents, np.int64)
