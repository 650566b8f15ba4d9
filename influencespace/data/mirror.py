"""Folders in object stores: a path below the mirror is the local copy of an object, fetched when read and put when written.

`s3://bucket/run` is worked on as `<root>/influencespace-mirror/s3/bucket/run`. The path alone says so, so that it may be pickled
and used on every node. What the store holds is the truth: a copy carries the version of its object as its time of modification,
and is fetched again where that differs. For any other path each function is the plain call.
"""

import errno
import fnmatch
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from influencespace.data import stores
from influencespace.errors import InputError

T = TypeVar("T")

MIRROR = "influencespace-mirror"
ROOT = "INFLUENCESPACE_MIRROR"
"""Environment variable: the folder in which each machine keeps its mirror."""
READ_ONLY = ("http", "https")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*)|$)")
_COPY = re.compile(rf"(?:/[^/\s]+)*/{MIRROR}/([A-Za-z][A-Za-z0-9+.-]*)/")
_VERSION = ("ETag", "etag", "generation", "LastModified", "mtime", "created")


def mirror_root() -> Path:
    """Where this machine keeps its copies."""
    return Path(os.path.realpath(Path(os.environ.get(ROOT) or "~/.cache").expanduser())) / MIRROR


def is_url(value: Path | str) -> bool:
    """Whether this is a URL; also the `s3:/bucket` that pathlib makes of `s3://bucket`. A single letter is a drive."""
    return _URL.match(str(value)) is not None or "://" in str(value)


def mirrored(url: Path | str) -> Path:
    """The path of a URL's copy, or of a file:// URL itself; raises InputError for one that cannot be written to."""
    match = _URL.match(str(url))
    protocol, key = match.groups("") if match else ("", "")
    parts = key.rstrip("/").split("/")
    if protocol == "file":
        return Path("/", *parts)
    if "::" in str(url) or protocol in READ_ONLY:
        raise InputError(
            f"{url}: no run and no export can be there. Give a folder, or a URL such as s3://bucket/folder"
        )
    if not all(parts) or any(part in (".", "..") for part in parts):
        raise InputError(f"{url}: names no folder. Give a URL such as s3://bucket/folder")
    stores.filesystem(protocol)
    return mirror_root().joinpath(protocol, *parts)


def is_stored(path: Path | str) -> bool:
    """Whether a path is a copy of what lies in an object store."""
    return f"/{MIRROR}/" in str(path)


def url_of(path: Path | str) -> str:
    """The URL of a copy."""
    protocol, _, key = str(path).partition(f"/{MIRROR}/")[2].partition("/")
    return f"{protocol}://{key}"


def shown(text: object) -> str:
    """A path, or a text with paths, for people: URLs instead of their copies."""
    return _COPY.sub(r"\1://", str(text))


def here(path: Path) -> Path:
    """The path itself, to be opened for reading: a copy is fetched where it is missing or its object has changed.

    Raises FileNotFoundError where the store has no such object.
    """
    if is_stored(path):
        found = _found(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url_of(path))
        if not found.is_copied(path):
            with FileLock(_lock_file(path)):  # many workers of one machine may want it at once
                if not found.is_copied(path):
                    _fetch(path, found)
    return path


def is_file(path: Path) -> bool:
    """Whether there is a file, or an object."""
    return _kind(path) == "file" if is_stored(path) else path.is_file()


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or an object below this path."""
    return _kind(path) == "directory" if is_stored(path) else path.is_dir()


def exists(path: Path) -> bool:
    """Whether there is anything."""
    return _kind(path) is not None if is_stored(path) else path.exists()


def is_there(path: Path) -> bool:
    """As `exists`, but a link that leads nowhere counts too."""
    return _kind(path) is not None if is_stored(path) else os.path.lexists(path)


def size_of(path: Path) -> int:
    """Bytes of a file or an object, which is not fetched; raises FileNotFoundError."""
    if not is_stored(path):
        return path.stat().st_size
    found = _found(path)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url_of(path))
    return found.size


def listing(folder: Path, pattern: str = "*") -> list[Path]:
    """What is directly in a folder and matches, sorted; nothing where there is no folder."""
    if not is_stored(folder):
        return sorted(folder.glob(pattern))

    def names(store: Any, url: str) -> set[str]:
        store.invalidate_cache()
        root = store._strip_protocol(url)
        with suppress(FileNotFoundError, NotADirectoryError):
            entries = (str(name).rstrip("/") for name in store.ls(root, detail=False))
            return {name.rpartition("/")[2] for name in entries if name != root}
        return set()

    return [folder / name for name in sorted(ask(folder, names)) if fnmatch.fnmatchcase(name, pattern)]


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    if is_stored(folder):
        return [folder / name for name in sorted(_objects(folder))]
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def all_below(folder: Path) -> list[Path]:
    """All that is below a folder but folders, sorted: also links that lead nowhere."""
    if is_stored(folder):
        return files_below(folder)
    return [path for path in sorted(folder.rglob("*")) if not path.is_dir()]


def sizes_below(folder: Path) -> Mapping[str, int]:
    """Bytes of every object below a folder in a store, by its relative path: many answers by one question."""
    return {name: found.size for name, found in _objects(folder).items()}


def put(source: Path, path: Path) -> None:
    """Make a finished file the object of a path, and mark it as its copy."""
    ask(path, lambda store, url: store.put_file(str(source), url))
    found = _found(path)
    if found is not None:
        found.mark(source)


def put_folder(folder: Path) -> None:
    """Put what was written below a folder of the mirror by other means than `put`."""
    for path in sorted(folder.rglob("*")) if is_stored(folder) else ():
        if path.is_file():
            put(path, path)


def remove_objects(path: Path, first: str, which: Callable[[str], bool] = bool) -> None:
    """Remove the objects below a path, or those whose relative path is one of `which`, and the one of the path itself.

    Those of the name `first` are removed before the others.
    """
    names = [name for name in _objects(path) if which(name)]
    for name in (name for name in names if name.rpartition("/")[2] == first):
        _remove_one(path / name)
    if names:
        urls = [f"{url_of(path)}/{name}" for name in names if name.rpartition("/")[2] != first]
        with suppress(FileNotFoundError):
            ask(path, lambda store, url: store.rm(urls) if urls else None)
    if which is bool:
        _remove_one(path)


def rename_objects(old: Path, new: Path, last: str) -> None:
    """Move the objects below a folder, and their copies; those of the name `last` after all others."""
    before = _objects(old)
    for group in (
        [name for name in before if name.rpartition("/")[2] != last],
        [name for name in before if name.rpartition("/")[2] == last],
    ):
        if group:
            sources, targets = ([f"{url_of(folder)}/{name}" for name in group] for folder in (old, new))
            ask(old, partial(_copy, sources, targets))
    after = _objects(new)
    copied = [name for name, found in before.items() if found.is_copied(old / name)]
    shutil.rmtree(new, ignore_errors=True)
    if old.is_dir():
        old.rename(new)
        for name in set(copied) & set(after):
            after[name].mark(new / name)
    remove_objects(old, last)


def arrow_storage(folder: Path) -> tuple[str, Any]:
    """Path and file system by which pyarrow writes to a folder that all nodes see; no file system for a plain folder."""
    if not is_stored(folder):
        return str(folder.absolute()), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return ask(folder, lambda store, url: (store._strip_protocol(url), PyFileSystem(FSSpecHandler(store))))


def ask(path: Path, request: Callable[[Any, str], T]) -> T:
    """What `request(store, url)` gives for the object of a path: see `stores.ask`."""
    return stores.ask(url_of(path), request)


def version_of(info: Mapping[str, Any]) -> str:
    """What a store says of an object that another content would change."""
    version = next((info[name] for name in _VERSION if info.get(name)), "")
    return str(version.timestamp() if isinstance(version, datetime) else version)


@dataclass(frozen=True)
class _Object:
    """A version of an object."""

    size: int
    stamp: int
    """Made of what the store calls its version: nanoseconds, as a copy's time of modification."""

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "_Object":
        digest = hashlib.blake2b(f"{version_of(info)} {info['size']}".encode(), digest_size=8).digest()
        return cls(int(info["size"]), int.from_bytes(digest, "big") % (2**31 * 10**9))

    def is_copied(self, path: Path) -> bool:
        with suppress(OSError):
            status = path.stat()
            return (status.st_size, status.st_mtime_ns) == (self.size, self.stamp)
        return False

    def mark(self, path: Path) -> None:
        os.utime(path, ns=(self.stamp, self.stamp))


def _fetch(path: Path, found: _Object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"

    def get(store: Any, url: str) -> None:
        store.get_file(url, str(aside))
        if aside.stat().st_size != found.size:
            raise OSError(errno.EIO, "the object changed while it was read", url)

    try:
        ask(path, get)
        found.mark(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _copy(sources: list[str], targets: list[str], store: Any, url: str) -> None:
    store.copy(sources, targets)


def _remove_one(path: Path) -> None:
    """An object; or a folder without any, where a store has such."""

    def rm(store: Any, url: str) -> None:
        store.invalidate_cache()
        if hasattr(store, "call_s3"):
            store.rm_file(url)
        else:
            store.rm(url, recursive=True)

    with suppress(FileNotFoundError):
        ask(path, rm)


def _info(path: Path) -> Mapping[str, Any] | None:
    def info(store: Any, url: str) -> Mapping[str, Any] | None:
        with suppress(FileNotFoundError):
            found: Mapping[str, Any] = store.info(url, refresh=True)
            return found
        return None

    return ask(path, info)


def _kind(path: Path) -> str | None:
    info = _info(path)
    return None if info is None else str(info["type"])


def _found(path: Path) -> _Object | None:
    info = _info(path)
    return None if info is None or info["type"] != "file" else _Object.of(info)


def _objects(folder: Path) -> dict[str, _Object]:
    """By their paths relative to the folder."""

    def find(store: Any, url: str) -> dict[str, _Object]:
        store.invalidate_cache()
        root = store._strip_protocol(url)
        with suppress(FileNotFoundError):
            entries = store.find(root, detail=True).items()
            return {name.removeprefix(root)[1:]: _Object.of(info) for name, info in entries if name != root}
        return {}

    return ask(folder, find)


def _lock_file(path: Path) -> Path:
    name = hashlib.blake2b(str(path).encode(), digest_size=16).hexdigest()
    locks = Path(str(path).partition(f"/{MIRROR}/")[0]) / MIRROR / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / name
