"""The embedding artifact, opened: pairs in canonical order, embeddings by memory map."""

from collections import Counter
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
from influencespace.data.images import first_rows
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
        array: Floats = np.load(self.folder / "images.npy", mmap_mode="r")
        return array

    @cached_property
    def texts(self) -> Floats:
        """Unit embeddings of the distinct captions (Nt, D), memory-mapped."""
        array: Floats = np.load(self.folder / "texts.npy", mmap_mode="r")
        return array

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
        stop = min(stop, len(self))
        starts = np.array(first_rows(self._file.metadata))
        groups = np.flatnonzero((starts[1:] > start) & (starts[:-1] < stop) & (start < stop))
        table = self._file.read_row_groups(groups.tolist(), columns=list(columns) or None)
        return table.slice(start - starts[groups[0]], stop - start) if len(groups) else table

    @cached_property
    def _file(self) -> Any:
        return pq.ParquetFile(self.folder / "pairs.parquet")


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
