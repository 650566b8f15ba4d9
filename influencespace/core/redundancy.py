"""Duplicate pairs: image and text are both (near) copies of those of another pair. Greedy leader clustering (Hartigan 1975).

Pairs are ordered by worth, the best first. Each joins the first leader that it is near to in both modalities, else it leads a
group itself. So every member is near its own leader; connected components would chain through gradual changes.
"""

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import BoolArray, FloatArray, IntArray

ROUNDING = 1e-5  # of cosines in float32: equal rows have less than 1


def exact_leaders(image: IntArray, text: IntArray, worth: FloatArray) -> IntArray:
    """Of each pair the best by worth (n,) among all of the same image (n,) and text (n,), ties by order: rows (n,)."""
    order = np.lexsort((-worth, text, image))  # stable
    new = np.diff(image[order], prepend=-1) | np.diff(text[order], prepend=-1)
    first = new != 0
    leader = np.empty(len(order), np.int64)
    leader[order] = order[first][np.cumsum(first) - 1]
    return leader


def near_leaders(images: Tensor, texts: Tensor, image: float, text: float, block: int = 1024) -> IntArray:
    """The first leader whose image has a cosine of `image` or more and whose text one of `text`, or the row itself: (n,).

    Unit rows (n, Di), (n, Dt), the best first. Time n x groups, memory block x groups; no block changes the result.
    """

    def near(rows: IntArray, others: IntArray) -> BoolArray:
        pictures, captions = images[rows] @ images[others].T, texts[rows] @ texts[others].T
        return ((pictures >= image - ROUNDING) & (captions >= text - ROUNDING)).cpu().numpy()

    leader = np.arange(len(images))
    leading = np.empty(0, np.int64)
    for start in range(0, len(images), block):
        rows = np.arange(start, min(start + block, len(images)))
        rows = _join(leader, rows, leading, near(rows, leading))
        within = np.tril(near(rows, rows), -1)
        leads = np.ones(len(rows), bool)
        for i in np.flatnonzero(within.any(1)):  # one after another: who has joined leads nobody
            leads[i] = not (within[i] & leads).any()
        _join(leader, rows, rows[leads], within[:, leads])
        leading = np.concatenate([leading, rows[leads]])
    return leader


def _join(leader: IntArray, rows: IntArray, leading: IntArray, near: BoolArray) -> IntArray:
    """Give each row its first near leader, and return those that have none."""
    joins = near.any(1)
    if joins.any():
        leader[rows[joins]] = leading[near[joins].argmax(1)]
    return rows[~joins]


def halved(X: Tensor, max_rows: int) -> list[IntArray]:
    """Row sets of at most `max_rows` rows of X (n, d), halved again and again across their direction of greatest spread.

    Near rows mostly stay together (principal direction divisive partitioning, Boley 1998, cut at the median). The rows of a set
    keep their order.
    """
    waiting, small = [np.arange(len(X))], []
    while waiting:
        rows = waiting.pop()
        if len(rows) <= max_rows:
            small.append(rows)
            continue
        order = np.argsort(_along_greatest_spread(X[torch.from_numpy(rows).to(X.device)]), kind="stable")
        middle = len(rows) // 2
        waiting += [rows[np.sort(order[middle:])], rows[np.sort(order[:middle])]]
    return small


def _along_greatest_spread(X: Tensor) -> FloatArray:
    """Coordinate of each row along the first principal direction, by power iteration: (n,)."""
    X = X - X.mean(0)
    direction = X[X.norm(dim=1).argmax()]
    for _ in range(10):  # the cut needs no exact direction
        direction = X.T @ (X @ direction)
        direction = direction / direction.norm().clamp_min(torch.finfo(X.dtype).tiny)
    return (X @ direction).double().cpu().numpy()


def joint_mean(values: FloatArray, leader: IntArray) -> FloatArray:
    """The mean of values (n,) over all rows with the same leader (n,), for each row: (n,)."""
    mean = np.bincount(leader, values) / np.maximum(np.bincount(leader), 1)
    return mean[leader]
