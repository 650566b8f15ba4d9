"""The embedding artifact, opened: pairs in canonical order, embeddings by memory map."""

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

from influencespace.data.artifacts import MANIFEST, Manifest, read_manifest
from influencespace.data.chunks import Floats
from influencespace.errors import InputError


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
        return int(self._file.metadata.num_rows)

    def __reduce__(self) -> tuple[type["EmbeddingTable"], tuple[Path]]:
        return EmbeddingTable, (self.folder,)

    @property
    def manifest(self) -> Manifest:
        """What the stage wrote about itself."""
        manifest = read_manifest(self.folder)
        assert manifest is not None
        return manifest

    @cached_property
    def images(self) -> Floats:
        """Unit embeddings of the distinct images (Ni, D), memory-mapped."""
        return self._map("images.npy")

    @cached_property
    def texts(self) -> Floats:
        """Unit embeddings of the distinct captions (Nt, D), memory-mapped."""
        return self._map("texts.npy")

    @property
    def dimension(self) -> int:
        return int(self.images.shape[1])

    def pairs(self, *columns: str) -> Any:
        """The Arrow table of these columns (all when none is named) of all pairs."""
        return self._file.read(columns=list(columns) or None)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column of all pairs as a numpy array, e.g. `image`, `text`, `clip_score`."""
        column: npt.NDArray[Any] = self.pairs(name)[name].to_numpy()
        return column

    def rows(self, start: int, stop: int, *columns: str) -> Any:
        """The Arrow table of the pairs [start, stop); only the row groups that hold them are read."""
        starts = self._starts
        stop = min(stop, len(self))
        if start >= stop:
            return self._file.schema_arrow.empty_table().select(
                list(columns) or self._file.schema_arrow.names
            )
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
        table = self._file.read_row_groups(list(range(first, last + 1)), columns=list(columns) or None)
        return table.slice(start - starts[first], stop - start)

    def block(self, start: int, stop: int) -> "EmbeddingBlock":
        """The pairs [start, stop) with their embeddings."""
        table = self.rows(start, stop, "image", "text")
        image, text = table["image"].to_numpy(), table["text"].to_numpy()
        return EmbeddingBlock(
            start=start, image=image, text=text, images=self.images[image], texts=self.texts[text]
        )

    def blocks(self, size: int) -> Iterator["EmbeddingBlock"]:
        """All pairs as contiguous blocks of the canonical order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.block(start, start + size)

    @cached_property
    def _file(self) -> Any:
        return pq.ParquetFile(self.folder / "pairs.parquet")

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return np.cumsum([0, *sizes])

    def _map(self, name: str) -> Floats:
        array: Floats = np.load(self.folder / name, mmap_mode="r")
        return array


@dataclass(frozen=True, kw_only=True)
class EmbeddingBlock:
    """Contiguous pairs: `n` of them, from row `start` of the artifact on."""

    start: int
    image: npt.NDArray[np.int64]  # (n,) rows of images.npy
    text: npt.NDArray[np.int64]  # (n,) rows of texts.npy
    images: Floats  # (n, D)
    texts: Floats  # (n, D)

    def __len__(self) -> int:
        return len(self.image)


def rejected_reasons(folder: Path | str) -> Counter[str]:
    """How many pairs of an embedding artifact were rejected for each reason."""
    counts: Counter[str] = Counter()
    with pq.ParquetFile(Path(folder) / "rejected.parquet") as file:
        for batch in file.iter_batches(columns=["reason"]):
            counts.update(batch["reason"].to_pylist())
    return counts


def read_rejected(folder: Path | str) -> Any:
    """The Arrow table of rejected pairs of an embedding artifact: shard, uid, reason."""
    table: pa.Table = pq.read_table(Path(folder) / "rejected.parquet")
    return table
