"""Results of a stage by block of the canonical order: one file a block, then one Parquet file in that order."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from influencespace.data.artifacts import atomic_path

Columns = dict[str, NDArray[Any]]


def buckets_of(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of at most `size` rows that cover `rows`."""
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def bucket_path(folder: Path, name: str, start: int) -> Path:
    return folder / "blocks" / f"{name}-{start:012d}.arrow"


def write_bucket(folder: Path, name: str, start: int, mark: str, columns: Columns) -> None:
    """Write one block's columns, (n,) or (n, k) each, atomically; `mark` says what they were computed from."""
    table = pa.table({key: _to_arrow(value) for key, value in columns.items()}).replace_schema_metadata(
        {"mark": mark}
    )
    with (
        atomic_path(bucket_path(folder, name, start)) as aside,
        pa.OSFile(str(aside), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def has_bucket(folder: Path, name: str, start: int, mark: str) -> bool:
    """Whether the block is there already, computed from the same."""
    try:
        with pa.OSFile(str(bucket_path(folder, name, start)), "rb") as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return bool(metadata.get(b"mark") == mark.encode())


def read_bucket(folder: Path, name: str, start: int, *names: str) -> Columns:
    """Columns of one finished block."""
    with pa.OSFile(str(bucket_path(folder, name, start)), "rb") as file:
        table = pa.ipc.open_file(file).read_all()
    return {key: _from_arrow(table[key]) for key in names}


def join_buckets(folder: Path, name: str, starts: Sequence[int]) -> int:
    """Write `name`.parquet from the blocks that begin at `starts`, in that order; the rows.

    The blocks stay, so that a task which is begun again, its worker lost, finds them.
    """
    rows = 0
    paths = [bucket_path(folder, name, start) for start in starts]
    with atomic_path(folder / f"{name}.parquet") as aside:
        writer = None
        for path in paths:
            with pa.OSFile(str(path), "rb") as file:
                table = pa.ipc.open_file(file).read_all().replace_schema_metadata(None)
            writer = writer or pq.ParquetWriter(aside, table.schema)
            writer.write_table(table)
            rows += len(table)
        assert writer is not None, f"{name} has no blocks"
        writer.close()
    return rows


def remove_buckets(folder: Path) -> None:
    """Remove all blocks, those too that a killed run with other settings left."""
    shutil.rmtree(folder / "blocks", ignore_errors=True)


def read_columns(path: Path, *names: str) -> Columns:
    """Columns of a Parquet file as numpy arrays, lists of fixed size as (n, k); all when none is named."""
    table = pq.read_table(path, columns=list(names) or None)
    return {name: _from_arrow(table[name]) for name in table.column_names}


def write_columns(path: Path, columns: Columns) -> None:
    """Write numpy columns, (n,) or (n, k), as a Parquet file, atomically."""
    with atomic_path(path) as aside:
        pq.write_table(pa.table({key: _to_arrow(value) for key, value in columns.items()}), aside)


def _to_arrow(values: NDArray[Any]) -> Any:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _from_arrow(column: Any) -> NDArray[Any]:
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        flat: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, array.type.list_size)
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values
