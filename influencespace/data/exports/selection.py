"""The kept pairs of a finished run: streamed in canonical order, or looked up in the order of their pictures."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from influencespace.data.artifacts import file_digest, read_manifest
from influencespace.data.bucket_files import PAIRS_SCHEMA
from influencespace.data.buckets import buckets_of
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.mirror import here, is_file, is_folder
from influencespace.data.schema import PLACE
from influencespace.data.sorting import sorted_tables
from influencespace.errors import InputError

# Pairs in memory at a time; no pictures among them.
BATCH_ROWS = 65_536

PAIR = ("uid", "caption", *PLACE, "group")
DECISION = ("weight", "score")
SELECTED_SCHEMA = pa.schema(
    [*map(PAIRS_SCHEMA.field, PAIR), *(pa.field(name, pa.float32()) for name in DECISION)]
)


@dataclass(frozen=True)
class FinishedRun:
    """What of a run an export reads."""

    curated: Path
    pool: Path
    """The embedding artifact of the pool."""

    @classmethod
    def open(cls, folder: Path | str) -> "FinishedRun":
        """The run in `folder`; raises InputError when there is none, or it is not finished."""
        folder = Path(folder)
        if not is_folder(folder):
            raise InputError(
                f"{folder}: no such run folder. Is it mistyped? Give the folder that --out of the run named."
            )
        run = cls(folder / "curated.parquet", folder / "embed" / "pool")
        if not is_file(run.curated) or read_manifest(run.pool) is None:
            raise InputError(
                f"{folder} holds no finished run (no curated.parquet, or no finished embed/pool). "
                "Repeat the command that started it to finish it."
            )
        return run

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what is read."""
        pool = read_manifest(self.pool)
        assert pool is not None
        return {"curated": file_digest(self.curated), "pool": pool.content}

    def kept_uids(self) -> Iterator[list[str]]:
        """The uids of the kept pairs, in canonical order."""
        for batch in self._kept("uid", "kept"):
            yield batch["uid"].to_pylist()

    def kept_pairs(self) -> Iterator[Any]:
        """The kept pairs as record batches of SELECTED_SCHEMA, in canonical order.

        Both files are in that order, so one walk through both joins them. Raises InputError when
        curated.parquet keeps pairs that the pool does not have.
        """
        kept = (row for batch in self._kept("uid", *DECISION, "kept") for row in batch.to_pylist())
        row = next(kept, None)
        pool = EmbeddingTable.open(self.pool)
        for span in buckets_of(len(pool), BATCH_ROWS):
            batch = pool.rows(*span, *PAIR).combine_chunks()
            places, rows = [], []
            for place, uid in enumerate(batch["uid"].to_pylist()):
                if row is not None and row["uid"] == uid:
                    places.append(place)
                    rows.append(row)
                    row = next(kept, None)
            taken = batch.take(pa.array(places, pa.int64()))
            columns = {name: taken[name].combine_chunks() for name in PAIR}
            columns |= {name: pa.array([r[name] for r in rows], pa.float32()) for name in DECISION}
            yield pa.record_batch([columns[f.name].cast(f.type) for f in SELECTED_SCHEMA], SELECTED_SCHEMA)
        if row is not None:
            raise InputError(
                f"{self.curated} keeps {row['uid']!r}, which {self.pool} does not have in that place. "
                "They are not of one run: run it again."
            )

    def _kept(self, *columns: str) -> Iterator[Any]:
        try:
            file = pq.ParquetFile(here(self.curated))
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.curated} is damaged ({error}): remove it and run again") from None
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise InputError(f"{self.curated} has no column {', '.join(missing)}: was it written by a run?")
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            yield batch.filter(batch["kept"])


class Selection:
    """Kept pairs in an Arrow file, in the order in which their pictures lie on disk."""

    def __init__(self, file: Any, count: int) -> None:
        self._file = file  # in batches of BATCH_ROWS
        self._count = count

    def __len__(self) -> int:
        return self._count

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """The pairs [start, stop) as mappings of SELECTED_SCHEMA."""
        found: list[dict[str, Any]] = []
        for number in range(start // BATCH_ROWS, -(-stop // BATCH_ROWS)):
            before = number * BATCH_ROWS
            first = max(0, start - before)
            found += self._file.get_batch(number).slice(first, stop - before - first).to_pylist()
        return found


@contextmanager
def select(run: FinishedRun, scratch: Path) -> Iterator[Selection]:
    """The kept pairs of `run` by the order of their pictures; `scratch` is a file that exists meanwhile.

    Sources are then read front to back, and each once. Pairs are sorted on disk (TMPDIR); in memory are the names of the sources.
    """
    try:
        count = _write(run, scratch)
        with pa.memory_map(str(scratch)) as source:
            yield Selection(pa.ipc.open_file(source), count)
    finally:
        scratch.unlink(missing_ok=True)


def _write(run: FinishedRun, scratch: Path) -> int:
    """Write the kept pairs in the order of their pictures; how many they are."""
    order, count = PictureOrder.of(EmbeddingTable.open(run.pool)), 0
    numbered = (
        pa.table({name: batch[name] for name in SELECTED_SCHEMA.names} | {ORDER: order(batch)})
        for batch in run.kept_pairs()
    )
    with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, SELECTED_SCHEMA) as file:
        for table in sorted_tables(numbered, ORDER, BATCH_ROWS):
            file.write_table(table.drop_columns([ORDER]).combine_chunks())
            count += len(table)
    return count


ORDER = "order"


@dataclass(frozen=True)
class PictureOrder:
    """Numbers that rise as pictures lie on disk: file by file, in a file by the offset or the row."""

    rank: Mapping[str, int]
    """Of each file, by its name."""
    bits: int
    """Of a place within a file."""

    @classmethod
    def of(cls, pool: EmbeddingTable) -> "PictureOrder":
        paths, last = set[str](), 0
        for span in buckets_of(len(pool), BATCH_ROWS):
            pairs = pool.rows(*span, *PLACE)
            paths.update(pairs["image_path"].unique().to_pylist())
            last = max(last, int(_place(pairs).max(initial=0)))
        rank = {path: number for number, path in enumerate(sorted(paths))}
        bits = last.bit_length()
        assert bits + len(rank).bit_length() <= 64, f"{len(rank)} files of up to {last} bytes"
        return cls(rank, bits)

    def __call__(self, pairs: Any) -> npt.NDArray[np.uint64]:
        """Of some pairs (n,), by their columns PLACE."""
        files = [self.rank[path] for path in pairs["image_path"].to_pylist()]
        return np.array(files, np.uint64) << np.uint64(self.bits) | _place(pairs)


def _place(pairs: Any) -> npt.NDArray[np.uint64]:
    """Offset or row of each picture in its file (n,); 0 for one that has no place."""
    row, offset = (pc.fill_null(pairs[f"image_{name}"], -1) for name in ("row", "offset"))
    place = pc.max_element_wise(pc.if_else(pc.greater_equal(row, 0), row, offset), 0)
    return np.asarray(place.to_numpy(zero_copy_only=False), np.uint64)
