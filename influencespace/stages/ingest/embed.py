"""The embed stage: from shards to unit embeddings of each distinct image and caption, in canonical order.

Three steps, each resumed at its last finished shard: *index* reads the shards without decoding, *encode* runs
the towers on what each shard owns, *merge* builds the artifact. The driver sees shards and counts, but
never pairs.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from influencespace.data.artifacts import fingerprint, folder_digest
from influencespace.data.chunks import write_owned
from influencespace.data.merge import MergeReport, merge
from influencespace.engine.local import Engine
from influencespace.engine.placement import Resources, Share, share
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.ingest.encode import EmbedConfig, EmbedWorker, EncoderLoader, ShardResult, load
from influencespace.stages.ingest.imports import import_chunks, imported_identity
from influencespace.stages.ingest.index import ShardTask, index
from influencespace.stages.ingest.shards import role_shards, shard_identities

# A worker with torch, transformers and Ray takes about 0.8 GB before its encoder; the rest is for its batches.
LIBRARY_BYTES = 3 * 2**29
# An encoder from the hub, seen only by the workers: a ViT-L/14 in float32.
UNKNOWN_ENCODER_BYTES = 7 * 2**28


def encoder_identity(encoder: str) -> str:
    """A digest of the files of a local encoder, wherever it lies; a hub id stands for itself."""
    folder = Path(encoder).expanduser()
    return folder_digest(folder) if folder.is_dir() else encoder


def embed_share(config: EmbedConfig, engine: Engine, tasks: int) -> Share:
    """Fill what `config` leaves open: how many workers there are, and what each has.

    On CPUs many workers of one thread beat few of many: on a busy machine of 2 cores 2 x 1 embedded 125 pairs
    a second and 1 x 2 only 56 (MobileNetV2 and MiniLM), as no thread ever waits for another.
    """
    machines = engine.machines
    gpus = config.gpus_per_actor
    if gpus is None:
        gpus = float(any(machine.gpus >= 1 for machine in machines))
    # what a worker may need is an estimate, and no reason to refuse a machine that has less
    memory = min(worker_bytes(config), max(machine.memory for machine in machines))
    need = Resources(cpus=config.cpus_per_actor, gpus=gpus, memory=0 if gpus else memory)
    return share(machines, tasks, need=need, workers=config.num_actors, max_cpus=engine.cores_per_task)


def worker_bytes(config: EmbedConfig) -> int:
    """Memory that a worker on CPUs may need: its libraries and batches, and its weights twice while they load."""
    weights = sum(file.stat().st_size for file in Path(config.encoder).expanduser().glob("*.safetensors"))
    return LIBRARY_BYTES + 2 * (weights or UNKNOWN_ENCODER_BYTES)


@dataclass
class Embed(Stage):
    """Embeds the pairs of a role, or imports embeddings of the pool; the artifact is `data.embeddings.EmbeddingTable`.

    Raises InputError for an encoder or a shard that cannot be used at all.
    """

    role: str
    load_encoder: EncoderLoader = load
    version = 3

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
        return {"encoder": encoder_identity(run.config.embed.encoder)} | data

    def resources(self, run: Run) -> Resources:
        """Of an encoder's worker; where cores are left open, its machine may give it more than one."""
        config: EmbedConfig = run.config.embed
        return Resources(cpus=config.cpus_per_actor or 1, gpus=config.gpus_per_actor or 0)

    def chunks(self, run: Run) -> Path:
        """What each shard has given so far; every file knows the shard that it is of."""
        folder = run.at(self.name)
        return folder.with_name(f"{folder.name}.chunks")

    def work(self, run: Run, workers: Workers) -> Details:
        shards = role_shards(run.config, self.role)
        embed, chunks = run.config.embed, self.chunks(run)
        tasks = index(shards, embed.read, run.seed, chunks, workers) if shards else []
        index_chunks = [task.index_chunk for task in tasks]
        if self.imports(run.config):
            shutil.rmtree(chunks / "provided", ignore_errors=True)
            job = partial(
                import_chunks, run.config.data.embeddings, embed.read, chunks, index_chunks, workers.folder
            )
            return details_of(workers.once(job))
        workers.once(partial(write_owned, chunks / "owned.arrow", index_chunks))
        results = self._encode(run, tasks, workers)
        embed_chunks = [task.embed_chunk for task in tasks]
        report = workers.once(partial(merge, workers.folder, index_chunks, embed_chunks))
        return details_of(report, **_rates(results))

    def _encode(self, run: Run, tasks: Sequence[ShardTask], workers: Workers) -> list[ShardResult]:
        config: EmbedConfig = run.config.embed
        placed = embed_share(config, workers.engine, len(tasks))
        config = replace(config, decode_threads=config.decode_threads or int(placed.resources.cpus))
        factory = partial(
            EmbedWorker,
            config=config,
            encoder=encoder_identity(config.encoder),
            device=placed.device,
            load_encoder=self.load_encoder,
        )
        results = []
        with workers.progress(sum(task.rows for task in tasks)) as bar:
            for result in workers.engine.map(
                factory, tasks, workers=placed.workers, resources=placed.resources
            ):
                results.append(result)
                bar.advance(result.rows)
        return results

    def tidy(self, run: Run) -> None:
        if not run.config.embed.keep_chunks:
            shutil.rmtree(self.chunks(run), ignore_errors=True)


def details_of(report: MergeReport, **details: Any) -> Details:
    """What a merge counted."""
    return Details(
        rows_in=report.rows_in,
        rows_out=report.rows_out,
        rejected=report.rejected,
        details=report.details | details,
    )


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
