"""DataComp's subset file: the sorted 128-bit uids of the kept pairs, each as two unsigned 64-bit numbers."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import File, Manifest, atomic_path
from influencespace.data.exports.folder import write_once
from influencespace.data.exports.selection import FinishedRun
from influencespace.data.integrity import describe
from influencespace.data.uids import digest

UID = np.dtype("u8,u8")

MAP_SCHEMA = pa.schema([("uid", pa.string()), ("hash", pa.string())])


def export_npy(run: FinishedRun, out: Path, advance: Callable[[int], None]) -> Manifest:
    """Write `uids.npy`, an array (kept,) of dtype u8,u8 in lexicographic order, and `uids.parquet` beside it.

    The map holds the 32 hex digits of each uid: see `hash_of`. All hashes are in memory at once, 16 bytes a pair.
    """

    def write(_: str) -> dict[str, File]:
        numbers = [np.zeros(0, UID)]
        with (
            atomic_path(out / "uids.parquet") as aside,
            pq.ParquetWriter(aside, MAP_SCHEMA, compression="zstd") as writer,
        ):
            for uids in run.kept_uids():
                hashes = [hash_of(uid) for uid in uids]
                numbers.append(to_numbers(hashes))
                writer.write_table(pa.table([uids, hashes], schema=MAP_SCHEMA))
                advance(len(uids))
        with atomic_path(out / "uids.npy") as aside, aside.open("wb") as file:
            np.save(file, np.sort(np.concatenate(numbers)))
        return {name: describe(out / name) for name in ("uids.npy", "uids.parquet")}

    return write_once(run, out, "npy", {}, write, advance)


def hash_of(uid: str) -> str:
    """32 hex digits: the uid itself where it is that, as in DataComp, else its 128-bit BLAKE2b digest."""
    return uid.lower() if re.fullmatch("[0-9a-fA-F]{32}", uid) else digest(uid.encode()).hex()


def to_numbers(hashes: list[str]) -> npt.NDArray[np.void]:
    """Strings of 32 hex digits as an array of dtype u8,u8: the first and the last 16 digits."""
    return np.array([(int(name[:16], 16), int(name[16:], 16)) for name in hashes], UID)
