"""The embed stage: from shards to unit embeddings of each distinct image and caption, in canonical order.

Three steps, each resumed at its last finished shard: *index* reads the shards without decoding, *embed* runs
the towers on what each shard owns, *consolidate* builds the artifact. The driver sees shards and counts, but
never pairs.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from dataclasses import field as plain_field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import fsspec
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as validated_dataclass

from influencespace.data.artifacts import (
    Manifest,
    file_digest,
    fingerprint,
    folder_digest,
    installed_versions,
    is_done,
    read_manifest,
    reopen,
    write_manifest,
)
from influencespace.data.consolidate import FILES, Consolidated, Given, consolidate
from influencespace.data.images import RejectedImage, decode_image
from influencespace.data.parts import (
    Digests,
    Embedded,
    digests_of,
    has_fingerprint,
    is_pair,
    pair_rows,
    read_index,
    read_owned,
    write_embedded,
    write_index,
    write_owned,
)
from influencespace.data.readers import read_shard
from influencespace.data.schema import ReadOptions, Sample, Shard
from influencespace.data.uids import digest
from influencespace.errors import InputError
from influencespace.stages.prefetch import prefetch
from influencespace.stages.progress import progress
from influencespace.stages.runtime import Runtime, run_once

# Shards whose size and date are looked up at once: object stores answer in some 50 ms.
LOOKUPS = 32
# A worker with torch, transformers and Ray takes about 0.8 GB before its encoder; the rest is for its batches.
LIBRARY_BYTES = 3 * 2**29
# An encoder from the hub, seen only by the workers: a ViT-L/14 in float32.
UNKNOWN_ENCODER_BYTES = 7 * 2**28


@validated_dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How pairs are read and embedded."""

    encoder: str
    """Folder or hub id of a dual encoder."""
    batch_size: int = Field(64, ge=1)
    """Images, or captions, in one pass of a tower."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the towers; embeddings are stored as float32."""
    num_actors: int = Field(0, ge=0)
    """Workers, each with its own encoder; 0 means one for each GPU, or for each CPU core where memory allows."""
    cpus_per_actor: int = Field(0, ge=0)
    """CPU cores of one worker; 0 shares the cores among the workers."""
    gpus_per_actor: float | None = Field(None, ge=0)
    """GPUs of one worker, a fraction for small models; None means one where there are GPUs."""
    decode_threads: int = Field(2, ge=1)
    """Threads of one worker that decode the next images meanwhile."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Larger images are rejected, unread."""
    trust_remote_code: bool = False
    """Run code that comes with the encoder."""
    keep_parts: bool = False
    """Keep the parts of the shards, the size of the result again, once it is complete."""
    read: ReadOptions = plain_field(default_factory=ReadOptions)

    def content(self) -> dict[str, Any]:
        """What the embeddings depend on: not on who computes them, or how many at once."""
        return {"dtype": self.dtype, "max_pixels": self.max_pixels, "read": self.read}


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


def embed(
    shards: Sequence[Shard],
    config: EmbedConfig,
    out: Path,
    runtime: Runtime,
    *,
    load_encoder: EncoderLoader = load,
) -> Manifest:
    """Embed all pairs of `shards` into the artifact `out`; does nothing where that is done already.

    Raises InputError for an encoder or a shard that cannot be used at all.
    """
    started = time.monotonic()
    inputs = {
        "encoder": encoder_identity(config.encoder),
        "data": fingerprint(sorted(shard_identities(shards))),
    }
    mark = fingerprint({"stage": "embed", "config": config.content(), "inputs": inputs})
    if is_done(out, mark):
        return finished(out)
    parts = reopen(out) / "parts"
    tasks = index(shards, config.read, parts, runtime)
    owned = parts / "owned.arrow"
    run_once(runtime, partial(write_owned, owned, [task.index_part for task in tasks]))
    results = _embed_shards(tasks, inputs["encoder"], config, runtime, load_encoder)
    done = run_once(
        runtime,
        partial(finish, out, [task.index_part for task in tasks], [task.embed_part for task in tasks]),
    )
    return conclude(
        out,
        done,
        Manifest(stage="embed", fingerprint=mark, inputs=inputs, details=_rates(results)),
        started,
        keep_parts=config.keep_parts,
    )


# Identities


def encoder_identity(encoder: str) -> str:
    """A digest of the files of a local encoder, wherever it lies; a hub id stands for itself."""
    folder = Path(encoder).expanduser()
    return folder_digest(folder) if folder.is_dir() else encoder


def shard_identities(shards: Sequence[Shard]) -> list[str]:
    """A fingerprint for each shard of where it lies, which rows it takes, and the file's size and date.

    Raises InputError when there is no shard, or one cannot be found.
    """
    if not shards:
        raise InputError("there are no shards to read")
    with ThreadPoolExecutor(LOOKUPS) as executor:
        return list(executor.map(_shard_identity, shards))


def _shard_identity(shard: Shard) -> str:
    return fingerprint([replace(shard, index=0, path=""), file_version(shard.path)])


def file_version(url: str) -> dict[str, str]:
    """Where a file lies, and what its file system says that changes with its content.

    Raises InputError when it cannot be found.
    """
    filesystem, path = fsspec.url_to_fs(url)
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        raise InputError(f"{url} is gone since the files were listed") from None
    names = ("size", "mtime", "ETag", "etag", "md5Hash")
    return {"path": path} | {name: str(info[name]) for name in names if name in info}


# Index


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard, and where its parts lie."""

    shard: Shard
    position: int
    fingerprint: str
    parts: Path
    rows: int = 0

    @property
    def name(self) -> str:
        return self.shard.path

    @property
    def index_part(self) -> Path:
        return self.parts / f"{self.shard.name}.index.arrow"

    @property
    def embed_part(self) -> Path:
        return self.parts / f"{self.shard.name}.embed.arrow"


def index(shards: Sequence[Shard], read: ReadOptions, parts: Path, runtime: Runtime) -> list[ShardTask]:
    """Write the index part of each shard that has none; the tasks, with the rows of each."""
    # The file names of the parts must not depend on the caller's numbers, which may repeat.
    shards = [replace(shard, index=position) for position, shard in enumerate(shards)]
    marks = [fingerprint([mark, read]) for mark in shard_identities(shards)]
    tasks = [
        ShardTask(shard=shard, position=position, fingerprint=mark, parts=parts)
        for position, (shard, mark) in enumerate(zip(shards, marks, strict=True))
    ]
    rows = {}
    with progress("index", len(tasks), "shards") as bar:
        actors = min(runtime.cores, len(tasks))
        for position, count in runtime.map(IndexWorker(read), tasks, num_actors=actors):
            rows[position] = count
            bar.advance()
    return [replace(task, rows=rows[task.position]) for task in tasks]


@dataclass(frozen=True)
class IndexWorker:
    """Recipe and worker: reads a shard, keeps digests and captions."""

    read: ReadOptions

    def __call__(self) -> Callable[[ShardTask], tuple[int, int]]:
        return self.work

    def work(self, task: ShardTask) -> tuple[int, int]:
        if not has_fingerprint(task.index_part, task.fingerprint):
            rows = pair_rows(task.shard.path, read_shard(task.shard, self.read))
            write_index(task.index_part, task.fingerprint, rows)
        return task.position, len(read_index(task.index_part, ["uid"]))


# Embed


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a worker says of a shard: counts and times."""

    rows: int
    images: int = 0
    texts: int = 0
    began: float = 0.0
    """Clock time when the encoder was ready and the shard was begun; 0 for a part that was there already."""
    ended: float = 0.0
    startup: float = 0.0
    """Seconds to build the encoder, where this task did it."""
    worker: str = ""
    fingerprint: str = ""


def _embed_shards(
    tasks: Sequence[ShardTask],
    encoder: str,
    config: EmbedConfig,
    runtime: Runtime,
    load_encoder: EncoderLoader,
) -> list[ShardResult]:
    workers = share(config, runtime, len(tasks))
    recipe = partial(
        EmbedWorker, config=config, encoder=encoder, device=workers.device, load_encoder=load_encoder
    )
    results = []
    with progress("embed", sum(task.rows for task in tasks), "pairs") as bar:
        for result in runtime.map(
            recipe,
            tasks,
            num_actors=workers.num_actors,
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
        ):
            results.append(result)
            bar.advance(result.rows)
    return results


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How the machines are shared among the workers."""

    num_actors: int
    num_cpus: int
    num_gpus: float

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"


def share(config: EmbedConfig, runtime: Runtime, tasks: int) -> Workers:
    """Fill what `config` leaves open.

    On CPUs many workers of one thread beat few of many: 2 x 1 embeds 1.6 times as much as 1 x 2 (MobileNetV2 and
    MiniLM on a busy machine of 2 cores), as no thread ever waits for another.
    """
    gpus = config.gpus_per_actor if config.gpus_per_actor is not None else float(runtime.gpus > 0)
    if gpus:
        fitting = int(runtime.gpus / gpus)
    else:
        fitting = min(runtime.cores // (config.cpus_per_actor or 1), runtime.memory // worker_bytes(config))
    num_actors = max(1, min(config.num_actors or fitting, tasks))
    num_cpus = config.cpus_per_actor or max(1, runtime.cores // num_actors)
    return Workers(num_actors=num_actors, num_cpus=num_cpus, num_gpus=gpus)


def worker_bytes(config: EmbedConfig) -> int:
    """Memory that a worker on CPUs may need: its libraries and batches, and its weights twice while they load."""
    weights = sum(file.stat().st_size for file in Path(config.encoder).expanduser().glob("*.safetensors"))
    return LIBRARY_BYTES + 2 * (weights or UNKNOWN_ENCODER_BYTES)


@dataclass
class EmbedWorker:
    """An actor: its encoder is built at the first shard that needs one."""

    config: EmbedConfig
    encoder: str
    device: str
    load_encoder: EncoderLoader
    startup: float = 0.0

    def __call__(self, task: ShardTask) -> ShardResult:
        images, texts = read_owned(task.parts / "owned.arrow", task.position)
        owned = digest(images.tobytes() + b"|" + texts.tobytes()).hex()
        mark = fingerprint([task.fingerprint, self.encoder, self.config.content(), owned])
        if has_fingerprint(task.embed_part, mark):
            return ShardResult(rows=task.rows)
        startup = self._start() if len(images) + len(texts) else 0.0
        began = time.time()
        write_embedded(task.embed_part, mark, self._images(task, images), self._texts(task, texts))
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
        batches = _encoded_images(task.shard, self.config.read, wanted, self.config.batch_size)
        for rows, pixels, failures in self._ahead(batches, self._decode):
            for row, reason in failures:
                collected.fail(row, reason)
            if rows:
                collected.add(rows, self._encoder.encode_image(pixels).cpu().numpy())
        return collected.result(task)

    def _decode(self, batch: list[tuple[int, bytes]]) -> tuple[list[int], Any, list[tuple[int, str]]]:
        rows, images, failures = [], [], []
        for row, data in batch:
            try:
                images.append(decode_image(data, self.config.max_pixels))
                rows.append(row)
            except RejectedImage as error:
                failures.append((row, str(error)))
        return rows, self._encoder.preprocess_images(images) if images else None, failures

    def _texts(self, task: ShardTask, owned: Digests) -> Embedded:
        collected = _Collector(owned, self._dimension(owned))
        captions = _captions(task.index_part, owned)
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
        threads = self.config.decode_threads
        return prefetch(batches, work, threads=threads, ahead=threads + 1)

    def _dimension(self, owned: Digests) -> int:
        return self._encoder.dimension if len(owned) else 0


class _Collector:
    """Embeddings of the digests a shard owns, filled in any order."""

    def __init__(self, digests: Digests, dimension: int) -> None:
        self.digests = digests
        self.embeddings = np.zeros((len(digests), dimension), np.float32)
        self.truncated = np.zeros(len(digests), bool)
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
        )


def _encoded_images(
    shard: Shard, read: ReadOptions, wanted: dict[bytes, int], size: int
) -> Iterator[list[tuple[int, bytes]]]:
    """The wanted images of a shard as (row, encoded bytes), in batches; each once."""
    batch = []
    wanted = dict(wanted)
    for item in read_shard(shard, read) if wanted else ():
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


def _captions(index_part: Path, owned: Digests) -> list[str]:
    """The captions of the owned digests, in their order."""
    table = read_index(index_part, ["text", "caption", "reason"])
    digests = digests_of(table["text"])
    rows = np.flatnonzero(is_pair(table))
    held, first = np.unique(digests[rows], return_index=True)
    captions: list[str] = table["caption"].take(rows[first[np.searchsorted(held, owned)]]).to_pylist()
    return captions


def _rows_by_digest(owned: Digests) -> dict[bytes, int]:
    names = owned.tobytes()
    return {names[16 * row : 16 * row + 16]: row for row in range(len(owned))}


# Conclusion


def finish(
    out: Path, index_parts: Sequence[Path], embed_parts: Sequence[Path], given: Given | None = None
) -> tuple[Consolidated, dict[str, str]]:
    """Consolidate the parts; the counts, and a digest of each file."""
    done = consolidate(out, index_parts, embed_parts, given)
    return done, {name: file_digest(out / name) for name in FILES}


def conclude(
    out: Path,
    done: tuple[Consolidated, dict[str, str]],
    draft: Manifest,
    started: float,
    *,
    keep_parts: bool,
) -> Manifest:
    """Write the manifest, completed by what was counted; then the parts have served."""
    counted, files = done
    manifest = replace(
        draft,
        rows_in=counted.rows_in,
        rows_out=counted.rows_out,
        rejected=counted.rejected,
        files=files,
        versions=installed_versions(),
        seconds=round(time.monotonic() - started, 3),
        details=counted.details | draft.details,
    )
    write_manifest(out, manifest)
    if not keep_parts:
        shutil.rmtree(out / "parts")
    return manifest


def finished(out: Path) -> Manifest:
    """The manifest of an artifact that is known to be done."""
    manifest = read_manifest(out)
    assert manifest is not None
    return manifest


def _rates(results: Sequence[ShardResult]) -> dict[str, Any]:
    """Start-up apart from the steady state; only shards that were embedded now count."""
    new = [result for result in results if result.began]
    seconds = max((r.ended for r in new), default=0.0) - min((r.began for r in new), default=0.0)
    return {
        "workers": len({result.worker for result in new}),
        "startup_seconds": round(max((result.startup for result in new), default=0.0), 3),
        "steady_seconds": round(seconds, 3),
        "pairs_per_second": round(sum(result.rows for result in new) / seconds, 3) if seconds else 0.0,
        "resumed_shards": len(results) - len(new),
        "encoder_fingerprint": next((result.fingerprint for result in new if result.fingerprint), ""),
    }
