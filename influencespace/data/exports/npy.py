"""DataComp's subset file: the sorted 128-bit uids of the kept pairs, each as two unsigned 64-bit numbers."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import File, Manifest, atomic_path
from influencespace.data.exports.folder import write_once
from influencespace.data.exports.selection import BATCH_ROWS, FinishedRun
from influencespace.data.integrity import describe
from influencespace.data.npy import write_npy
from influencespace.data.sorting import sorted_tables
from influencespace.data.uids import digest

UID = np.dtype("u8,u8")

MAP_SCHEMA = pa.schema([("uid", pa.string()), ("hash", pa.string())])


def export_npy(run: FinishedRun, out: Path, advance: Callable[[int], None]) -> Manifest:
    """Write `uids.npy`, an array (kept,) of dtype u8,u8 in lexicographic order, and `uids.parquet` beside it.

    The map holds the 32 hex digits of each uid: see `hash_of`. Numbers are sorted on disk.
    """

    def write(_: str) -> dict[str, File]:
        count = 0
        with atomic_path(out / "uids.parquet") as aside:
            with pq.ParquetWriter(aside, MAP_SCHEMA, compression="zstd") as writer:
                for uids in run.kept_uids():
                    writer.write_table(pa.table([uids, [hash_of(uid) for uid in uids]], schema=MAP_SCHEMA))
                    count += len(uids)
                    advance(len(uids))
            write_npy(out / "uids.npy", _sorted_numbers(aside), count, UID)
        return {name: describe(out / name) for name in ("uids.npy", "uids.parquet")}

    return write_once(run, out, "npy", {}, write, advance)


def _sorted_numbers(path: Path) -> Iterator[npt.NDArray[np.void]]:
    """The numbers of the map in their order: by the second one, then, equal ones as they came, by the first."""

    def tables() -> Iterator[pa.Table]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=["hash"]):
                numbers = to_numbers(batch["hash"].to_pylist())
                yield pa.table({name: np.ascontiguousarray(numbers[name]) for name in ("f0", "f1")})

    by_second = sorted_tables(tables(), "f1", BATCH_ROWS)
    for table in sorted_tables(by_second, "f0", BATCH_ROWS):
        part = np.empty(len(table), UID)
        for name in ("f0", "f1"):
            part[name] = table[name].to_numpy()
        yield part


def hash_of(uid: str) -> str:
    """32 hex digits: the uid itself where it is that, as in DataComp, else its 128-bit BLAKE2b digest."""
    return uid.lower() if re.fullmatch("[0-9a-fA-F]{32}", uid) else digest(uid.encode()).hex()


def to_numbers(hashes: list[str]) -> npt.NDArray[np.void]:
    """Strings of 32 hex digits as an array of dtype u8,u8: the first and the last 16 digits."""
    return np.array([(int(name[:16], 16), int(name[16:], 16)) for name in hashes], UID)
