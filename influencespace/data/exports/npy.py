"""DataComp's subset file: the sorted 128-bit uids of the kept pairs, each as two unsigned 64-bit numbers."""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import Manifest, atomic_path, file_digest
from influencespace.data.exports.folder import Advance, ignore, write_once
from influencespace.data.exports.selection import FinishedRun
from influencespace.data.uids import digest

UID = np.dtype("u8,u8")

MAP_SCHEMA = pa.schema([("uid", pa.string()), ("hash", pa.string())])


def export_npy(run: Path | str, out: Path | str, *, advance: Advance = ignore) -> Manifest:
    """Write `uids.npy`, an array (kept,) of dtype u8,u8 in lexicographic order, and `uids.parquet` beside it.

    The map says which 32 hex digits stand for which uid: see `hash_of`. All hashes are in memory at once,
    16 bytes a pair. Raises InputError as `export` does.
    """
    finished = FinishedRun.open(run)
    folder = Path(out)

    def write() -> dict[str, str]:
        parts = [np.zeros(0, UID)]
        with (
            atomic_path(folder / "uids.parquet") as aside,
            pq.ParquetWriter(aside, MAP_SCHEMA, compression="zstd") as writer,
        ):
            for uids in finished.kept_uids():
                hashes = [hash_of(uid) for uid in uids]
                parts.append(to_numbers(hashes))
                writer.write_table(pa.table([uids, hashes], schema=MAP_SCHEMA))
                advance(len(uids))
        numbers = np.concatenate(parts)
        numbers.sort()
        with atomic_path(folder / "uids.npy") as aside, aside.open("wb") as file:
            np.save(file, numbers)
        return {name: file_digest(folder / name) for name in ("uids.npy", "uids.parquet")}

    return write_once(finished, folder, "npy", {}, write, advance)


def hash_of(uid: str) -> str:
    """32 hex digits: the uid itself where it is that, as in DataComp, else its 128-bit BLAKE2b digest."""
    return uid.lower() if re.fullmatch("[0-9a-fA-F]{32}", uid) else digest(uid.encode()).hex()


def to_numbers(hashes: list[str]) -> npt.NDArray[np.void]:
    """Strings of 32 hex digits as an array of dtype u8,u8: the first and the last 16 digits."""
    return np.array([(int(name[:16], 16), int(name[16:], 16)) for name in hashes], UID)
