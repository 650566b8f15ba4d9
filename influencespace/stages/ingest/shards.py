"""Where the pairs are: the shards of every role, and what tells that their files have changed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import fsspec
from pydantic.dataclasses import dataclass as options

from influencespace.data.artifacts import fingerprint
from influencespace.data.readers import list_shards
from influencespace.data.schema import Shard
from influencespace.errors import STRICT, InputError

ROLES = ("pool", "target", "test")
# Shards whose size and date are looked up at once: object stores answer in some 50 ms.
LOOKUPS = 32


@options(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Where the pairs are: paths, folders, globs or fsspec URLs of WebDataset tars, Parquet files, a COCO caption JSON or class
    folders."""

    pool: str | tuple[str, ...] = ""
    """What is curated."""
    target: str | tuple[str, ...] | None = None
    """Pairs whose loss is to fall; without it a seeded part of the pool is set apart."""
    test: str | tuple[str, ...] | None = None
    """Pairs on which the result is judged; without it half of the target's images."""
    images: str | None = None
    """Image folder of a COCO caption file, where it is not in the official place."""
    embeddings: str | None = None
    """Embeddings of the pool that exist already (clip-retrieval, DataComp or Parquet), joined by uid."""


def roles_of(config: Any) -> list[str]:
    """The roles that have data of their own: the pool always has."""
    return [role for role in ROLES if role == "pool" or getattr(config.data, role)]


def role_shards(config: Any, role: str) -> list[Shard]:
    """The shards of a role; none of embeddings that come without pictures."""
    spec = getattr(config.data, role)
    return list_shards(spec, config.data.images) if spec else []


def shards_of(config: Any) -> dict[str, list[Shard]]:
    """The shards of every role that has data of its own; all paths are looked up before the first is read."""
    return {role: role_shards(config, role) for role in roles_of(config)}


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


def amounts(shards: Sequence[Shard]) -> tuple[list[int], str]:
    """How much there is to read in each shard, for the progress shown: MB of files, or images of folders and caption files."""
    if any(shard.format in ("coco", "class_folder") for shard in shards):
        return [shard.rows[1] - shard.rows[0] if shard.rows else 1 for shard in shards], "images"
    with ThreadPoolExecutor(LOOKUPS) as executor:
        sizes = list(executor.map(lambda shard: int(file_version(shard.path).get("size", 0)), shards))
    of_file = {path: max(1, sum(shard.path == path for shard in shards)) for path in {s.path for s in shards}}
    return [round(size / 1e6 / of_file[shard.path]) for shard, size in zip(shards, sizes, strict=True)], "MB"
