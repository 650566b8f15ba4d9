"""Encoders of the embed stage: each runs both towers of its own encoder over one chunk after another, and commits it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as plain_field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as validated_dataclass

from influencespace.data.chunks import Floats, set_column, write_chunk
from influencespace.data.schema import ReadOptions
from influencespace.errors import STRICT
from influencespace.models.encode import EncodePass
from influencespace.models.pixels import probe_images
from influencespace.models.probe import image_rate, joined, quickest_batch
from influencespace.stages.ingest.decode import (
    CHUNK_IMAGES,
    Committed,
    DecodedChunk,
    Preprocessing,
    PreprocessingLoader,
    packed,
    unpacked,
)

NOT_FINITE = "the embedding is not finite"


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class EmbedConfig:
    """How pairs are read and embedded."""

    encoder: str
    """Folder or hub id of a dual encoder."""
    batch_size: int = Field(default=64, ge=1)
    """Images, or captions, in one pass of a tower. On a GPU images are encoded in so many at least: a probe finds how many are
    quickest."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the towers; `auto` is bfloat16 on GPUs where that embeds a probe alike, else float32."""
    tf32: bool = False
    """Let GPUs multiply float32 matrices in TF32: quicker, and less exact."""
    num_actors: int = Field(default=0, ge=0)
    """Workers, each with its own encoder; 0 means one for each GPU, or for each CPU core where memory allows."""
    cpus_per_actor: int = Field(default=0, ge=0)
    """CPU cores of one worker; 0 shares the cores among the workers."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs of one worker, a fraction for small models; None means one where there are GPUs."""
    max_pixels: int = Field(default=64_000_000, ge=1)
    """Larger images are rejected, unread."""
    trust_remote_code: bool = False
    """Run code that comes with the encoder."""
    keep_chunks: bool = False
    """Keep the chunks of the shards, the size of the result again, once it is complete."""
    read: ReadOptions = plain_field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        gpus = self.gpus_per_actor
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_actor is {gpus:g}: give a fraction of one GPU, or a whole number")

    def content(self) -> dict[str, Any]:
        """What the embeddings depend on: not on who computes them, or how many at once."""
        return {
            "dtype": self.dtype,
            "tf32": self.tf32,
            "max_pixels": self.max_pixels,
            "read": self.read,
            "statistics": ("sharpness",),
        }


class Encoder(Protocol):
    """What the stage asks of `models.encoders.DualEncoder`."""

    dimension: int
    fingerprint: str

    def tokenize(self, texts: Any) -> tuple[Any, list[bool]]: ...
    def encode_image(self, pixels: Any) -> Any: ...
    def encode_text(self, tokens: Any) -> Any: ...


EncoderLoader = Callable[[EmbedConfig, str], Encoder]


def load(config: EmbedConfig, device: str) -> Encoder:
    """The encoder of `config` on `device`."""
    from influencespace.models.encoders import load_encoder

    return load_encoder(
        config.encoder, device=device, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )


def load_preprocessing(config: EmbedConfig) -> Preprocessing:
    """What the encoder of `config` does to images and texts before its towers see them."""
    from influencespace.models import encoders

    return encoders.load_preprocessing(config.encoder, trust_remote_code=config.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """What an encoder says of a chunk: counts and times."""

    rows: int
    bytes_read: int
    items: int
    images: int = 0
    began: float = 0.0
    """Clock time when the encoder was ready and the chunk was begun; 0 for one that was there already."""
    ended: float = 0.0
    startup: float = 0.0
    """Seconds to build the encoder, where this chunk did it."""
    busy: float = 0.0
    """Seconds for which its device computed."""
    worker: str = ""
    gpus: float = 0.0
    """Of that worker."""
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class EncodeChunks:
    """The factory of encoders: the embeddings of a chunk, committed with its pairs."""

    load: EncoderLoader
    config: EmbedConfig
    device: str
    gpus: float = 0.0
    """Of each worker."""
    image_batch: int = 0
    """Images in one pass; 0 for as many as the readers prepare together."""

    def __call__(self) -> Callable[[DecodedChunk | Committed], ChunkResult]:
        return _Worker(self.load, self.config, self.device, self.gpus, self.image_batch).encode


@dataclass(frozen=True, kw_only=True)
class ProbeBatch:
    """Task: with how many images in one pass the encoder is quickest on a device, and images a second for those tried."""

    load: EncoderLoader
    load_preprocessing: PreprocessingLoader
    config: EmbedConfig
    device: str

    def __call__(self) -> dict[str, Any]:
        towers = EncodePass(self.load(self.config, self.device), self.device, tf32=self.config.tf32)
        pixels = unpacked(packed(self.load_preprocessing(self.config).preprocess_images(probe_images())))
        batch, rates = quickest_batch(
            lambda size: image_rate(towers, pixels, size), self.config.batch_size, CHUNK_IMAGES
        )
        return {"image_batch": batch, "images_per_second": {str(k): round(v, 1) for k, v in rates.items()}}


@dataclass
class _Worker:
    load: EncoderLoader
    config: EmbedConfig
    device: str
    gpus: float
    image_batch: int

    @cached_property
    def encoder(self) -> Encoder:
        return self.load(self.config, self.device)

    def encode(self, chunk: DecodedChunk | Committed) -> ChunkResult:
        if isinstance(chunk, Committed):
            return ChunkResult(rows=chunk.rows, bytes_read=chunk.bytes_read, items=chunk.items)
        start = time.monotonic()
        encoder = self.encoder
        startup, began = time.monotonic() - start, time.time()
        images = self._images(chunk)
        texts = self._texts(chunk)
        self._commit(chunk, images, texts)
        return ChunkResult(
            rows=chunk.rows,
            images=len(images),
            bytes_read=chunk.bytes_read,
            items=chunk.items,
            began=began,
            ended=time.time(),
            startup=startup if startup > 1e-3 else 0.0,
            busy=self.towers.take_busy(),
            worker=f"{os.uname().nodename}:{os.getpid()}",
            gpus=self.gpus,
            fingerprint=encoder.fingerprint,
        )

    @cached_property
    def towers(self) -> EncodePass:
        return EncodePass(self.encoder, self.device, tf32=self.config.tf32)

    def _images(self, chunk: DecodedChunk) -> Floats:
        batches = joined(chunk.pixels, self.image_batch) if self.image_batch else chunk.pixels
        parts = self.towers.images(map(unpacked, batches))
        return np.concatenate([np.zeros((0, self.encoder.dimension), np.float32), *parts])

    def _texts(self, chunk: DecodedChunk) -> Floats:
        values = np.zeros((sum(len(rows) for rows, _ in chunk.tokens), self.encoder.dimension), np.float32)
        embedded = self.towers.texts(tokens for _, tokens in chunk.tokens)
        for (rows, _), part in zip(chunk.tokens, embedded, strict=True):
            values[rows] = part
        return values

    def _commit(self, chunk: DecodedChunk, images: Floats, texts: Floats) -> None:
        """A pair's row takes the embeddings of its image and caption; one that is not finite makes it a rejection."""
        left, right = (
            values[where] if len(values) else np.zeros((len(where), self.encoder.dimension), np.float32)
            for values, where in ((images, chunk.image), (texts, chunk.text))
        )
        left[chunk.image < 0] = 0
        right[chunk.text < 0] = 0
        bad = np.logical_not(np.isfinite(np.concatenate([left, right], 1)).all(1))
        left[bad], right[bad] = 0, 0
        reasons = [
            reason or (None if finite else NOT_FINITE)
            for reason, finite in zip(
                chunk.pairs["reason"].to_pylist(), np.logical_not(bad).tolist(), strict=True
            )
        ]
        write_chunk(chunk.path, set_column(chunk.pairs, "reason", reasons), left, right)
