"""Batches of rows on disk: a training names every row of a pool at each pass, and is replayed forwards and backwards."""

from collections.abc import Callable, Iterable, Sequence
from tempfile import TemporaryFile
from typing import overload

import numpy as np

from influencespace.core.arrays import IntArray


class BatchFile(Sequence[IntArray]):
    """Batches of rows in a temporary file (TMPDIR), which goes with the object: in memory are 8 bytes a batch."""

    def __init__(self, batches: Iterable[IntArray]) -> None:
        edges = [0]
        with TemporaryFile(prefix="influencespace-") as file:
            for rows in batches:
                file.write(np.ascontiguousarray(rows, np.int64).tobytes())
                edges.append(edges[-1] + len(rows))
            file.flush()
            self._edges = np.array(edges, np.int64)
            self._rows: IntArray = (
                np.memmap(file, np.int64, "r", shape=(edges[-1],)) if edges[-1] else np.empty(0, np.int64)
            )

    def __reduce__(self) -> tuple[Callable[..., "BatchFile"], tuple[list[IntArray]]]:
        return BatchFile, (list(self),)

    def __len__(self) -> int:
        return len(self._edges) - 1

    @overload
    def __getitem__(self, index: int) -> IntArray: ...
    @overload
    def __getitem__(self, index: slice) -> list[IntArray]: ...
    def __getitem__(self, index: int | slice) -> IntArray | list[IntArray]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # raises IndexError
        return np.array(self._rows[self._edges[place] : self._edges[place + 1]])
