"""What the captions of a pool say of its pairs: how many images share one, and how well those of one image agree."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.quality import MAX_SHARED, agreement, caption_images, cosine_with_others
from influencespace.data.buckets import Columns, buckets_of, read_rows
from influencespace.data.exchange import whole_groups
from influencespace.data.pair_set import PairSet
from influencespace.run import Workers

CAPTIONS = ("caption_images", "caption_agreement")
"""Columns of captions.parquet: the logarithm of how many images have the pair's caption, nan for all where most captions are
shared; the mean cosine of its caption with the other captions of its image, nan for an only one."""
BY_TEXT, BY_IMAGE = ".by_text", ".by_image"  # tables that only serve the work
RANGE = 65_536
"""Pairs of a task that reads thin columns."""
READ = 8192
"""Pairs whose embeddings are in memory at once."""


@dataclass(frozen=True)
class ImagesAndTexts:
    """Columns: image and text of a range of pairs."""

    pool: PairSet

    def __call__(self, start: int, stop: int) -> Columns:
        return self.pool.read(slice(start, stop), "image", "text")


def count_images(columns: Columns) -> Columns:
    """Of whole groups by caption: the logarithm of how many images each has."""
    return {"images": caption_images(columns["image"], columns["text"])}


@dataclass(frozen=True)
class AgreeWithinImages:
    """Of whole groups by image: the mean cosine of each caption with the others; a pair that is held twice counts once."""

    pool: PairSet

    def __call__(self, columns: Columns) -> Columns:
        both = np.stack([columns["image"], columns["text"]])
        (image, _), first, place = np.unique(both, axis=1, return_index=True, return_inverse=True)
        _, group, held = np.unique(image, return_inverse=True, return_counts=True)
        several = np.flatnonzero(held[group] > 1)  # no more is read
        image, row = image[several], columns["row"][first[several]]
        result = np.full(len(first), np.nan)
        for start, stop in whole_groups(image, READ):
            result[several[start:stop]] = self._agreement(row[start:stop], image[start:stop])
        return {"agreement": result[place.reshape(-1)]}

    def _agreement(self, row: IntArray, image: IntArray) -> FloatArray:
        if len(row) <= READ:
            return agreement(self._texts(row), image)
        blocks = [row[start : start + READ] for start in range(0, len(row), READ)]  # of one image
        total = sum((self._texts(block).sum(0) for block in blocks[1:]), start=self._texts(blocks[0]).sum(0))
        return np.concatenate([cosine_with_others(self._texts(block), total, len(row)) for block in blocks])

    def _texts(self, rows: IntArray) -> FloatArray:
        return self.pool.texts(rows).double().numpy()


@dataclass(frozen=True)
class CaptionsOfPairs:
    """Columns of captions.parquet of a range of pairs."""

    folder: Path
    describing: bool

    def __call__(self, start: int, stop: int) -> Columns:
        rows = slice(start, stop)
        images = read_rows(self.folder / f"{BY_TEXT}.parquet", rows)["images"]
        values = (
            images if self.describing else np.full(len(images), np.nan),
            read_rows(self.folder / f"{BY_IMAGE}.parquet", rows)["agreement"],
        )
        return dict(zip(CAPTIONS, values, strict=True))


@dataclass(frozen=True)
class CountShared:
    """Task: how many pairs of a range have a caption that another image has as well."""

    folder: Path
    start: int
    stop: int

    def __call__(self) -> int:
        images = read_rows(self.folder / f"{BY_TEXT}.parquet", slice(self.start, self.stop))["images"]
        return int((images > 0).sum())


def write_captions(pool: PairSet, workers: Workers) -> bool:
    """Write captions.parquet; whether captions describe single images, and do not name classes."""
    rows, emit, folder = len(pool), ImagesAndTexts(pool), workers.folder
    workers.group_by(BY_TEXT, emit, "text", count_images, rows, RANGE)
    workers.group_by(BY_IMAGE, emit, "image", AgreeWithinImages(pool), rows, RANGE)
    counts = workers.map([CountShared(folder, *span) for span in buckets_of(rows, RANGE)], label="captions")
    describing = bool(sum(counts) <= MAX_SHARED * rows)
    workers.table("captions", CaptionsOfPairs(folder, describing), rows, RANGE, label="captions")
    return describing
