"""Tables too large for memory, put in the order of one of their columns: sorted runs on disk, merged part by part."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from influencespace.core.arrays import IntArray
from influencespace.core.histogram import Keys, order_keys


def sorted_tables(tables: Iterable[pa.Table], by: str, size: int) -> Iterator[pa.Table]:
    """All rows of some tables in rising order of a column of numbers, nan last, equal values as they came; `size` rows a table.

    Holds one table of either kind. Meanwhile all rows lie in a temporary folder (TMPDIR), with 8 more bytes each.
    """
    with TemporaryDirectory(prefix="influencespace-") as folder:
        path = Path(folder) / "runs.arrow"
        edges = _write_runs(tables, by, path)
        if edges[-1] == 0:
            return
        keys: Keys = np.memmap(_keys_of(path), np.uint64, "r")
        with pa.memory_map(str(path)) as source:
            file, done = pa.ipc.open_file(source), edges[:-1]
            while left := int((edges[1:] - done).sum()):
                upto = merge_points(keys, done, edges[1:], min(size, left))
                runs = np.flatnonzero(upto > done)
                order = np.argsort(np.concatenate([keys[done[r] : upto[r]] for r in runs]), kind="stable")
                slices = [file.get_batch(int(r)).slice(done[r] - edges[r], upto[r] - done[r]) for r in runs]
                yield pa.Table.from_batches(slices).combine_chunks().take(pa.array(order))
                done = upto


def _write_runs(tables: Iterable[pa.Table], by: str, path: Path) -> IntArray:
    """Write each table, sorted, as a record batch of an Arrow file, and the keys beside it; where the runs begin, and the end."""
    edges, writer = [0], None
    with pa.OSFile(str(path), "wb") as sink, _keys_of(path).open("wb") as keys_file:
        for table in tables:
            if not len(table):
                continue
            keys = _keys_in(table[by].to_numpy())
            order = np.argsort(keys, kind="stable")
            (batch,) = table.take(pa.array(order)).combine_chunks().to_batches()
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
            keys_file.write(keys[order].tobytes())
            edges.append(edges[-1] + len(batch))
        if writer is not None:
            writer.close()
    return np.array(edges, np.int64)


def _keys_in(values: NDArray[Any]) -> Keys:
    """Integers in the order of a column's values (n,)."""
    return values if values.dtype == np.uint64 else order_keys(values)


def _keys_of(path: Path) -> Path:
    return path.with_suffix(".keys")


def merge_points(keys: Keys, starts: IntArray, stops: IntArray, count: int) -> IntArray:
    """Where runs [start, stop) of rising keys are cut so that the least `count` of all lie before, of equal ones the first.

    By bisection over the keys' bits: a run is looked up a few times, not read.
    """

    def places(key: int, side: str) -> IntArray:
        found = [
            a + np.searchsorted(keys[a:b], np.uint64(key), side)  # type: ignore[call-overload]
            for a, b in zip(starts, stops, strict=True)
        ]
        return np.array(found, np.int64)

    low, high = 0, 2**64 - 1  # between them is the greatest key of the least `count`
    while low < high:
        middle = (low + high) // 2
        if int((places(middle, "right") - starts).sum()) >= count:
            high = middle
        else:
            low = middle + 1
    below, upto = places(low, "left"), places(low, "right")
    equal = np.minimum(np.cumsum(upto - below), count - int((below - starts).sum()))
    return below + np.diff(equal, prepend=0)
