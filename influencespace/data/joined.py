"""Two sets of pairs as one, of which a proxy is trained on both."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influencespace.core.arrays import BoolArray, IntArray
from influencespace.data.buckets import Columns
from influencespace.data.pair_set import PairSet

Rows = slice | IntArray


class TrainingPairs(Protocol):
    """Pairs that a proxy is trained on."""

    def __len__(self) -> int: ...

    def read(self, rows: Rows, *names: str) -> Columns:
        """Columns of some of them (m,)."""

    def inputs(self, pairs: Rows, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and captions of some of them: two (m, D)."""


@dataclass(frozen=True)
class Joined:
    """The pairs of the second set lie evenly among those of the first: any range is a sample of both, as of one set in random
    order."""

    first: PairSet
    second: PairSet

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def places(self, rows: Rows) -> tuple[BoolArray, IntArray]:
        """Which of some rows are of the second set, and the row that each is of its own set: two (m,)."""
        row = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        before, after = (at * len(self.second) // len(self) for at in (row, row + 1))
        of_second: BoolArray = after > before
        return of_second, np.where(of_second, before, row - before)

    def read(self, rows: Rows, *names: str) -> Columns:
        of_second, own = self.places(rows)
        parts = [one.read(where, *names) for one, where in self._parts(of_second, own)]
        return {name: _woven(of_second, parts[0][name], parts[1][name]) for name in names}

    def inputs(self, pairs: Rows, device: str = "cpu") -> tuple[Tensor, Tensor]:
        of_second, own = self.places(pairs)
        parts = [one.inputs(where, device) for one, where in self._parts(of_second, own)]
        order = torch.from_numpy(np.argsort(np.argsort(of_second, kind="stable"))).to(device)
        images, texts = (torch.cat(both)[order] for both in zip(*parts, strict=True))
        return images, texts

    def _parts(self, of_second: BoolArray, own: IntArray) -> list[tuple[PairSet, Rows]]:
        return [(self.first, _range(own[~of_second])), (self.second, _range(own[of_second]))]


def _range(rows: IntArray) -> Rows:
    """Rows that follow each other as a slice, which is read in one piece."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _woven(
    of_second: BoolArray, first: NDArray[np.generic], second: NDArray[np.generic]
) -> NDArray[np.generic]:
    values = np.empty(len(of_second), np.result_type(first, second))
    values[~of_second], values[of_second] = first, second
    return values
