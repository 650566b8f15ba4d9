"""Some pairs of an embedding artifact, in canonical order: the pool, the target or the test set."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.data.artifacts import MANIFEST
from influencespace.data.buckets import Columns
from influencespace.data.chunks import Floats, Halves
from influencespace.data.embeddings import EmbeddingTable, singles
from influencespace.data.mirror import here, is_file

UIDS = 131_072  # read at once
MAX_LENDERS = 65_536  # pairs whose captions are lent to others


@dataclass(frozen=True)
class PairSet:
    """Rows of an embedding artifact; cheap to pickle, arrays are opened where they are used.

    Pair i of the set is row `rows[i]` of the artifact. `image` and `text` are numbers made of the content of image and caption:
    equal where that is.
    """

    folder: Path
    """The embedding artifact."""
    rows_file: Path | None = None
    """An .npy of int64 rows; None takes all of them."""

    def __reduce__(self) -> tuple[Callable[..., "PairSet"], tuple[Path, Path | None]]:
        return _open, (self.folder, self.rows_file)

    def __len__(self) -> int:
        return len(self.table) if self.rows_file is None else len(self._chosen)

    @cached_property
    def table(self) -> EmbeddingTable:
        return EmbeddingTable.open(self.folder)

    @cached_property
    def _chosen(self) -> IntArray:
        """By memory map: a range of it costs no more than that range."""
        assert self.rows_file is not None
        chosen: IntArray = np.load(here(self.rows_file), mmap_mode="r")
        return chosen

    def place(self, rows: slice | IntArray) -> slice | IntArray:
        """Rows of the artifact that are these rows of the set."""
        if self.rows_file is not None:
            return np.asarray(self._chosen[rows])
        return slice(*rows.indices(len(self))[:2]) if isinstance(rows, slice) else rows

    @property
    def rows(self) -> IntArray:
        """Rows of the artifact that are the set (n,)."""
        return self.rows_of_range(0, len(self))

    def rows_of_range(self, start: int, stop: int) -> IntArray:
        """Rows of the artifact that are a range of the set (m,)."""
        return np.arange(start, stop) if self.rows_file is None else np.asarray(self._chosen[start:stop])

    @cached_property
    def image(self) -> IntArray:
        """Number of each pair's image, made of its content (n,): for sets that fit in memory, as are the next four."""
        return self.read(slice(None), "image")["image"]

    @cached_property
    def text(self) -> IntArray:
        """Number of each pair's caption, made of its content (n,)."""
        return self.read(slice(None), "text")["text"]

    @cached_property
    def clip_score(self) -> NDArray[np.float64]:
        """The given encoder's cosine of image and caption (n,)."""
        return self.read(slice(None), "clip_score")["clip_score"].astype(np.float64)

    @cached_property
    def sharpness(self) -> NDArray[np.float64]:
        """Sharpness of each pair's picture (n,); nan where embeddings came without pictures."""
        return self.read(slice(None), "sharpness")["sharpness"].astype(np.float64)

    @cached_property
    def group(self) -> IntArray:
        """Group of each pair, its place in `groups`; -1 where the data names none (n,)."""
        return self.read(slice(None), "group")["group"]

    @property
    def groups(self) -> list[str]:
        """The names of all groups of the artifact, sorted."""
        return self.table.groups

    def read(self, rows: slice | IntArray, *names: str) -> Columns:
        """Columns of some pairs of the set (m,): numbers as numpy numbers, text as objects, `group` as its place in `groups` (-1:
        none).

        Reads what it returns: a range of rows costs no more than that range.
        """
        table = self._read(rows, names)
        columns: Columns = {}
        for name in names:
            values = table[name]
            if name == "group":
                places = pc.index_in(values, value_set=pa.array(self.groups, values.type))
                columns[name] = places.fill_null(-1).to_numpy().astype(np.int64)
            else:
                columns[name] = values.to_numpy(zero_copy_only=False)
        return columns

    def _read(self, rows: slice | IntArray, names: Sequence[str]) -> pa.Table:
        place = self.place(rows)
        if isinstance(place, slice):
            return self.table.rows(place.start, place.stop, *names)
        return self.table.take(place, *names)

    def column(self, name: str) -> Sequence[object]:
        """A column of the artifact's pairs as Python values (n,)."""
        values: Sequence[object] = self._read(slice(None), (name,))[name].to_pylist()
        return values

    def inputs(self, pairs: IntArray | slice, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and captions of some pairs of the set: two (m, D)."""
        images, texts = self.table.embeddings(self.place(pairs))
        return _unit(images, device), _unit(texts, device)

    def stored(self, rows: slice, kind: int) -> Halves:
        """Embeddings of images or of captions of a range of pairs as they are stored, for `unit_vectors`: (m, D)."""
        return self.table.stored(self.place(rows), kind)

    def captions_of_others(self, pairs: IntArray, seed: int) -> IntArray:
        """For each pair another pair of the set with another image and another caption, if there is one to be found (m,)."""
        generator = np.random.default_rng(seed)
        lenders = min(len(self), MAX_LENDERS)  # the canonical order is random
        lent, own = self.read(slice(0, lenders), "image", "text"), self.read(pairs, "image", "text")
        other = generator.integers(0, lenders, len(pairs))
        for _ in range(20):  # a few redraws suffice unless almost all pairs share one image or one caption
            same = (lent["image"][other] == own["image"]) | (lent["text"][other] == own["text"])
            if not same.any():
                break
            other[same] = generator.integers(0, lenders, int(same.sum()))
        return other


def unit_vectors(stored: Halves, device: str = "cpu") -> Tensor:
    """Stored embeddings (m, D) as `PairSet.inputs` gives them."""
    return _unit(singles(stored), device)


def _unit(rows: Floats, device: str) -> Tensor:
    """Scaled in place to unit length: float16 rounds it by up to one part in a thousand."""
    read = torch.from_numpy(rows).to(device)
    return read.div_(torch.linalg.vector_norm(read, dim=1, keepdim=True).clamp_(min=1e-12))


def rows_of(pairs: PairSet, uids: Collection[str]) -> dict[str, int]:
    """The row of each uid in a set, read range by range; nothing of those that it does not hold."""
    wanted = pa.array(uids, pa.large_string())
    rows: dict[str, int] = {}
    for start in range(0, len(pairs), UIDS):
        held = pairs._read(slice(start, start + UIDS), ("uid",))["uid"].cast(pa.large_string())
        found = np.flatnonzero(pc.is_in(held, value_set=wanted).to_numpy(zero_copy_only=False))
        rows |= zip(held.take(found).to_pylist(), (start + found).tolist())
    return rows


def _open(folder: Path, rows_file: Path | None) -> PairSet:
    """A set that came over the wire; one process reads the columns of the same files once."""
    files = [path for path in (folder / MANIFEST, rows_file) if path is not None and is_file(path)]
    return _opened(folder, rows_file, tuple(here(path).stat().st_mtime_ns for path in files))


@lru_cache(maxsize=8)
def _opened(folder: Path, rows_file: Path | None, versions: tuple[int, ...]) -> PairSet:
    return PairSet(folder, rows_file)
