"""Choosing sets, where the worth of a pair depends on the pairs chosen before: coverage and coresets.

Rows X (n, d) are of unit length, similarity is their cosine and distance is Euclidean. Orders list rows, the best
first, so that any size is a prefix. Ties go to the first row.
"""

import heapq

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray


def k_center(X: Tensor, size: int) -> IntArray:
    """Farthest first: each row is the one farthest from all before it (Gonzalez 1985; Sener and Savarese 2018): (size,).

    Begins at the row nearest to the mean. Covers every row within twice the smallest possible radius. Time n x size x d.
    """
    size = _checked(X, size)
    chosen = [int(torch.argmax(X @ X.mean(0)))]
    nearest = X @ X[chosen[0]]  # similarity to the nearest of the chosen
    for _ in range(size - 1):
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(torch.argmin(nearest)))
        nearest = torch.maximum(nearest, X @ X[chosen[-1]])
    return np.array(chosen)


def herding(X: Tensor, size: int) -> IntArray:
    """The mean of every prefix is near the mean of all rows (Welling 2009), each row at most once: (size,). Time n x size x d."""
    size = _checked(X, size)
    mean = X.mean(0)
    weight, left, chosen = mean.clone(), torch.zeros(len(X), dtype=X.dtype, device=X.device), []
    for _ in range(size):
        row = int(torch.argmax(X @ weight + left))
        chosen.append(row)
        left[row] = -torch.inf
        weight += mean - X[row]
    return np.array(chosen)


def diversity(X: Tensor, size: int) -> IntArray:
    """Facility location: greedily raise sum_i max_{j chosen} cos(i, j), lazily evaluated (Minoux 1978): (size,).

    At least 1 - 1/e of the best possible (Nemhauser et al. 1978). Time n^2 d at least: for tens of thousands of rows.
    """
    size = _checked(X, size)
    covered = torch.full((len(X),), -1.0, dtype=X.dtype, device=X.device)  # the minimum of a cosine

    def gain(row: int) -> float:
        return float((X @ X[row] - covered).clamp_min(0).sum())

    # sum_i cos(i, j) + 1 is the first gain of all rows at once
    first = (X @ X.sum(0) + len(X)).double().tolist()
    waiting = [(-value, row) for row, value in enumerate(first)]
    heapq.heapify(waiting)
    chosen: list[int] = []
    while len(chosen) < size:
        _, row = heapq.heappop(waiting)
        now = gain(row)  # gains only fall, so the first of the queue that is still first is the best
        if waiting and (-now, row) > waiting[0]:
            heapq.heappush(waiting, (-now, row))
            continue
        chosen.append(row)
        covered = torch.maximum(covered, X @ X[row])
    return np.array(chosen)


def d2(
    X: Tensor,
    score: FloatArray,
    size: int,
    neighbours: int = 10,
    forward: float | None = 1.0,
    reverse: float = 1.0,
) -> IntArray:
    """D2 pruning: worth (n,) passed along the graph of nearest rows, then rows of highest worth that are not alike: (size,).

    Each row first gathers its neighbours' scores by e^(-forward d^2); whatever is chosen then takes its score by
    e^(-reverse d^2) from its neighbours (Maharana et al. 2023, equations 3 and 4; their graph of distance d, one pass).
    `forward=None` gathers nothing, for scores that are means over like rows already. A score that is not finite is never
    gathered, and its row comes last. Time n^2 d for the graph and n x size for the choice.
    """
    size = _checked(X, size)
    near, distance = nearest_rows(X, min(neighbours, len(X) - 1))
    known = np.isfinite(score)
    value = np.where(known, score, 0.0)
    worth = value.copy()
    if forward is not None:
        worth += (np.exp(-forward * distance**2) * value[near]).sum(1)
    worth[~known] = np.finfo(np.float64).min
    chosen = np.empty(size, np.int64)
    for i in range(size):
        row = chosen[i] = np.argmax(worth)
        spent, worth[row] = max(worth[row], 0.0), -np.inf
        worth[near[row]] -= np.exp(-reverse * distance[row] ** 2) * spent
    return chosen


def repeated(X: Tensor) -> FloatArray:
    """Of each row the largest cosine with a row that is further from the mean of all: (n,), -1 for the furthest one.

    SemDeDup removes rows above a threshold (Abbas et al. 2023, algorithm 1: of rows alike, the one that is furthest from the
    cluster's centroid stays). Time and memory n^2: for the rows of a cluster.
    """
    order = torch.argsort(X @ X.mean(0), stable=True)
    cosines = (X[order] @ X[order].T).tril(-1)
    above = torch.ones_like(cosines, dtype=torch.bool).triu()
    largest = torch.empty(len(X), dtype=X.dtype, device=X.device)
    largest[order] = cosines.masked_fill(above, -1.0).amax(1)
    numbers: FloatArray = largest.double().cpu().numpy()
    return numbers


def nearest_rows(X: Tensor, count: int) -> tuple[IntArray, FloatArray]:
    """Each row's nearest others and their Euclidean distances, by exact search in time n^2 d: (n, count), (n, count)."""
    import faiss

    rows = np.ascontiguousarray(X.cpu().numpy(), np.float32)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    cosine, nearest = index.search(rows, count + 1)
    # a row is its own nearest, but among exact copies not always the first
    own = nearest == np.arange(len(rows))[:, None]
    own[~own.any(1), -1] = True
    shape = len(rows), count
    return nearest[~own].reshape(shape), np.sqrt(np.maximum(2 - 2 * cosine[~own], 0)).reshape(shape).astype(
        float
    )


def _checked(X: Tensor, size: int) -> int:
    if not 1 <= size <= len(X):
        raise ValueError(f"{size} of {len(X)} rows cannot be chosen; ask for 1 to {len(X)}")
    if not bool(torch.isfinite(X).all()):
        raise ValueError("rows to choose from hold nan or infinity; leave those out before")
    return size
