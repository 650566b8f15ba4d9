"""Shards of the data that the user names (a path, folder, glob, URL), and the samples of a shard."""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from influencespace.data.captions import RawSample, assemble
from influencespace.data.readers.class_folders import count_pictures, find_classes, read_class_folder
from influencespace.data.readers.coco import count_images, image_folder, read_coco
from influencespace.data.readers.parquet import read_parquet, split_row_groups
from influencespace.data.readers.webdataset import read_webdataset
from influencespace.data.schema import ReadOptions, Rejection, Sample, Shard
from influencespace.data.stores import needs_package
from influencespace.errors import InputError

__all__ = ["ReadOptions", "filesystem_of", "list_files", "list_shards", "read_shard"]

_READERS: dict[str, Callable[[Shard, ReadOptions], Iterator[RawSample | Rejection]]] = {
    "webdataset": read_webdataset,
    "parquet": read_parquet,
    "coco": read_coco,
    "class_folder": read_class_folder,
}

# Images to a shard of COCO or of a class folder: minutes of work, so that little is repeated after an interruption.
SHARD_IMAGES = 1000

# Footers of Parquet files are read this many at a time: on object stores each is a round trip.
LISTING_THREADS = 16

_PACKED = (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst")


def read_shard(
    shard: Shard, options: ReadOptions | None = None, *, seed: int = 0
) -> Iterator[Sample | Rejection]:
    """The samples of `shard`, images still encoded, and a Rejection for each pair that cannot be used.

    `seed` decides the draws of `captions="choice"`. Raises InputError when the options do not fit the file, OSError
    when the file cannot be read at all.
    """
    options = options or ReadOptions()
    for result in _READERS[shard.format](shard, options):
        if isinstance(result, Rejection):
            yield result
        else:
            yield from assemble(result, options.captions, seed, options.max_captions)


def list_shards(spec: str | Sequence[str], images: str | None = None) -> list[Shard]:
    """The shards of `spec`, sorted by path: .tar (WebDataset), .parquet, .json (COCO captions), or class folders.

    `spec` is a path, folder, glob, URL, range like `{000..123}.tar`, or several of them, as a list or with
    commas. `images` is the image folder of a COCO file; left out, the official layout is assumed. Raises
    InputError when something is not found or of another kind.
    """
    files = list_files(spec, preferred=(".tar", ".parquet"), other=(".json",), class_folders=True)
    # Beside each tar img2dataset writes a .parquet of the same name, with metadata and no images.
    tars = {path.removesuffix(".tar") for path in files if path.endswith(".tar")}
    files = [
        path for path in files if not (path.endswith(".parquet") and path.removesuffix(".parquet") in tars)
    ]
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        shards = [shard for split in threads.map(lambda path: _split(path, images), files) for shard in split]
    return [replace(shard, index=index) for index, shard in enumerate(shards)]


def list_files(
    spec: str | Sequence[str],
    preferred: tuple[str, ...],
    other: tuple[str, ...] = (),
    class_folders: bool = False,
) -> list[str]:
    """Sorted paths or URLs of the files of `spec` with one of the suffixes, each once.

    A folder or glob gives its `preferred` files, or when it has none the `other` ones, or with `class_folders` the
    folders that are classes; other folders within are not entered. Raises InputError when a part of `spec` gives
    nothing, or names a file with another suffix.
    """
    parts = spec.split(",") if isinstance(spec, str) else spec
    names = [name for part in parts for name in _expand_range(part.strip()) if name]
    if not names:
        raise InputError("no data named: give a file, a folder, a glob or a URL")
    return sorted({path for name in names for path in _find(name, preferred, other, class_folders)})


def _find(name: str, preferred: tuple[str, ...], other: tuple[str, ...], class_folders: bool) -> list[str]:
    filesystem, path = filesystem_of(name)
    wanted = ", ".join((*preferred, *other))
    if filesystem.isfile(path):
        if not path.endswith((*preferred, *other)):
            hint = " Unpack it first." if path.endswith(_PACKED) else ""
            raise InputError(f"{name}: unknown kind of file, expected one of {wanted}.{hint}")
        entries = {path: "file"}
    elif filesystem.isdir(path):
        entries = {info["name"]: info["type"] for info in filesystem.ls(path, detail=True)}
    elif glob.has_magic(name):
        entries = {file: info["type"] for file, info in filesystem.glob(path, detail=True).items()}
    else:
        raise InputError(f"{name}: no such file or folder. Is it mistyped, or not mounted on this machine?")

    def is_file(path: str, kind: str) -> bool:
        if kind == "file" or filesystem.isfile(path):  # the kind of a link does not show where it leads
            return True
        if filesystem.isdir(path):
            return False
        raise InputError(f"{path}: neither a file nor a folder, but a pipe, a device, or a link to nothing")

    for suffixes in (preferred, other):
        if matching := [
            file for file, kind in entries.items() if file.endswith(suffixes) and is_file(file, kind)
        ]:
            return [_address(filesystem, file) for file in matching]
    if class_folders and (classes := find_classes(filesystem, list(entries))):
        return [_address(filesystem, path) for path in classes]
    raise InputError(
        f"{name}: no {wanted} file there (found {len(entries)} others). Folders within are not searched: a glob like "
        "'folder/*/*.tar' does that. Class folders of pictures are read where they are two or more and none is without."
    )


def filesystem_of(name: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL and the path in it; raises InputError when there is none."""
    try:
        filesystem, path = fsspec.url_to_fs(name)
    except ImportError as error:
        raise InputError(f"{name}: {needs_package(name.partition('://')[0], error)}") from None
    except ValueError as error:
        raise InputError(f"{name}: cannot be reached. {error}") from None
    return filesystem, path


def _address(filesystem: Any, path: str) -> str:
    """An absolute path or URL that any worker can open."""
    return path if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(path))


def _expand_range(name: str) -> list[str]:
    """`{008..010}.tar` as 008.tar, 009.tar and 010.tar, as in a shell; other names as they are."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not match:
        return [name]
    width = len(match[1])
    middles = (str(number).zfill(width) for number in range(int(match[1]), int(match[2]) + 1))
    return [rest for m in middles for rest in _expand_range(name[: match.start()] + m + name[match.end() :])]


def _split(path: str, images: str | None) -> list[Shard]:
    """The shards of one file, numbered later."""
    if path.endswith(".tar"):
        return [Shard(path=path, format="webdataset", index=0)]
    if path.endswith(".parquet"):
        return [Shard(path=path, format="parquet", index=0, row_groups=run) for run in split_row_groups(path)]
    if path.endswith(".json"):
        folder = _image_folder(images) if images else image_folder(path)
        shard, count = Shard(path=path, format="coco", index=0, images=folder), count_images(path)
    else:
        shard, count = Shard(path=path, format="class_folder", index=0), count_pictures(path)
    starts = range(0, count, SHARD_IMAGES)
    return [replace(shard, rows=(start, min(start + SHARD_IMAGES, count))) for start in starts]


def _image_folder(images: str) -> str:
    filesystem, path = filesystem_of(images)
    if not filesystem.isdir(path):
        raise InputError(f"{images}: no such folder of images")
    return _address(filesystem, path.rstrip("/"))
