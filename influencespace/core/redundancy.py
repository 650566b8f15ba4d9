"""Duplicate pairs: image and text are both (near) copies of those of another pair. Greedy leader clustering (Hartigan 1975).

Pairs are ordered by worth, the best first. Each joins the first leader that it is near to in both modalities, else it leads a
group itself. So every member is near its own leader; connected components would chain through gradual changes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import BoolArray, FloatArray, IntArray

ROUNDING = 1e-5  # of cosines in float32: equal rows have less than 1
FEW = 0.01  # of all captions that are compared


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
        close = texts[rows] @ texts[others].T >= text - ROUNDING
        if (pairs := close.nonzero()).shape[0] > FEW * close.numel():
            close &= images[rows] @ images[others].T >= image - ROUNDING
        elif len(pairs):  # few captions are alike: only their images are looked at
            i, j = pairs.cpu().numpy().T
            cosines = torch.cat(
                [(images[rows[a]] * images[others[b]]).sum(1) for a, b in _blocks(i, j, block)]
            )
            close[pairs[:, 0], pairs[:, 1]] = cosines >= image - ROUNDING
        return close.cpu().numpy()

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


def _blocks(i: IntArray, j: IntArray, size: int) -> Iterator[tuple[IntArray, IntArray]]:
    for start in range(0, len(i), size):
        yield i[start : start + size], j[start : start + size]


def _join(leader: IntArray, rows: IntArray, leading: IntArray, near: BoolArray) -> IntArray:
    """Give each row its first near leader, and return those that have none."""
    joins = near.any(1)
    if joins.any():
        leader[rows[joins]] = leading[near[joins].argmax(1)]
    return rows[~joins]


def joint_mean(values: FloatArray, leader: IntArray) -> FloatArray:
    """The mean of values (n,) over all rows with the same leader (n,), for each row: (n,)."""
    mean = np.bincount(leader, values) / np.maximum(np.bincount(leader), 1)
    return mean[leader]
