"""WebDataset tars: files with one name up to the last dot are a sample, e.g. `7.jpg`, `7.txt`, `7.json`.

First all headers of a tar are read, then its samples one at a time. So members may come in any order, one sample
is in memory, and every image has a known byte range. Nothing is ever extracted to disk.
"""

import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from influencespace.data.captions import RawSample, original_captions
from influencespace.data.images import MAX_ENCODED_BYTES, escapes
from influencespace.data.schema import ImageRef, ReadOptions, Rejection, Shard

KINDS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "text", "json": "json"}

# The texts of one image are kilobytes, long names and pax headers are bytes: more is damage or an attack.
MAX_TEXT_BYTES = 16 * 2**20
MAX_JSON_BYTES = 2 * 2**20
MAX_HEADER_BYTES = 2**16


class _BadSample(ValueError):
    """A sample cannot be read; the message is the reason."""


def read_webdataset(shard: Shard, options: ReadOptions) -> Iterator[RawSample | Rejection]:
    """The samples of a tar in order of first appearance; of a broken tar those that are certainly whole.

    The rest of a broken tar is one Rejection. Raises OSError when the file cannot be read at all.
    """
    with _open_seekable(shard.path) as file:
        entries, problem = index_tar(file)
        members = [member for member in entries if _kind(member)]
        doubtful = _doubtful_keys(members) if problem else set()
        groups: dict[str, list[tarfile.TarInfo]] = {}
        for member in members:
            groups.setdefault(_key(member), []).append(member)
        for key, group in groups.items():
            if key in doubtful:
                continue
            try:
                yield _read_sample(file, shard, key, group, options)
            except _BadSample as error:
                yield Rejection(shard=shard.path, uid=key, reason=str(error))
    if problem:
        uid = _key(members[-1]) if members else PurePosixPath(shard.path).name
        yield Rejection(shard=shard.path, uid=uid, reason=f"broken tar, the rest is lost: {problem}")


def index_tar(file: BinaryIO) -> tuple[list[tarfile.TarInfo], str]:
    """The members of a tar up to its end or to where it breaks, and what broke ("" when the tar is whole)."""
    members: list[tarfile.TarInfo] = []
    try:
        headers = cast(IO[bytes], _Headers(file))
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                members.append(member)
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
            # tarfile takes a header that it cannot read for the end of the tar.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    except OSError:
        raise
    except Exception as error:  # for hostile bytes tarfile raises ValueError, RecursionError, almost anything
        return members, f"cut or damaged, {error}"
    return members, ""


class _Headers:
    """The file for tarfile, with limits: by itself tarfile reads extended headers of any size, and loops on negative sizes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {size:,} bytes")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        if not self._file.tell() <= place < 2**63:
            raise tarfile.ReadError(f"a size that leads to byte {place:,}")
        return self._file.seek(place)


def _key(member: tarfile.TarInfo) -> str:
    """What the files of a sample share: the name up to its last dot."""
    return member.name.removeprefix("./").rpartition(".")[0]


def _kind(member: tarfile.TarInfo) -> str | None:
    """image, text or json; None for folders and what is no part of a pair, such as macOS's `._7.jpg`."""
    hidden = PurePosixPath(member.name).name.startswith(".")
    return None if hidden or member.isdir() else KINDS.get(member.name.rpartition(".")[2].lower())


def _doubtful_keys(members: list[tarfile.TarInfo]) -> set[str]:
    """The samples of a broken tar of which a file may be lost: a sample without its JSON would lose its uid.

    That is the last one when the files of each sample lie side by side, as the format has it, else any.
    """
    runs = [key for key, _ in groupby(map(_key, members))]
    side_by_side = len(set(runs)) == len(runs)
    return set(runs[-1:]) if side_by_side else set(runs)


def _read_sample(
    file: BinaryIO, shard: Shard, key: str, group: list[tarfile.TarInfo], options: ReadOptions
) -> RawSample:
    members: dict[str | None, tarfile.TarInfo] = {}
    for member in group:
        if not member.isreg() or member.issparse():
            raise _BadSample(f"{member.name!r} is not a file but a link, a device, a pipe or a sparse file")
        if escapes(member.name):
            raise _BadSample(f"{member.name!r} leads out of the archive")
        if (other := members.setdefault(_kind(member), member)) is not member:
            raise _BadSample(f"{other.name!r} and {member.name!r} are both the {_kind(member)} of one sample")
    fields = _read_fields(file, members.get("json"))
    if options.caption_column:
        captions = original_captions(fields.get(options.caption_column))
    else:
        text = _read(file, members.get("text"), MAX_TEXT_BYTES)
        captions = original_captions(fields.get("captions"), text, fields.get("caption"))
    image = members.get("image")
    place = {"offset": image.offset_data, "length": image.size} if image else {}
    return RawSample(
        shard=shard.path,
        key=key,
        image=_read(file, image, MAX_ENCODED_BYTES),
        captions=captions,
        uid=fields.get(options.uid_column),
        group=fields.get(options.group_column),
        ref=ImageRef(path=shard.path, **place),
        missing="the image is missing (no .jpg, .jpeg, .png or .webp beside its texts)",
    )


def _read_fields(file: BinaryIO, member: tarfile.TarInfo | None) -> dict[str, Any]:
    if member is None:
        return {}
    try:
        fields = json.loads(_read(file, member, MAX_JSON_BYTES) or b"")
    except (ValueError, RecursionError) as error:
        raise _BadSample(f"malformed JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _BadSample(f"malformed JSON: an object is expected, not {type(fields).__name__}")
    return fields


def _read(file: BinaryIO, member: tarfile.TarInfo | None, limit: int) -> bytes | None:
    if member is None:
        return None
    if member.size > limit:
        raise _BadSample(f"{member.name!r} has {member.size:,} bytes, more than {limit:,}")
    file.seek(member.offset_data)
    return file.read(member.size)


@contextmanager
def _open_seekable(path: str) -> Iterator[BinaryIO]:
    """A local file itself, else a temporary copy: one long read is the quickest from an object store."""
    filesystem, name = fsspec.url_to_fs(path)
    if isinstance(filesystem, LocalFileSystem):
        with open(name, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        with filesystem.open(name, "rb") as remote:
            shutil.copyfileobj(remote, copy, 8 * 2**20)
        copy.seek(0)
        yield cast(BinaryIO, copy)
