"""Stored embeddings of any number of pairs: those of real pairs, drawn again and again with noise, a file at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.data.distinct import RealArray
from influencespace.core.arrays import BoolArray, IntArray
from influencespace.data.artifacts import atomic_path
from influencespace.data.pair_set import PairSet
from influencespace.planning.stretched import near, table

FILE_PAIRS = 50_000
CAPTIONS = 2
"""Pairs of an image, one after another."""
WRONG = 0.3
BOILERPLATE = 0.01
"""Share of the captions that are one of a few, shared by many images."""
FEW = 50


@dataclass(frozen=True)
class Noisy:
    """Pairs made of real ones (n): each image is one of theirs with noise of its own, a share of the captions is of others."""

    images: RealArray  # (n, D), of unit length
    texts: RealArray  # (n, D)

    @classmethod
    def of(cls, pairs: PairSet) -> "Noisy":
        images, texts = pairs.inputs(slice(None))
        return cls(images.numpy(), texts.numpy())

    def file(self, number: int, pairs: int) -> tuple[pa.Table, BoolArray]:
        """The pairs of one file, the same each time, and which captions are wrong (m,)."""
        rng = np.random.default_rng([20261129, number])
        source = np.repeat(rng.integers(len(self.images), size=-(-pairs // CAPTIONS)), CAPTIONS)[:pairs]
        wrong = rng.random(pairs) < WRONG
        described = np.where(wrong, rng.integers(len(self.texts), size=pairs), source)
        # by image, not by pair
        images = np.repeat(self.noisy(self.images, source[::CAPTIONS], rng), CAPTIONS, 0)[:pairs]
        texts = self.noisy(self.texts, described, rng)
        shared = rng.random(pairs) < BOILERPLATE
        few = rng.integers(min(FEW, len(self.texts)), size=int(shared.sum()))
        texts[shared] = self.texts[few].astype(np.float16)
        captions = np.array([f"caption {number}-{row}" for row in range(pairs)], object)
        captions[shared] = [f"caption of many {one}" for one in few]
        uids = [f"pair-{number:06d}-{row:06d}" for row in range(pairs)]
        return table(uids, captions.tolist(), images, texts), wrong | shared

    def write(self, folder: Path, pairs: int) -> int:
        """So many pairs as Parquet files in a folder; their bytes. Files that are there stay."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, pairs, FILE_PAIRS)):
            path = folder / f"{number:05d}.parquet"
            if not path.is_file():
                with atomic_path(path) as aside:
                    pq.write_table(
                        self.file(number, min(FILE_PAIRS, pairs - start))[0], aside, compression="none"
                    )
        return sum(path.stat().st_size for path in folder.iterdir())

    def noisy(self, vectors: RealArray, rows: IntArray, rng: np.random.Generator) -> NDArray[np.float16]:
        """Unit vectors near some of the given ones."""
        return near(vectors[rows], rng)
