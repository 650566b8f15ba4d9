"""Reading the shards a first time, without decoding: who the pairs are, and what each shard has to embed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from influencespace.data.artifacts import fingerprint
from influencespace.data.chunks import has_fingerprint, pair_rows, read_index, write_index
from influencespace.data.readers import read_shard
from influencespace.data.schema import ReadOptions, Shard
from influencespace.engine.placement import Resources
from influencespace.run import Workers
from influencespace.stages.ingest.shards import shard_identities


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard, and where its chunks lie."""

    shard: Shard
    position: int
    fingerprint: str
    chunks: Path
    seed: int = 0
    rows: int = 0

    @property
    def name(self) -> str:
        return self.shard.path

    @property
    def index_chunk(self) -> Path:
        return self.chunks / f"{self.shard.name}.index.arrow"

    @property
    def embed_chunk(self) -> Path:
        return self.chunks / f"{self.shard.name}.embed.arrow"


def index(
    shards: Sequence[Shard], read: ReadOptions, seed: int, chunks: Path, workers: Workers
) -> list[ShardTask]:
    """Write the index chunk of each shard that has none; the tasks, with the rows of each."""
    # The file names of the chunks must not depend on the caller's numbers, which may repeat.
    shards = [replace(shard, index=position) for position, shard in enumerate(shards)]
    drawn = seed if read.captions == "choice" else None
    marks = [fingerprint([mark, read, drawn]) for mark in shard_identities(shards)]
    tasks = [
        ShardTask(shard=shard, position=position, fingerprint=mark, chunks=chunks, seed=seed)
        for position, (shard, mark) in enumerate(zip(shards, marks, strict=True))
    ]
    jobs = [partial(index_shard, task, read) for task in tasks]
    rows = dict(workers.map(jobs, unit="shards", label="index", resources=Resources()))
    return [replace(task, rows=rows[task.position]) for task in tasks]


def index_shard(task: ShardTask, read: ReadOptions) -> tuple[int, int]:
    """Read a shard, keep digests and captions; its position and rows."""
    if not has_fingerprint(task.index_chunk, task.fingerprint):
        rows = pair_rows(task.shard.path, read_shard(task.shard, read, seed=task.seed))
        write_index(task.index_chunk, task.fingerprint, rows)
    return task.position, len(read_index(task.index_chunk, ["uid"]))
