"""Reading the shards a first time, without decoding: who the pairs are, and what each shard has to embed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import fsspec

from influencespace.data.artifacts import fingerprint
from influencespace.data.chunks import has_fingerprint, pair_rows, read_index, write_index
from influencespace.data.readers import read_shard
from influencespace.data.schema import ReadOptions, Shard
from influencespace.engine.local import Engine, run_task
from influencespace.engine.progress import progress
from influencespace.errors import InputError

# Shards whose size and date are looked up at once: object stores answer in some 50 ms.
LOOKUPS = 32


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


def index(shards: Sequence[Shard], read: ReadOptions, parts: Path, engine: Engine) -> list[ShardTask]:
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
        actors = min(engine.cores, len(tasks))
        for position, count in engine.map(
            run_task, [partial(index_shard, task, read) for task in tasks], num_actors=actors
        ):
            rows[position] = count
            bar.advance()
    return [replace(task, rows=rows[task.position]) for task in tasks]


def index_shard(task: ShardTask, read: ReadOptions) -> tuple[int, int]:
    """Read a shard, keep digests and captions; its position and rows."""
    if not has_fingerprint(task.index_part, task.fingerprint):
        rows = pair_rows(task.shard.path, read_shard(task.shard, read))
        write_index(task.index_part, task.fingerprint, rows)
    return task.position, len(read_index(task.index_part, ["uid"]))


def shard_identities(shards: Sequence[Shard]) -> list[str]:
    """A fingerprint for each shard of where it lies, which rows it takes, and the file's size and date.

    Of a folder of pictures the date changes when one is added or removed right in it, not when one is overwritten in place.

    Raises InputError when there is no shard, or one cannot be found.
    """
    if not shards:
        raise InputError("there are no shards to read")
    with ThreadPoolExecutor(LOOKUPS) as executor:
        return list(executor.map(_shard_identity, shards))


def _shard_identity(shard: Shard) -> str:
    places = [shard.path, shard.images] if shard.images else [shard.path]
    return fingerprint([replace(shard, index=0, path=""), *map(file_version, places)])


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
