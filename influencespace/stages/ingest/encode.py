"""The workers of the embed stage: each runs both towers of its own encoder over one shard after another."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import field as plain_field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as validated_dataclass

from influencespace.data.artifacts import fingerprint
from influencespace.data.chunks import (
    Digests,
    Embedded,
    digests_of,
    has_fingerprint,
    is_pair,
    read_index,
    read_owned,
    write_embedded,
)
from influencespace.data.images import RejectedImage, decode_image, sharpness
from influencespace.data.readers import read_shard
from influencespace.data.schema import ReadOptions, Sample
from influencespace.data.uids import digest
from influencespace.engine.prefetch import prefetch
from influencespace.errors import STRICT, InputError
from influencespace.stages.ingest.index import ShardTask


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class EmbedConfig:
    """How pairs are read and embedded."""

    encoder: str
    """Folder or hub id of a dual encoder."""
    batch_size: int = Field(default=64, ge=1)
    """Images, or captions, in one pass of a tower."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the towers; embeddings are stored as float32."""
    num_actors: int = Field(default=0, ge=0)
    """Workers, each with its own encoder; 0 means one for each GPU, or for each CPU core where memory allows."""
    cpus_per_actor: int = Field(default=0, ge=0)
    """CPU cores of one worker; 0 shares the cores among the workers."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs of one worker, a fraction for small models; None means one where there are GPUs."""
    decode_threads: int = Field(default=0, ge=0)
    """Threads of one worker that decode the next images meanwhile; 0 means one for each of its CPU cores. More than these
    are slower: a thread that decodes and the one that runs the towers take the interpreter from each other."""
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
            "max_pixels": self.max_pixels,
            "read": self.read,
            "statistics": ("sharpness",),
        }


class Encoder(Protocol):
    """What the stage asks of `models.encoders.DualEncoder`."""

    dimension: int
    fingerprint: str

    def preprocess_images(self, images: Any) -> Any: ...
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


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a worker says of a shard: counts and times."""

    rows: int
    images: int = 0
    texts: int = 0
    began: float = 0.0
    """Clock time when the encoder was ready and the shard was begun; 0 for a chunk that was there already."""
    ended: float = 0.0
    startup: float = 0.0
    """Seconds to build the encoder, where this task did it."""
    worker: str = ""
    fingerprint: str = ""


@dataclass
class EmbedWorker:
    """An actor: its encoder is built at the first shard that needs one."""

    config: EmbedConfig
    encoder: str
    device: str
    load_encoder: EncoderLoader
    startup: float = 0.0

    def __call__(self, task: ShardTask) -> ShardResult:
        images, texts = read_owned(task.chunks / "owned.arrow", task.position)
        owned = digest(images.tobytes() + b"|" + texts.tobytes()).hex()
        mark = fingerprint([task.fingerprint, self.encoder, self.config.content(), owned])
        if has_fingerprint(task.embed_chunk, mark):
            return ShardResult(rows=task.rows)
        startup = self._start() if len(images) + len(texts) else 0.0
        began = time.time()
        write_embedded(task.embed_chunk, mark, self._images(task, images), self._texts(task, texts))
        return ShardResult(
            rows=task.rows,
            images=len(images),
            texts=len(texts),
            began=began,
            ended=time.time(),
            startup=startup,
            worker=f"{os.uname().nodename}:{os.getpid()}",
            fingerprint=self._encoder.fingerprint if len(images) + len(texts) else "",
        )

    @cached_property
    def _encoder(self) -> Encoder:
        return self.load_encoder(self.config, self.device)

    def _start(self) -> float:
        began = time.monotonic()
        _ = self._encoder
        return time.monotonic() - began

    def _images(self, task: ShardTask, owned: Digests) -> Embedded:
        wanted = _rows_by_digest(owned)
        collected = _Collector(owned, self._dimension(owned))
        batches = _encoded_images(task, self.config.read, wanted, self.config.batch_size)
        for rows, sharp, pixels, failures in self._ahead(batches, self._decode):
            for row, reason in failures:
                collected.fail(row, reason)
            if rows:
                collected.sharpness[rows] = sharp
                collected.add(rows, self._encoder.encode_image(pixels).cpu().numpy())
        return collected.result(task)

    def _decode(
        self, batch: list[tuple[int, bytes]]
    ) -> tuple[list[int], list[float], Any, list[tuple[int, str]]]:
        rows, sharp, images, failures = [], [], [], []
        for row, data in batch:
            try:
                images.append(decode_image(data, self.config.max_pixels))
                sharp.append(sharpness(images[-1]))
                rows.append(row)
            except RejectedImage as error:
                failures.append((row, str(error)))
        return rows, sharp, self._encoder.preprocess_images(images) if images else None, failures

    def _texts(self, task: ShardTask, owned: Digests) -> Embedded:
        collected = _Collector(owned, self._dimension(owned))
        captions = _captions(task.index_chunk, owned)
        # Captions of like length share a batch, so that little is padded.
        order = sorted(range(len(owned)), key=lambda row: len(captions[row]))
        size = self.config.batch_size
        batches = ([(row, captions[row]) for row in order[i : i + size]] for i in range(0, len(order), size))
        for rows, tokens, truncated in self._ahead(batches, self._tokenize):
            collected.add(rows, self._encoder.encode_text(tokens).cpu().numpy())
            collected.truncated[rows] = truncated
        return collected.result(task)

    def _tokenize(self, batch: list[tuple[int, str]]) -> tuple[list[int], Any, list[bool]]:
        tokens, truncated = self._encoder.tokenize([caption for _, caption in batch])
        return [row for row, _ in batch], tokens, truncated

    def _ahead(self, batches: Iterator[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
        threads = max(1, self.config.decode_threads)
        return prefetch(batches, work, threads=threads, ahead=threads + 1)

    def _dimension(self, owned: Digests) -> int:
        return self._encoder.dimension if len(owned) else 0


class _Collector:
    """Embeddings of the digests a shard owns, filled in any order."""

    def __init__(self, digests: Digests, dimension: int) -> None:
        self.digests = digests
        self.embeddings = np.zeros((len(digests), dimension), np.float32)
        self.truncated = np.zeros(len(digests), bool)
        self.sharpness = np.full(len(digests), np.nan, np.float32)
        self.reasons: list[str | None] = [None] * len(digests)
        self.seen = np.zeros(len(digests), bool)

    def add(self, rows: list[int], embeddings: Any) -> None:
        self.embeddings[rows] = embeddings
        self.seen[rows] = True
        for row, finite in zip(rows, np.isfinite(embeddings).all(axis=1), strict=True):
            if not finite:
                self.fail(row, "the embedding is not finite")

    def fail(self, row: int, reason: str) -> None:
        self.reasons[row] = reason
        self.seen[row] = True

    def result(self, task: ShardTask) -> Embedded:
        if not self.seen.all():
            raise InputError(f"{task.name} has changed while it was being read; run again when it is at rest")
        return Embedded(
            digests=self.digests,
            embeddings=self.embeddings,
            truncated=self.truncated,
            reasons=self.reasons,
            sharpness=self.sharpness,
        )


def _encoded_images(
    task: ShardTask, read: ReadOptions, wanted: dict[bytes, int], size: int
) -> Iterator[list[tuple[int, bytes]]]:
    """The wanted images of a shard as (row, encoded bytes), in batches; each once."""
    batch = []
    wanted = dict(wanted)
    for item in read_shard(task.shard, read, seed=task.seed) if wanted else ():
        if not isinstance(item, Sample):
            continue
        row = wanted.pop(digest(item.image), None)
        if row is not None:
            batch.append((row, item.image))
        if len(batch) == size or (batch and not wanted):
            yield batch
            batch = []
        if not wanted:
            return
    if batch:
        yield batch


def _captions(index_chunk: Path, owned: Digests) -> list[str]:
    """The captions of the owned digests, in their order."""
    table = read_index(index_chunk, ["text", "caption", "reason"])
    digests = digests_of(table["text"])
    rows = np.flatnonzero(is_pair(table))
    held, first = np.unique(digests[rows], return_index=True)
    captions: list[str] = table["caption"].take(rows[first[np.searchsorted(held, owned)]]).to_pylist()
    return captions


def _rows_by_digest(owned: Digests) -> dict[bytes, int]:
    names = owned.tobytes()
    return {names[16 * row : 16 * row + 16]: row for row in range(len(owned))}
