"""The embedding artifact, opened: pairs in canonical order in buckets, thin columns as Parquet, embeddings by memory map."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from influencespace.data.artifacts import MANIFEST, Manifest, read_manifest
from influencespace.data.bucket_files import PAIRS_SCHEMA, bucket_folder
from influencespace.data.chunks import VECTORS, Floats, Halves, gathered, vectors_of
from influencespace.data.images import first_rows
from influencespace.data.mirror import here
from influencespace.errors import InputError

Rows = npt.NDArray[np.int64]
IMAGE, TEXT = 0, 1
"""Places in `VECTORS`."""


@dataclass(frozen=True)
class EmbeddingTable:
    """The pairs of a finished embedding artifact; cheap to open and to pickle: all is read when used."""

    folder: Path

    @classmethod
    def open(cls, folder: Path | str) -> "EmbeddingTable":
        """The artifact in `folder`; raises InputError when there is none, or it is not finished."""
        folder = Path(folder)
        if read_manifest(folder) is None:
            raise InputError(
                f"{folder} holds no finished embeddings (no readable {MANIFEST}). Has the embed stage ended?"
            )
        return cls(folder)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type["EmbeddingTable"], tuple[Path]]:
        return EmbeddingTable, (self.folder,)

    @cached_property
    def manifest(self) -> Manifest:
        """What the stage wrote about itself."""
        manifest = read_manifest(self.folder)
        assert manifest is not None
        return manifest

    @cached_property
    def _starts(self) -> Rows:
        """Row at which each bucket begins, and the end."""
        return np.cumsum([0, *self.manifest.details["buckets"]])

    @property
    def dimension(self) -> int:
        """Numbers in an embedding."""
        return int(self.manifest.details["dimension"])

    @property
    def groups(self) -> list[str]:
        """The names of all groups, sorted."""
        groups: list[str] = self.manifest.details["groups"]
        return groups

    def pairs(self, *columns: str) -> Any:
        """The Arrow table of these columns (all when none is named) of all pairs: for sets that fit in memory."""
        return self.rows(0, len(self), *columns)

    def rows(self, start: int, stop: int, *columns: str) -> Any:
        """The Arrow table of the pairs [start, stop); only the row groups that hold them are read."""
        spans = self._by_bucket(start, min(stop, len(self)))
        return _concatenated([self._read(bucket, a, b, columns) for bucket, a, b in spans], columns)

    def take(self, rows: Rows, *columns: str) -> Any:
        """The Arrow table of some pairs (m,), in that order."""
        pieces, places = [], []
        for bucket, at, local in self._owned(rows):
            first = int(local.min())
            table = self._read(bucket, first, int(local.max()) + 1, columns)
            pieces.append(table.take(pa.array(local - first)))
            places.append(at)
        if not pieces:
            return _concatenated([], columns)
        return pa.concat_tables(pieces).take(pa.array(np.argsort(np.concatenate(places))))

    def embeddings(self, rows: slice | Rows) -> tuple[Floats, Floats]:
        """Embeddings of images and of texts of some pairs: two (m, D), of unit length but for float16's rounding."""
        images, texts = (singles(one) for one in self._embeddings(rows, (IMAGE, TEXT)))
        return images, texts

    def stored(self, rows: slice | Rows, kind: int) -> Halves:
        """Embeddings of images or of texts as they are stored: (m, D)."""
        (values,) = self._embeddings(rows, (kind,))
        return values

    def _embeddings(self, rows: slice | Rows, kinds: tuple[int, ...]) -> list[Halves]:
        """Of images or texts, as they are stored."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            spans = [(bucket, slice(a, b)) for bucket, a, b in self._by_bucket(start, stop)]
            empty = np.zeros((0, self.dimension), np.float16)
            parts = [[self._vectors(bucket)[kind][local] for bucket, local in spans] for kind in kinds]
            return [np.concatenate([empty, *some]) for some in parts]
        values = [np.empty((len(rows), self.dimension), np.float16) for _ in kinds]
        for bucket, at, local in self._owned(rows):
            for kind, one in zip(kinds, values, strict=True):
                one[at] = self._vectors(bucket)[kind][local]
        return values

    def _by_bucket(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The buckets that hold the rows [start, stop), and the range in each."""
        first = max(0, int(np.searchsorted(self._starts, start, side="right")) - 1)
        for bucket in range(first, len(self._starts) - 1):
            low, high = int(self._starts[bucket]), int(self._starts[bucket + 1])
            if low >= stop:
                return
            if max(start, low) < min(stop, high):
                yield bucket, max(start, low) - low, min(stop, high) - low

    def _owned(self, rows: Rows) -> Iterator[tuple[int, Rows, Rows]]:
        """For each bucket that holds some of `rows`: their places in `rows`, and their rows in the bucket."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1):
            if len(at):
                bucket = int(owner[at[0]])
                yield bucket, at, rows[at] - self._starts[bucket]

    def _read(self, bucket: int, start: int, stop: int, columns: tuple[str, ...]) -> Any:
        file = self._file(bucket)
        starts = np.array(first_rows(file.metadata))
        groups = np.flatnonzero((starts[1:] > start) & (starts[:-1] < stop))
        table = file.read_row_groups(groups.tolist(), columns=list(columns) or None)
        return table.slice(start - int(starts[groups[0]]), stop - start)

    def _file(self, bucket: int) -> Any:
        if bucket not in self._files:
            _bound(self._files)
            self._files[bucket] = pq.ParquetFile(here(bucket_folder(self.folder, bucket) / "pairs.parquet"))
        return self._files[bucket]

    def _vectors(self, bucket: int) -> "tuple[_Stacked, _Stacked]":
        if bucket not in self._maps:
            _bound(self._maps)
            path = here(bucket_folder(self.folder, bucket) / "vectors.arrow")
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            self._maps[bucket] = tuple(
                _Stacked.of(vectors_of(table[name]), self.dimension) for name in VECTORS
            )
        images, texts = self._maps[bucket]
        return images, texts

    @cached_property
    def _files(self) -> dict[int, Any]:
        return {}

    @cached_property
    def _maps(self) -> dict[int, Any]:
        return {}


# Files of buckets that one process keeps open: their pages count as its memory.
MAX_OPEN = 4


def singles(halves: Halves) -> Floats:
    """As float32: numpy's own way takes four times as long."""
    singles: Floats = torch.from_numpy(halves).float().numpy()
    return singles


def _bound(held: dict[int, Any]) -> None:
    if len(held) >= MAX_OPEN:
        held.pop(next(iter(held)))


@dataclass(frozen=True)
class _Stacked:
    """The record batches of a column as one array (n, D) that is never copied whole."""

    views: list[Halves]
    starts: Rows
    dimension: int

    @classmethod
    def of(cls, views: list[Halves], dimension: int) -> "_Stacked":
        return cls(views, np.cumsum([0, *(len(view) for view in views)]), dimension)

    def __getitem__(self, rows: slice | Rows) -> Halves:
        if isinstance(rows, slice):
            first = int(np.searchsorted(self.starts, rows.start, side="right")) - 1
            parts = []
            for view, start in zip(self.views[first:], self.starts[first:]):
                if start >= rows.stop:
                    break
                parts.append(view[max(0, rows.start - start) : rows.stop - start])
            return np.concatenate([np.zeros((0, self.dimension), np.float16), *parts])
        return gathered(self.views, self.starts, rows)


def _concatenated(tables: list[Any], columns: tuple[str, ...]) -> Any:
    if tables:
        return pa.concat_tables(tables)
    return PAIRS_SCHEMA.empty_table().select(list(columns) or PAIRS_SCHEMA.names)


def rejected_reasons(folder: Path | str) -> Counter[str]:
    """How many pairs of an embedding artifact were rejected for each reason."""
    counts: Counter[str] = Counter()
    with pq.ParquetFile(here(Path(folder) / "rejected.parquet")) as file:
        for batch in file.iter_batches(columns=["reason"]):
            counts.update(batch["reason"].to_pylist())
    return counts


def read_rejected(folder: Path | str) -> Any:
    """The Arrow table of rejected pairs of an embedding artifact: shard, uid, reason."""
    table: pa.Table = pq.read_table(here(Path(folder) / "rejected.parquet"))
    return table
