"""The embed stage: from shards to unit embeddings of each distinct image and caption, in canonical order.

Three steps, each resumed at its last finished shard: *index* reads the shards without decoding, *embed* runs
the towers on what each shard owns, *consolidate* builds the artifact. The driver sees shards and counts, but
never pairs.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from influencespace.data.artifacts import (
    Manifest,
    file_digest,
    fingerprint,
    folder_digest,
    installed_versions,
    reopen,
    write_manifest,
)
from influencespace.data.chunks import write_owned
from influencespace.data.merge import FILES, MergeReport, ProvidedEmbeddings, merge
from influencespace.data.schema import Shard
from influencespace.engine.local import Engine, run_once
from influencespace.engine.progress import progress
from influencespace.stages.finish import finished_stage
from influencespace.stages.ingest.encode import EmbedConfig, EmbedWorker, EncoderLoader, ShardResult, load
from influencespace.stages.ingest.index import ShardTask, index, shard_identities

# A worker with torch, transformers and Ray takes about 0.8 GB before its encoder; the rest is for its batches.
LIBRARY_BYTES = 3 * 2**29
# An encoder from the hub, seen only by the workers: a ViT-L/14 in float32.
UNKNOWN_ENCODER_BYTES = 7 * 2**28


def embed(
    shards: Sequence[Shard],
    config: EmbedConfig,
    out: Path,
    engine: Engine,
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
    if (finished := finished_stage(out, mark)) is not None:
        if not config.keep_parts:
            shutil.rmtree(out / "parts", ignore_errors=True)  # of a run that was killed behind its manifest
        return finished
    parts = reopen(out) / "parts"
    tasks = index(shards, config.read, parts, engine)
    owned = parts / "owned.arrow"
    run_once(engine, partial(write_owned, owned, [task.index_part for task in tasks]))
    results = _embed_shards(tasks, inputs["encoder"], config, engine, load_encoder)
    done = run_once(
        engine,
        partial(finish, out, [task.index_part for task in tasks], [task.embed_part for task in tasks]),
    )
    return conclude(
        out,
        done,
        Manifest(stage="embed", fingerprint=mark, inputs=inputs, details=_rates(results)),
        started,
        keep_parts=config.keep_parts,
    )


def encoder_identity(encoder: str) -> str:
    """A digest of the files of a local encoder, wherever it lies; a hub id stands for itself."""
    folder = Path(encoder).expanduser()
    return folder_digest(folder) if folder.is_dir() else encoder


def _embed_shards(
    tasks: Sequence[ShardTask],
    encoder: str,
    config: EmbedConfig,
    engine: Engine,
    load_encoder: EncoderLoader,
) -> list[ShardResult]:
    workers = share(config, engine, len(tasks))
    config = replace(config, decode_threads=config.decode_threads or workers.num_cpus)
    recipe = partial(
        EmbedWorker, config=config, encoder=encoder, device=workers.device, load_encoder=load_encoder
    )
    results = []
    with progress("embed", sum(task.rows for task in tasks), "pairs") as bar:
        for result in engine.map(
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


def share(config: EmbedConfig, engine: Engine, tasks: int) -> Workers:
    """Fill what `config` leaves open.

    On CPUs many workers of one thread beat few of many: on a busy machine of 2 cores 2 x 1 embedded 125 pairs
    a second and 1 x 2 only 56 (MobileNetV2 and MiniLM), as no thread ever waits for another.
    """
    gpus = config.gpus_per_actor if config.gpus_per_actor is not None else float(engine.gpus > 0)
    if gpus:
        fitting = int(engine.gpus / gpus)
    else:
        fitting = min(engine.cores // (config.cpus_per_actor or 1), engine.memory // worker_bytes(config))
    num_actors = max(1, min(config.num_actors or fitting, tasks))
    num_cpus = config.cpus_per_actor or max(1, min(engine.cores_per_task, engine.cores // num_actors))
    return Workers(num_actors=num_actors, num_cpus=num_cpus, num_gpus=gpus)


def worker_bytes(config: EmbedConfig) -> int:
    """Memory that a worker on CPUs may need: its libraries and batches, and its weights twice while they load."""
    weights = sum(file.stat().st_size for file in Path(config.encoder).expanduser().glob("*.safetensors"))
    return LIBRARY_BYTES + 2 * (weights or UNKNOWN_ENCODER_BYTES)


def finish(
    out: Path,
    index_parts: Sequence[Path],
    embed_parts: Sequence[Path],
    given: ProvidedEmbeddings | None = None,
) -> tuple[MergeReport, dict[str, str]]:
    """Consolidate the parts; the counts, and a digest of each file."""
    done = merge(out, index_parts, embed_parts, given)
    return done, {name: file_digest(out / name) for name in FILES}


def conclude(
    out: Path,
    done: tuple[MergeReport, dict[str, str]],
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
