"""Cells: parts of a set of pairs within which near copies lie, of a bounded number of pairs whatever the size of the set.

A set is cut in two again and again across the direction in which its captions spread most (principal direction divisive
partitioning, Boley 1998). Near copies have captions that hardly differ, so few lie on both sides of a cut.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray

Read = Callable[[IntArray], tuple[Tensor, Tensor]]
"""Images and captions of some rows: two (m, D)."""
SAMPLE = 8192
"""Rows in memory at once; the first of a set say where it is cut."""
EQUAL = 1e-6  # coordinates that differ by less are those of equal rows
BAND = 0.4  # of the rows, at least, lie on either side of a cut, if rows that are equal allow it


def cells(rows: IntArray, read: Read, max_rows: int) -> Iterator[IntArray]:
    """Parts of the rows (n,), of at most `max_rows` rows each, in their order; together they are all rows.

    A set is cut by what its first rows look like: give them in random order. Time n log n.
    """
    if len(rows) <= max_rows:
        yield rows
        return
    sample = read(rows[:SAMPLE])
    tree = _fit(sample, max(2, round(max_rows * len(sample[0]) / len(rows))), count())
    blocks = (rows[start : start + SAMPLE] for start in range(0, len(rows), SAMPLE))
    cell = np.concatenate(
        [_cells_of(tree, sample if i == 0 else read(block)) for i, block in enumerate(blocks)]
    )
    parts = [rows[cell == number] for number in np.unique(cell)]
    if len(parts) == 1:  # rows that are all equal
        parts = np.array_split(rows, -(-len(rows) // max_rows))
    for part in parts:
        yield from cells(part, read, max_rows)


@dataclass(frozen=True)
class _Cut:
    """Where a set is cut: into rows below the first bound, those from the second one on, and those between them."""

    captions: bool
    """Whether it is cut by captions, else by images."""
    direction: Tensor
    bounds: FloatArray  # (2,), equal ones where nothing lies between
    parts: "tuple[_Cut | int, ...]"
    """What is made of each: another cut, or a cell's number."""

    def side(self, pairs: tuple[Tensor, Tensor]) -> IntArray:
        """0, 1 or 2 of each pair (n,)."""
        return np.searchsorted(self.bounds, _along(pairs[self.captions], self.direction), side="right")


def _fit(pairs: tuple[Tensor, Tensor], max_rows: int, numbers: Iterator[int]) -> "_Cut | int":
    """Cuts of pairs until no part has more than `max_rows` of them, unless they are equal."""
    if len(pairs[0]) <= max_rows:
        return next(numbers)
    for captions in (True, False):  # images only where captions are all equal
        direction = _greatest_spread(pairs[captions])
        bounds = _bounds(np.sort(_along(pairs[captions], direction)))
        if bounds is not None:
            side = _Cut(captions, direction, bounds, ()).side(pairs)
            parts = [_fit(_taken(pairs, side == number), max_rows, numbers) for number in range(3)]
            return _Cut(captions, direction, bounds, tuple(parts))
    return next(numbers)


def _bounds(sorted_coordinates: FloatArray) -> FloatArray | None:
    """The widest gap near the middle, or the two ends of what is equal there; None where all are equal."""
    x, n = sorted_coordinates, len(sorted_coordinates)
    gaps = np.diff(x)
    first, last = min(int(BAND * n), n // 2 - 1), max(int((1 - BAND) * n), n // 2)
    widest = first + int(gaps[first:last].argmax())
    if gaps[widest] > EQUAL:
        return np.full(2, (x[widest] + x[widest + 1]) / 2)
    if x[-1] - x[0] <= 2 * EQUAL:
        return None
    ends: FloatArray = x[n // 2] + np.array([-EQUAL, EQUAL])
    return ends


def _cells_of(tree: "_Cut | int", pairs: tuple[Tensor, Tensor]) -> IntArray:
    """The number of each pair's cell (n,)."""
    if isinstance(tree, int):
        return np.full(len(pairs[0]), tree)
    side = tree.side(pairs)
    cell = np.empty(len(side), np.int64)
    for number, part in enumerate(tree.parts):
        cell[side == number] = _cells_of(part, _taken(pairs, side == number))
    return cell


def _taken(
    pairs: tuple[Tensor, Tensor], which: "np.ndarray[tuple[int], np.dtype[np.bool_]]"
) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.flatnonzero(which)).to(pairs[0].device)
    return pairs[0][rows], pairs[1][rows]


def _along(X: Tensor, direction: Tensor) -> FloatArray:
    """Coordinate of each row (n,): in double precision, so that equal rows have equal ones."""
    coordinates: FloatArray = (X.double() @ direction).cpu().numpy()
    return coordinates


def _greatest_spread(X: Tensor) -> Tensor:
    """The first principal direction of rows (n, D), by power iteration: (D,) float64."""
    X = X - X.mean(0)
    direction = X[X.norm(dim=1).argmax()]
    for _ in range(10):  # the cut needs no exact direction
        direction = X.T @ (X @ direction)
        direction = direction / direction.norm().clamp_min(torch.finfo(X.dtype).tiny)
    return direction.double()
