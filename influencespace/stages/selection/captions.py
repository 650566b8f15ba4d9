"""What the captions of a pool say of its pairs: how many images share one, and how well those of one image agree."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.quality import MAX_SHARED, agreement, caption_images, cosine_with_others
from influencespace.data.buckets import Columns, buckets_of, read_rows
from influencespace.data.embeddings import TEXT
from influencespace.data.exchange import Vectors, whole_groups
from influencespace.data.pair_set import PairSet, unit_vectors
from influencespace.run import Workers

CAPTIONS = ("caption_images", "caption_agreement")
"""Columns of captions.parquet: the logarithm of how many images have the pair's caption, nan for all where most captions are
shared; the mean cosine of its caption with the other captions of its image, nan for an only one."""
BY_TEXT, BY_IMAGE = ".by_text", ".by_image"  # tables that only serve the work
RANGE, VECTOR_RANGE = 65_536, 32_768
"""Pairs of a task that reads thin columns, and of one that passes embeddings on."""
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
class StoredTexts:
    """Columns: the captions' embeddings of a range of pairs."""

    pool: PairSet

    def __call__(self, start: int, stop: int) -> Columns:
        return {"text_vector": self.pool.stored(slice(start, stop), TEXT)}


class AgreeWithinImages:
    """Of whole groups by image: the mean cosine of each caption with the others; a pair that is held twice counts once."""

    def __call__(self, columns: Columns, vectors: Mapping[str, Vectors]) -> Columns:
        both = np.stack([columns["image"], columns["text"]])
        (image, _), first, place = np.unique(both, axis=1, return_index=True, return_inverse=True)
        _, group, held = np.unique(image, return_inverse=True, return_counts=True)
        several = np.flatnonzero(held[group] > 1)  # no more is read
        image, at = image[several], first[several]
        result = np.full(len(first), np.nan)
        for start, stop in whole_groups(image, READ):
            result[several[start:stop]] = _agreement(
                vectors["text_vector"], at[start:stop], image[start:stop]
            )
        return {"agreement": result[place.reshape(-1)]}


def _agreement(texts: Vectors, at: IntArray, image: IntArray) -> FloatArray:
    """Of the pairs at some places (n,), of whole images (n,): (n,)."""

    def read(places: IntArray) -> FloatArray:
        return unit_vectors(texts[places]).double().numpy()

    if len(at) <= READ:
        return agreement(read(at), image)
    blocks = [at[start : start + READ] for start in range(0, len(at), READ)]  # of one image
    total = sum((read(block).sum(0) for block in blocks[1:]), start=read(blocks[0]).sum(0))
    return np.concatenate([cosine_with_others(read(block), total, len(at)) for block in blocks])


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
    agree = AgreeWithinImages()
    workers.group_by(BY_IMAGE, emit, "image", agree, rows, VECTOR_RANGE, vectors=StoredTexts(pool))
    counts = workers.map([CountShared(folder, *span) for span in buckets_of(rows, RANGE)], label="captions")
    describing = bool(sum(counts) <= MAX_SHARED * rows)
    workers.table("captions", CaptionsOfPairs(folder, describing), rows, RANGE, label="captions")
    return describing
