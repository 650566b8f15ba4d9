"""Some pairs of an embedding artifact, in canonical order: the pool, the target or the test set."""

from collections.abc import Callable, Sequence
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
from influencespace.data.buckets import Columns
from influencespace.data.embeddings import EmbeddingTable


@dataclass(frozen=True)
class PairSet:
    """Rows of an embedding artifact; cheap to pickle, arrays are opened where they are used.

    Pair i of the set is row `rows[i]` of the artifact. `image` and `text` number the distinct images and captions
    of the artifact.
    """

    folder: Path
    """The embedding artifact."""
    rows_file: Path | None = None
    """An .npy of int64 rows; None takes all of them."""

    def __reduce__(self) -> tuple[Callable[..., "PairSet"], tuple[Path, Path | None]]:
        return _open, (self.folder, self.rows_file)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def table(self) -> EmbeddingTable:
        return EmbeddingTable.open(self.folder)

    @cached_property
    def rows(self) -> IntArray:
        return np.arange(len(self.table)) if self.rows_file is None else np.load(self.rows_file)

    @cached_property
    def image(self) -> IntArray:
        """Image of each pair (n,)."""
        return self.table.column("image").astype(np.int64)[self.rows]

    @cached_property
    def text(self) -> IntArray:
        """Caption of each pair (n,)."""
        return self.table.column("text").astype(np.int64)[self.rows]

    @cached_property
    def clip_score(self) -> NDArray[np.float64]:
        """The given encoder's cosine of image and caption (n,)."""
        return self.table.column("clip_score").astype(np.float64)[self.rows]

    @cached_property
    def sharpness(self) -> NDArray[np.float64]:
        """Sharpness of each pair's picture (n,); nan where embeddings came without pictures."""
        return self.table.column("sharpness").astype(np.float64)[self.rows]

    @cached_property
    def group(self) -> IntArray:
        """Group of each pair, its place in `groups`; -1 where the data names none (n,)."""
        return self.read(slice(None), "group")["group"]

    @cached_property
    def groups(self) -> list[str]:
        """The names of all groups of the artifact, sorted."""
        names = self.table.pairs("group")["group"].unique().drop_null()
        return sorted(names.to_pylist())

    def read(self, rows: slice | IntArray, *names: str) -> Columns:
        """Columns of some pairs of the set (m,), by default of all: numbers as numpy numbers, text as objects, `group` as its
        place in `groups` (-1: none).

        Reads what it returns: a range of rows costs no more than that range.
        """
        table = self._table(rows, names)
        columns: Columns = {}
        for name in names:
            values = table[name]
            if name == "group":
                places = pc.index_in(values, value_set=pa.array(self.groups, values.type))
                columns[name] = places.fill_null(-1).to_numpy().astype(np.int64)
            else:
                columns[name] = values.to_numpy(zero_copy_only=False)
        return columns

    def _table(self, rows: slice | IntArray, names: Sequence[str]) -> pa.Table:
        if isinstance(rows, slice) and self.rows_file is None:
            start, stop, _ = rows.indices(len(self))
            return self.table.rows(start, stop, *names)
        place = self.rows[rows]
        first = int(place.min(initial=0)) if len(place) else 0
        return self.table.rows(first, int(place.max(initial=-1)) + 1, *names).take(place - first)

    def column(self, name: str) -> Sequence[object]:
        """A column of the artifact's pairs as Python values (n,)."""
        values: Sequence[object] = self.table.pairs(name)[name].take(self.rows).to_pylist()
        return values

    def inputs(self, pairs: IntArray | slice, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Embeddings of images and captions of some pairs of the set: two (m, D)."""
        images = torch.from_numpy(np.asarray(self.table.images[self.image[pairs]]))
        texts = torch.from_numpy(np.asarray(self.table.texts[self.text[pairs]]))
        return images.to(device, non_blocking=True), texts.to(device, non_blocking=True)

    def captions_of_others(self, pairs: IntArray, seed: int) -> IntArray:
        """For each pair another pair of the set with another image and another caption, if there is one to be found (m,)."""
        generator = np.random.default_rng(seed)
        other = generator.integers(0, len(self), len(pairs))
        for _ in range(20):  # a few redraws suffice unless almost all pairs share one image or one caption
            same = (self.image[other] == self.image[pairs]) | (self.text[other] == self.text[pairs])
            if not same.any():
                break
            other[same] = generator.integers(0, len(self), int(same.sum()))
        return other

    def mixed_inputs(self, pairs: IntArray, captions_of: IntArray) -> tuple[Tensor, Tensor]:
        """Images of `pairs` with the captions of other pairs of the set: two (m, D)."""
        return self.inputs(pairs)[0], self.inputs(captions_of)[1]


def _open(folder: Path, rows_file: Path | None) -> PairSet:
    """A set that came over the wire; one process reads the columns of the same files once."""
    files = [path for path in (folder / "pairs.parquet", rows_file) if path is not None and path.exists()]
    return _opened(folder, rows_file, tuple(path.stat().st_mtime_ns for path in files))


@lru_cache(maxsize=8)
def _opened(folder: Path, rows_file: Path | None, versions: tuple[int, ...]) -> PairSet:
    return PairSet(folder, rows_file)
