"""Group-by through files: rows exchanged by the hash of a key, whole groups computed on, and results put back in row order.

Three steps, each a list of tasks whose results are files (a task is done if and only if its file is there): every range of
rows is sorted into partitions; each partition, which holds whole groups, is computed on; every range gathers its results.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influencespace.core.arrays import IntArray
from influencespace.core.hashing import hashed
from influencespace.data.artifacts import remove
from influencespace.data.buckets import (
    Columns,
    ComputeColumns,
    bucket_path,
    buckets_of,
    join_buckets,
    open_bucket,
    read_range,
    write_tasks,
)
from influencespace.data.chunks import gathered
from influencespace.data.mirror import is_file

PARTITION_ROWS = 250_000
"""Rows of a partition, on average: what a task holds of thin columns at once, unless one group is larger."""
SEED = 15  # of the hash; another number than that of folds and samples
ROW, PARTITION = "row", "partition"

ReduceGroups = Callable[..., Columns]
"""Computes on whole groups: columns (m,) or (m, k) with the key and `row`, sorted by both, give columns of the same rows. Where
vectors are exchanged too, they are its second argument."""


@dataclass(frozen=True)
class Exchange:
    """What is exchanged: the rows [0, rows) in ranges of `size`, grouped by an integer column.

    A task holds one range or one partition: the larger of `partition_rows` rows, about, and of the largest group.
    """

    folder: Path
    name: str
    emit: ComputeColumns
    """Gives the columns of the rows [start, stop), one of them the key."""
    key: str
    reduce: ReduceGroups
    rows: int
    size: int
    partition_rows: int = PARTITION_ROWS
    vectors: ComputeColumns | None = None
    """Gives columns (n, k) of the same rows, which go with them: from where they lie, they would be read all over the pool for
    every partition."""

    @property
    def partitions(self) -> int:
        return -(-self.rows // self.partition_rows)

    @property
    def starts(self) -> list[int]:
        """Where the ranges begin."""
        return [start for start, _ in buckets_of(self.rows, self.size)]

    def steps(self) -> Iterator[tuple[Sequence[Callable[[], int]], int, str]]:
        """The tasks of each step, the sum of what they return and its unit; a step needs all files of the one before.

        None where the table is there. What only served the work is removed after the last one.
        """
        if is_file(self.folder / f"{self.name}.parquet"):
            return
        ranges = list(buckets_of(self.rows, self.size))
        partitions = [(p, p + 1) for p in range(self.partitions)]
        yield write_tasks(self.folder, self._sent, Partition(self), ranges), self.rows, "pairs"
        yield (
            write_tasks(self.folder, self._reduced, ReducePartition(self), partitions),
            len(partitions),
            "partitions",
        )
        yield write_tasks(self.folder, self.name, GatherRange(self), ranges), self.rows, "pairs"
        yield [partial(join_buckets, self.folder, self.name, self.starts)], self.rows, "pairs"
        for name, starts in (
            (self._sent, self.starts),
            (self._reduced, range(self.partitions)),
            (self.name, self.starts),
        ):
            for start in starts:
                remove(bucket_path(self.folder, name, start))

    @property
    def _sent(self) -> str:
        return f"{self.name}.sent"

    @property
    def _reduced(self) -> str:
        return f"{self.name}.reduced"


@dataclass(frozen=True)
class Vectors:
    """A column (m, k) of a partition whose rows stay in their files, read by memory map, until they are asked for."""

    parts: Sequence[NDArray[Any]]
    order: IntArray
    """The place of each row in the parts, one after another (m,)."""

    @cached_property
    def _starts(self) -> IntArray:
        return np.cumsum([0, *map(len, self.parts)])

    def __getitem__(self, rows: IntArray) -> NDArray[Any]:
        return gathered(self.parts, self._starts, self.order[rows])


@dataclass(frozen=True)
class Partition:
    """Columns: those of a range of rows with `row` and `partition`, sorted by partition."""

    exchange: Exchange

    def __call__(self, start: int, stop: int) -> Columns:
        exchange = self.exchange
        columns = exchange.emit(start, stop)
        if exchange.vectors is not None:
            columns |= exchange.vectors(start, stop)
        partition = hashed(columns[exchange.key], SEED) % np.uint64(exchange.partitions)
        columns |= {ROW: np.arange(start, stop), PARTITION: partition.astype(np.int32)}
        return _taken(columns, np.argsort(columns[PARTITION], kind="stable"))


@dataclass(frozen=True)
class ReducePartition:
    """Columns: what `reduce` gives for all groups of a partition, with `row`, sorted by row."""

    exchange: Exchange

    def __call__(self, start: int, stop: int) -> Columns:
        exchange = self.exchange
        slices = (_slice(exchange, exchange._sent, at, PARTITION, start, stop) for at in exchange.starts)
        parts = [part for part in slices if part]
        if not parts:
            return {ROW: np.empty(0, np.int64)}
        wide = [
            name for name, values in parts[0].items() if values.ndim == 2 and exchange.vectors is not None
        ]
        columns = _together([{name: part[name] for name in part if name not in wide} for part in parts])
        del columns[PARTITION]
        order = np.lexsort((columns[ROW], columns[exchange.key]))
        columns = _taken(columns, order)
        vectors = {name: Vectors([part[name] for part in parts], order) for name in wide}
        results = exchange.reduce(columns, *([vectors] if wide else [])) | {ROW: columns[ROW]}
        return _taken(results, np.argsort(results[ROW]))


@dataclass(frozen=True)
class GatherRange:
    """Columns: the results of a range of rows, in their order."""

    exchange: Exchange

    def __call__(self, start: int, stop: int) -> Columns:
        exchange = self.exchange
        parts = [
            _slice(exchange, exchange._reduced, at, ROW, start, stop) for at in range(exchange.partitions)
        ]
        columns = _together(parts)
        order = np.argsort(columns.pop(ROW))
        return _taken(columns, order)


def whole_groups(key: IntArray, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole groups of equal keys (n,), which are sorted: `most` rows at most, or one larger group."""
    ends = np.append(np.flatnonzero(np.diff(key)) + 1, len(key))
    start = 0
    while start < len(key):
        fits, first = np.searchsorted(ends, (start + most, start), side="right")
        stop = int(ends[max(fits - 1, first)])
        yield start, stop
        start = stop


def _slice(exchange: Exchange, table: str, at: int, by: str, start: int, stop: int) -> Columns:
    """The rows of a file that is sorted by a column where that is in [start, stop); nothing where there are none."""
    file = open_bucket(exchange.folder, table, at)
    if not len(file):
        return {}
    (keys,) = file[by].chunks  # by memory map: a search reads a few pages of it
    a, b = np.searchsorted(keys.to_numpy(), (start, stop))
    return read_range(file, int(a), int(b)) if b > a else {}


def _together(parts: list[Columns]) -> Columns:
    parts = [part for part in parts if part]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _taken(columns: Columns, rows: IntArray) -> Columns:
    return {name: values[rows] for name, values in columns.items()}
