"""Readers of the embed stage: one pass over a shard's bytes, decoded, resized and tokenised chunk by chunk for the encoders."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from influencespace.data.chunks import ChunkFolder, is_whole, pair_rows, table_of
from influencespace.data.images import RejectedImage, decode_image, sharpness
from influencespace.data.readers import read_shard
from influencespace.data.schema import ReadOptions, Rejection, Sample, Shard

# Images of one chunk: at 224 x 224 pixels 38 MB, and what a killed run encodes again at most, for each reader and encoder.
CHUNK_IMAGES = 256


class Preprocessing(Protocol):
    """What readers ask of `models.preprocessing.Preprocessing`."""

    @property
    def input_size(self) -> int: ...
    def preprocess_images(self, images: Any) -> Any: ...
    def tokenize(self, texts: Any) -> tuple[Any, list[bool]]: ...


PreprocessingLoader = Callable[[Any], Preprocessing]


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard, and where its chunks lie."""

    shard: Shard
    chunks: ChunkFolder
    seed: int = 0

    @property
    def name(self) -> str:
        return self.shard.path


@dataclass(frozen=True, kw_only=True)
class DecodedChunk:
    """Some pairs of a shard, ready for an encoder: of equal images, and of equal captions, there is one."""

    name: str
    path: Path
    """Where it will lie once it is encoded."""
    pairs: pa.Table
    """Of PAIR_SCHEMA, with the reasons why some are none."""
    image: np.ndarray[Any, Any]
    """Which of the images each pair has (n,); -1: none."""
    text: np.ndarray[Any, Any]
    pixels: list[Any]
    """Packed batches of the images that were decoded, in their order."""
    tokens: list[tuple[list[int], Any]]
    """Batches of captions: which, and the text tower's inputs (b, L)."""
    bytes_read: int
    """Of encoded images."""
    items: int
    """Images, and what was rejected instead."""

    @property
    def rows(self) -> int:
        return len(self.pairs)


def packed(pixels: Any) -> np.ndarray[Any, Any]:
    """A batch (b, 3, H, W) as an array whose memory is in one piece: pictures are made with their channels last."""
    array: np.ndarray[Any, Any] = (pixels.permute(0, 2, 3, 1) if pixels.ndim == 4 else pixels).numpy()
    return array


def unpacked(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The batch that was packed, without a copy."""
    return pixels.transpose(0, 3, 1, 2) if pixels.ndim == 4 else pixels


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A chunk that is there: a reader that is begun again, its worker lost, must yield as many items as before."""

    rows: int
    bytes_read: int
    items: int


@dataclass(frozen=True, kw_only=True)
class ReadChunks:
    """The factory of readers: a shard's chunks, one after another."""

    load: PreprocessingLoader
    config: Any

    def __call__(self) -> Callable[[ShardTask], Iterator[DecodedChunk | Committed]]:
        return _Reader(self.load, self.config).chunks


@dataclass
class _Reader:
    load: PreprocessingLoader
    config: Any

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return self.load(self.config)

    def chunks(self, task: ShardTask) -> Iterator[DecodedChunk | Committed]:
        read: ReadOptions = self.config.read
        items = read_shard(task.shard, read, seed=task.seed)
        rows = 0
        for number in count():
            some = islice(items, CHUNK_IMAGES)
            first = next(some, None)
            if first is None:
                task.chunks.close(number, rows)
                return
            whole = chain([first], some)
            if is_whole(task.chunks.chunk(number)):
                chunk: DecodedChunk | Committed = _committed(whole)
            else:
                chunk = _Builder(self.preprocessing, self.config).chunk(task, number, whole)
            rows += chunk.rows
            yield chunk


def _committed(items: Iterable[Sample | Rejection]) -> Committed:
    rows = size = number = 0
    for item in items:
        number += 1
        rows += len(item.captions) if isinstance(item, Sample) else 1
        size += len(item.image) if isinstance(item, Sample) else 0
    return Committed(rows=rows, bytes_read=size, items=number)


@dataclass
class _Builder:
    """Collects one chunk; pictures are small as soon as they are decoded."""

    preprocessing: Preprocessing
    config: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    images: dict[bytes, int] = field(default_factory=dict)
    """Digest of an image -> its number among the decoded ones, -1 where it is none."""
    reasons: dict[bytes, str] = field(default_factory=dict)
    sharp: list[float] = field(default_factory=list)
    captions: dict[str, int] = field(default_factory=dict)
    waiting: list[Any] = field(default_factory=list)
    pixels: list[Any] = field(default_factory=list)
    bytes_read: int = 0

    def chunk(self, task: ShardTask, number: int, items: Iterable[Sample | Rejection]) -> DecodedChunk:
        read = 0
        for item in items:
            read += 1
            rows = list(pair_rows(task.shard.path, [item]))
            if isinstance(item, Sample):
                self._add(item, rows)
            self.rows += rows
            self.image += [self.images.get(row["image"], -1) for row in rows]
        self._flush(0)
        tokens, truncated = self._tokens()
        return DecodedChunk(
            name=f"{task.name}, chunk {number}",
            path=task.chunks.chunk(number),
            pairs=table_of(self._described(truncated)),
            image=np.array(self.image, np.int64),
            text=np.array([self.captions.get(row.get("caption", ""), -1) for row in self.rows], np.int64),
            pixels=self.pixels,
            tokens=tokens,
            bytes_read=self.bytes_read,
            items=read,
        )

    def _add(self, sample: Sample, rows: list[dict[str, Any]]) -> None:
        self.bytes_read += len(sample.image)
        digest = rows[0]["image"]
        if digest not in self.images:
            try:
                picture = decode_image(sample.image, self.config.max_pixels, self.preprocessing.input_size)
                self.sharp.append(sharpness(picture))
                self.images[digest] = len(self.sharp) - 1
                self.waiting.append(picture)
                self._flush(self.config.batch_size - 1)
            except RejectedImage as error:
                self.images[digest] = -1
                self.reasons[digest] = str(error)
        if self.images[digest] >= 0:
            for caption in sample.captions:
                self.captions.setdefault(caption, len(self.captions))

    def _flush(self, allowed: int) -> None:
        if len(self.waiting) > allowed:
            self.pixels.append(packed(self.preprocessing.preprocess_images(self.waiting)))
            self.waiting = []

    def _tokens(self) -> tuple[list[tuple[list[int], Any]], dict[int, bool]]:
        """Captions of like length share a batch, so that little is padded."""
        texts = list(self.captions)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches: list[tuple[list[int], Any]] = []
        truncated: dict[int, bool] = {}
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            tokens, cut = self.preprocessing.tokenize([texts[i] for i in rows])
            batches.append((rows, {name: values.numpy() for name, values in tokens.items()}))
            truncated |= dict(zip(rows, cut, strict=True))
        return batches, truncated

    def _described(self, truncated: dict[int, bool]) -> Iterator[dict[str, Any]]:
        for row, image in zip(self.rows, self.image, strict=True):
            extra = {
                "reason": row.get("reason") or self.reasons.get(row["image"]),
                "truncated": truncated.get(self.captions.get(row.get("caption", ""), -1), False),
                "sharpness": self.sharp[image] if image >= 0 else None,
            }
            yield row | extra
