"""The embed stage: from shards to unit embeddings of every pair, in canonical order, in buckets.

Two steps. *Ingest* reads every shard once: readers decode, resize and tokenise, encoders run the towers and commit chunks.
*Merge* sorts the chunks' pairs into buckets, one task each. The driver sees shards, chunks and counts, but never pairs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from influencespace.data.artifacts import fingerprint, folder_digest, remove, write_json
from influencespace.data.bucket_files import BUCKET_PAIRS, buckets_for
from influencespace.data.chunks import ChunkFolder, dimension_of
from influencespace.data.images import decoding_bytes
from influencespace.data.imported import import_options, list_chunks
from influencespace.data.merge import (
    BucketReport,
    MergeBucket,
    MergeRun,
    chunks_of_run,
    join_rejected,
    merge_bytes,
)
from influencespace.data.mirror import exists, here
from influencespace.engine.local import AtOnce, Engine, run_task
from influencespace.engine.placement import LIBRARY_BYTES, Resources, Share, fitting, share
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.ingest.decode import CHUNK_IMAGES, PreprocessingLoader, ReadChunks, ShardTask
from influencespace.stages.ingest.encode import (
    ChunkResult,
    EmbedConfig,
    EncodeChunks,
    EncoderLoader,
    ProbeBatch,
    load,
    load_preprocessing,
)
from influencespace.stages.ingest.imports import (
    CHUNK_PAIRS,
    ImportFile,
    IndexShard,
    files_of,
    import_bytes,
    imported_identity,
    same_dimension,
)
from influencespace.stages.ingest.shards import amounts, file_version, role_shards, shard_identities


def encoder_identity(encoder: str) -> str:
    """A digest of the files of a local encoder, wherever it lies; a hub id stands for itself."""
    folder = Path(encoder).expanduser()
    return folder_digest(folder) if folder.is_dir() else encoder


# How quickly a role was embedded, as its manifest and the report have it.
RATES = ("images_per_second", "images_per_second_per_gpu", "bytes_read", "encoders_busy")

# A worker with torch, transformers and Ray takes about 0.8 GB before its encoder; the rest is for its batches.
ENCODER_LIBRARY_BYTES = 3 * 2**29
# What CUDA and its libraries take of the machine's own memory.
CUDA_BYTES = 2**31
# A reader with torch and transformers takes 0.6 GB; the rest is for its chunk.
READER_LIBRARY_BYTES = 7 * 2**27
# Edge of an encoder's input, where only its workers know it.
USUAL_INPUT = 224
# Of a chunk of web pictures, about: how many encoders have work at all.
CHUNK_MB = 10
# An encoder from the hub, seen only by the workers: a ViT-L/14 in float32.
UNKNOWN_ENCODER_BYTES = 7 * 2**28


def embed_share(config: EmbedConfig, engine: Engine, tasks: int) -> Share:
    """Fill what `config` leaves open: how many workers there are, and what each has.

    On CPUs many workers of one thread beat few of many: on a busy machine of 2 cores 2 x 1 embedded 125 pairs
    a second and 1 x 2 only 56 (MobileNetV2 and MiniLM), as no thread ever waits for another.
    """
    machines = engine.machines
    gpus = config.gpus_per_actor
    if gpus is None:
        gpus = float(any(machine.gpus >= 1 for machine in machines))
    # what a worker may need is an estimate, and no reason to refuse a machine that has less, or to leave a GPU without one
    if gpus:
        shares = [int(m.memory * gpus / m.gpus / 2) for m in machines if m.gpus >= gpus]
        memory = min([worker_bytes(config) + CUDA_BYTES, *shares])
    else:
        memory = fitting(worker_bytes(config), machines)
    need = Resources(cpus=config.cpus_per_actor, gpus=gpus, memory=memory)
    # beside a GPU one core is enough: readers need the others
    most = 1 if gpus else engine.cores_per_task
    return share(machines, tasks, need=need, workers=config.num_actors, max_cpus=most)


def encoders_at_once(config: EmbedConfig, placed: Share, chunks: int) -> AtOnce:
    """As many encoders as there is room for now, and more on machines that come later, up to one for each chunk; a number that
    was asked for stays."""
    return placed.workers, config.num_actors or max(placed.workers, chunks)


def worker_bytes(config: EmbedConfig) -> int:
    """Memory of the machine that a worker may need: its libraries and batches, and its weights twice while they load."""
    weights = sum(file.stat().st_size for file in Path(config.encoder).expanduser().glob("*.safetensors"))
    return ENCODER_LIBRARY_BYTES + 2 * (weights or UNKNOWN_ENCODER_BYTES)


def reader_bytes(config: EmbedConfig) -> int:
    """Memory that a reader may need: its libraries, a picture that no decoder reduces, and a batch of decoded ones."""
    decoding, held = decoding_bytes(config.max_pixels, USUAL_INPUT)
    return READER_LIBRARY_BYTES + decoding + config.batch_size * held


@dataclass
class Embed(Stage):
    """Embeds the pairs of a role, or imports embeddings of the pool; the artifact is `data.embeddings.EmbeddingTable`.

    Raises InputError for an encoder or a shard that cannot be used at all.
    """

    role: str
    load_encoder: EncoderLoader = load
    load_preprocessing: PreprocessingLoader = load_preprocessing
    bucket_pairs: int = BUCKET_PAIRS
    """Pairs of a bucket, about; no result depends on it."""
    version = 4

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"embed/{self.role}"

    def imports(self, config: Any) -> bool:
        """Whether the role's embeddings are provided."""
        return self.role == "pool" and config.data.embeddings is not None

    def settings(self, config: Any) -> Any:
        embed: EmbedConfig = config.embed
        drawn = config.seed if embed.read.captions == "choice" else None
        return [embed.read, drawn] if self.imports(config) else [embed.content(), drawn]

    def inputs(self, run: Run) -> Mapping[str, str]:
        shards = role_shards(run.config, self.role)
        data = {"data": fingerprint(sorted(shard_identities(shards)))} if shards else {}
        if self.imports(run.config):
            return imported_identity(run.config.data.embeddings) | data
        return data | {"encoder": encoder_identity(run.config.embed.encoder)}

    def resources(self, run: Run) -> Resources:
        """Of an encoder's worker; where cores are left open, its machine may give it more than one."""
        config: EmbedConfig = run.config.embed
        return Resources(cpus=config.cpus_per_actor or 1, gpus=config.gpus_per_actor or 0)

    def chunks(self, run: Run) -> Path:
        """What each shard has given so far, in a folder for each fingerprint of shard and settings."""
        folder = run.at(self.name)
        return folder.with_name(f"{folder.name}.chunks")

    def work(self, run: Run, workers: Workers) -> Details:
        if self.imports(run.config):
            return self._import(run, workers)
        tasks = self._tasks(run, encoder_identity(run.config.embed.encoder))
        results, probed = self._ingest(run, [task for task in tasks if not task.chunks.done], workers)
        report = self._merge(workers, [task.chunks for task in tasks])
        dimension = dimension_of([chunk for task in tasks for chunk in task.chunks.chunks])
        return details_of(report, dimension=dimension, probed=probed, **rates(results))

    def _tasks(self, run: Run, encoder: str) -> list[ShardTask]:
        """One for each shard of the role: what its chunks depend on names their folder."""
        shards = role_shards(run.config, self.role)
        settings = [self.settings(run.config), encoder]
        return [
            ShardTask(shard=shard, chunks=self._chunks(run, [mark, settings]), seed=run.seed)
            for shard, mark in zip(shards, shard_identities(shards) if shards else [], strict=True)
        ]

    def _chunks(self, run: Run, made_from: Any) -> ChunkFolder:
        return ChunkFolder(self.chunks(run) / fingerprint(made_from)[:20])

    def _probed(self, run: Run, placed: Share, workers: Workers) -> dict[str, Any]:
        """What a probe found of the batch on GPUs, once for a run: a batch of another size may give other last digits."""
        if placed.device == "cpu":
            return {}
        config: EmbedConfig = run.config.embed
        encoder = [encoder_identity(config.encoder), config.dtype, config.tf32, config.batch_size]
        path = run.at(f"embed/.batch-{fingerprint(encoder)[:16]}.json")
        if not exists(path):
            probe = ProbeBatch(
                load=self.load_encoder,
                load_preprocessing=self.load_preprocessing,
                config=config,
                device=placed.device,
            )
            (result,) = workers.engine.map(run_task, [probe], resources=placed.resources)
            write_json(path, result)
        found: dict[str, Any] = json.loads(here(path).read_bytes())
        return found

    def _ingest(
        self, run: Run, tasks: Sequence[ShardTask], workers: Workers
    ) -> tuple[list[ChunkResult], dict[str, Any]]:
        """What became of the chunks, and what a probe found."""
        if not tasks:
            return [], {}
        config: EmbedConfig = run.config.embed
        sizes, unit = amounts([task.shard for task in tasks])
        chunks = sum(sizes) // (CHUNK_MB if unit == "MB" else CHUNK_IMAGES) + 1
        placed = embed_share(config, workers.engine, chunks)
        probed = self._probed(run, placed, workers)
        largest = max(machine.memory for machine in workers.engine.machines)
        results, shown = [], 0.0
        with workers.progress(sum(sizes), unit) as bar:
            stream = workers.engine.stream(
                ReadChunks(load=self.load_preprocessing, config=config),
                tasks,
                EncodeChunks(
                    load=self.load_encoder,
                    config=config,
                    device=placed.device,
                    gpus=placed.resources.gpus,
                    image_batch=probed.get("image_batch", 0),
                ),
                workers=encoders_at_once(config, placed, chunks),
                resources=placed.resources,
                readers=Resources(memory=min(reader_bytes(config), largest // 4)),
            )
            for result in stream:
                results.append(result)
                shown += result.bytes_read / 1e6 if unit == "MB" else result.items
                bar.advance(int(shown))
                shown -= int(shown)
        return results, probed

    def _import(self, run: Run, workers: Workers) -> Details:
        read, tasks = run.config.embed.read, self._tasks(run, "")
        options = replace(import_options(read, joined=bool(tasks)), batch_rows=CHUNK_PAIRS)
        imports = []
        for source in list_chunks(run.config.data.embeddings):
            versions = [file_version(name) for name in files_of(source)]
            chunks = self._chunks(run, [versions, options, source.layout])
            imports.append(ImportFile(source=source, options=options, chunks=chunks))
        index = [IndexShard(read=read, task=task) for task in tasks]
        needs = Resources(memory=fitting(import_bytes(), workers.engine.machines))
        read_files = workers.map([*imports, *index], unit="files", label="read", resources=needs)
        dimension = same_dimension(sorted(read_files))
        provided = [one.chunks for one in imports]
        if not tasks:
            return details_of(self._merge(workers, provided), dimension=dimension)
        report = self._merge(workers, [task.chunks for task in tasks], provided)
        return details_of(report, dimension=dimension, unmatched_embeddings=report.unmatched)

    def _merge(
        self, workers: Workers, sources: Sequence[ChunkFolder], provided: Sequence[ChunkFolder] | None = None
    ) -> BucketReport:
        """The buckets of all chunks, with the embeddings that are provided apart."""
        chunks, rows = _paths(sources), sum(one.rows for one in sources)
        count, dimension = buckets_for(rows, self.bucket_pairs), dimension_of(_paths(provided or sources))

        def needs(some: float, **more: Any) -> Resources:
            memory = LIBRARY_BYTES + merge_bytes(int(1.1 * some) + 1, dimension, **more)
            return Resources(memory=fitting(memory, workers.engine.machines))

        if together := chunks_of_run(rows, len(chunks), count):
            runs = [
                MergeRun(chunks=chunks[i : i + together], out=workers.folder / f".run-{i:09d}.arrow")
                for i in range(0, len(chunks), together)
            ]
            of_run = needs(rows / len(runs))
            chunks = sorted(workers.map(runs, unit="runs", label="sort", resources=of_run))
        tasks = [
            MergeBucket(
                folder=workers.folder,
                number=number,
                count=count,
                chunks=chunks,
                provided=None if provided is None else _paths(provided),
            )
            for number in range(count)
        ]
        of_bucket = needs(rows / count, provided=provided is not None)
        reports = dict(workers.map(tasks, unit="buckets", label="merge", resources=of_bucket))
        workers.once(partial(join_rejected, workers.folder, count))
        return sum((reports[number] for number in range(count)), BucketReport())

    def tidy(self, run: Run) -> None:
        if not run.config.embed.keep_chunks:
            remove(self.chunks(run))


def _paths(sources: Sequence[ChunkFolder]) -> list[Path]:
    return [chunk for source in sources for chunk in source.chunks]


def details_of(report: BucketReport, **details: Any) -> Details:
    """What a merge counted."""
    counted = {
        "buckets": report.buckets,
        "groups": report.groups,
        "truncated_captions": report.truncated,
        "exact_copies": report.copies,
    }
    kept = sum(report.buckets)
    return Details(rows_in=report.rows_in, rows_out=kept, rejected=report.rejected, details=counted | details)


def rates(results: Sequence[ChunkResult]) -> dict[str, Any]:
    """Start-up apart from the steady state; only chunks that were embedded now count.

    `encoders_busy` is the share of the steady state for which the encoders' devices computed.
    """
    results = [result for result in results if result.began]
    seconds = max((r.ended for r in results), default=0.0) - min((r.began for r in results), default=0.0)
    rows, images, read = (
        sum(getattr(result, name) for result in results) for name in ("rows", "images", "bytes_read")
    )
    workers = len({result.worker for result in results})
    gpus = sum({result.worker: result.gpus for result in results}.values())
    return {
        "workers": workers,
        "startup_seconds": round(max((result.startup for result in results), default=0.0), 3),
        "steady_seconds": round(seconds, 3),
        "pairs_per_second": round(rows / seconds, 3) if seconds else 0.0,
        "images_per_second": round(images / seconds, 3) if seconds else 0.0,
        "images_per_second_per_gpu": round(images / seconds / gpus, 3) if seconds and gpus else None,
        "bytes_read": read,
        "encoders_busy": round(sum(result.busy for result in results) / seconds / workers, 4)
        if seconds
        else 0.0,
        "encoder_fingerprint": next((result.fingerprint for result in results if result.fingerprint), ""),
    }
