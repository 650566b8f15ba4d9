"""Results of a stage by bucket, a range of the canonical order: one file a bucket, then one Parquet file in that order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from influencespace.data.artifacts import MANIFEST, atomic_path, remove_here
from influencespace.data.mirror import here, is_file, is_stored, remove_objects

Columns = dict[str, NDArray[Any]]
ROW_GROUP = 16_384
"""Rows of a row group of a table: what a reader of few rows reads at least, whatever the buckets were."""
BUCKETS = "buckets"
"""Folder of the buckets of a stage at work."""
ComputeColumns = Callable[[int, int], Columns]
"""Gives the columns of the rows [start, stop)."""


def buckets_of(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of at most `size` rows that cover `rows`."""
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def bucket_path(folder: Path, name: str, start: int) -> Path:
    """Where a finished bucket lies; its presence means that it is done."""
    return folder / BUCKETS / f"{name}-{start:012d}.arrow"


@dataclass(frozen=True, kw_only=True)
class WriteBucket:
    """Task: compute and write one bucket, unless it is there; returns its rows."""

    folder: Path
    table: str
    start: int
    stop: int
    compute: ComputeColumns

    @property
    def name(self) -> str:
        return f"{self.table} of rows {self.start} to {self.stop}"

    def __call__(self) -> int:
        if not is_file(bucket_path(self.folder, self.table, self.start)):
            write_bucket(self.folder, self.table, self.start, self.compute(self.start, self.stop))
        return self.stop - self.start


def write_tasks(
    folder: Path, table: str, compute: ComputeColumns, spans: Iterable[tuple[int, int]]
) -> list[WriteBucket]:
    """The tasks that write the buckets of some spans."""
    return [WriteBucket(folder=folder, table=table, start=a, stop=b, compute=compute) for a, b in spans]


def write_bucket(folder: Path, name: str, start: int, columns: Columns) -> None:
    """Write one bucket's columns, (n,) or (n, k) each, atomically."""
    table = pa.table({key: _to_arrow(value) for key, value in columns.items()})
    with (
        atomic_path(bucket_path(folder, name, start)) as aside,
        pa.OSFile(str(aside), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def open_bucket(folder: Path, name: str, start: int) -> pa.Table:
    """One finished bucket, by memory map."""
    with pa.memory_map(str(here(bucket_path(folder, name, start)))) as source:
        return pa.ipc.open_file(source).read_all()


def read_bucket(folder: Path, name: str, start: int, *names: str) -> Columns:
    """Columns of one finished bucket."""
    table = open_bucket(folder, name, start)
    return {key: _from_arrow(table[key]) for key in names}


def read_range(table: pa.Table, start: int, stop: int) -> Columns:
    """All columns of the rows [start, stop) of an open bucket."""
    return {key: _from_arrow(table[key].slice(start, stop - start)) for key in table.column_names}


def join_buckets(folder: Path, name: str, starts: Sequence[int]) -> int:
    """Write `name`.parquet from the buckets that begin at `starts`, in that order; the rows.

    The buckets stay, so that a task which is begun again, its worker lost, finds them.
    """
    rows = 0
    with atomic_path(folder / f"{name}.parquet") as aside:
        writer = None
        for table in _row_groups(open_bucket(folder, name, start) for start in starts):
            writer = writer or pq.ParquetWriter(aside, table.schema)
            writer.write_table(table)
            rows += len(table)
        assert writer is not None, f"{name} has no buckets"
        writer.close()
    return rows


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of some tables anew, ROW_GROUP of them in each but the last."""
    waiting = None
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while len(waiting) > ROW_GROUP:
            yield waiting.slice(0, ROW_GROUP).combine_chunks()
            waiting = waiting.slice(ROW_GROUP)
    if waiting is not None:
        yield waiting.combine_chunks()


def remove_work(folder: Path) -> None:
    """Remove what only served the work on a finished artifact: buckets, whose columns are in whole files, and hidden files."""
    if is_stored(folder):
        remove_objects(folder, MANIFEST, lambda name: name.startswith((".", f"{BUCKETS}/")))
    for path in (folder / BUCKETS, *folder.glob(".*")):
        remove_here(path)


def read_columns(path: Path, *names: str) -> Columns:
    """Columns of a Parquet file as numpy arrays, lists of fixed size as (n, k); all when none is named."""
    table = pq.read_table(here(path), columns=list(names) or None)
    return {name: _from_arrow(table[name]) for name in table.column_names}


def read_rows(path: Path, rows: slice, *names: str) -> Columns:
    """Columns of a range of rows of a Parquet file: only the row groups that hold them are read."""
    with pq.ParquetFile(here(path)) as file:
        starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
        start, stop, _ = rows.indices(int(starts[-1]))
        groups = np.flatnonzero((starts[1:] > start) & (starts[:-1] < max(stop, start + 1)))
        table = file.read_row_groups(groups.tolist(), columns=list(names) or None)
    table = table.slice(start - int(starts[groups[0]]) if len(groups) else 0, max(0, stop - start))
    return {name: _from_arrow(table[name]) for name in table.column_names}


def table_rows(path: Path) -> int:
    """The rows of a Parquet file."""
    return int(pq.read_metadata(here(path)).num_rows)


def write_columns(path: Path, columns: Columns) -> None:
    """Write numpy columns, (n,) or (n, k), as a Parquet file, atomically."""
    with atomic_path(path) as aside:
        pq.write_table(pa.table({key: _to_arrow(value) for key, value in columns.items()}), aside)


def _to_arrow(values: NDArray[Any]) -> Any:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _from_arrow(column: Any) -> NDArray[Any]:
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies
    if pa.types.is_fixed_size_list(array.type):
        flat: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, array.type.list_size)
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values
