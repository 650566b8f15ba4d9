"""The kept pairs of a finished run: streamed in canonical order, or looked up in the order of their pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import file_digest, read_manifest
from influencespace.data.bucket_files import PAIRS_SCHEMA
from influencespace.data.buckets import buckets_of
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.mirror import here, is_file, is_folder
from influencespace.data.schema import PLACE
from influencespace.errors import InputError

Rows = npt.NDArray[np.int64]

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
    """Kept pairs in an Arrow file, numbered in the order in which their pictures lie on disk."""

    def __init__(self, file: Any, starts: Rows, order: Rows) -> None:
        self._file = file
        self._starts = starts  # row at which each record batch begins
        self._order = order  # row of each pair

    def __len__(self) -> int:
        return len(self._order)

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """The pairs [start, stop) as mappings of SELECTED_SCHEMA."""
        rows = self._order[start:stop]
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        by_row: dict[int, dict[str, Any]] = {}
        # Batch by batch: `take` of a whole table would copy all its strings into memory.
        for batch in np.unique(batches):
            mine = rows[batches == batch]
            taken = self._file.get_batch(int(batch)).take(pa.array(mine - self._starts[batch]))
            by_row |= zip(mine.tolist(), taken.to_pylist())
        return [by_row[row] for row in rows.tolist()]


@contextmanager
def select(run: FinishedRun, scratch: Path) -> Iterator[Selection]:
    """The kept pairs of `run` by the order of their pictures; `scratch` is a file that exists meanwhile.

    Sources are then read front to back, and each once. Row numbers and places of all kept pairs are in memory, 40 bytes each.
    """
    try:
        starts, order = _write(run, scratch)
        with pa.memory_map(str(scratch)) as source:
            yield Selection(pa.ipc.open_file(source), starts, order)
    finally:
        scratch.unlink(missing_ok=True)


def _write(run: FinishedRun, scratch: Path) -> tuple[Rows, Rows]:
    """First row of each record batch written to `scratch`, and the rows in the order of their pictures."""
    places, starts, paths = [], [0], dict[str, int]()
    with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, SELECTED_SCHEMA) as file:
        for batch in run.kept_pairs():
            if len(batch):
                file.write_batch(batch)
                numbers = [paths.setdefault(path, len(paths)) for path in batch["image_path"].to_pylist()]
                places.append(np.array([numbers, *(batch[name].to_pylist() for name in PLACE[1:])], np.int64))
                starts.append(starts[-1] + len(batch))
    if not places:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    path, *more = np.concatenate(places, axis=1)
    rank = np.argsort(
        sorted(range(len(paths)), key=list(paths).__getitem__)
    )  # numbers in the order of the paths
    return np.array(starts[:-1], np.int64), np.lexsort([*more[::-1], rank[path]])
