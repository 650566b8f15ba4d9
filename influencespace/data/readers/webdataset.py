"""WebDataset tars: files with one name up to the last dot are a sample, e.g. `7.jpg`, `7.txt`, `7.json`.

A tar is read once, front to back, by ranges. Files of a sample may come in any order; they are collected as headers, until none
has come for WINDOW_BYTES. So one sample is in memory, and of a tar of any size the headers of a window. Nothing is ever extracted
to disk, and nothing copied to it.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
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

# How far apart the files of one sample may lie, in bytes, to be together for certain; of empty files 30,000 headers.
WINDOW_BYTES = 16 * 2**20
MAX_WAITING = 20_000

# Object stores are read in blocks of this size, the next one ahead; those of two windows are kept: 48 MB.
BLOCK_BYTES = 4 * 2**20


class _BadSample(ValueError):
    """A sample cannot be read; the message is the reason."""


def read_webdataset(shard: Shard, options: ReadOptions) -> Iterator[RawSample | Rejection]:
    """The samples of a tar, about in order of first appearance; of a broken tar those that are certainly whole.

    The rest of a broken tar is one Rejection. Raises OSError when the file cannot be read at all.
    """
    with _open_seekable(shard.path) as file:
        headers = Headers(file)
        for key, group in _Collected(headers).samples():
            try:
                yield _read_sample(file, shard, key, group, options)
            except _BadSample as error:
                yield Rejection(shard=shard.path, uid=key, reason=str(error))
    if headers.problem:
        uid = headers.last or PurePosixPath(shard.path).name
        yield Rejection(shard=shard.path, uid=uid, reason=f"broken tar, the rest is lost: {headers.problem}")


class Headers:
    """The members of a tar that belong to samples, one after another, up to its end or to where it breaks.

    `place` is how far they are read, `last` the key of the last one; `problem` is what broke, "" when the tar is whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = file.seek(0, os.SEEK_END)
        self.place = 0
        self.last = ""
        self.problem = ""

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        try:
            yield from self._members()
        except OSError:
            raise
        except (
            Exception
        ) as error:  # for hostile bytes tarfile raises ValueError, RecursionError, almost anything
            self.problem = f"cut or damaged, {error}"

    def _members(self) -> Iterator[tarfile.TarInfo]:
        headers = cast(IO[bytes], _Limited(self._file))
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := self._plain(tar) or tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all: a kilobyte for each
                self.place = tar.offset
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
                if _kind(member):
                    self.last = _key(member)
                    yield member
            # tarfile takes a header that it cannot read for the end of the tar.
            self._file.seek(tar.offset)
            if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark at byte {tar.offset}")

    def _plain(self, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        """The next member if it is a plain file with a plain header, which tarfile reads slowly; else None."""
        if tar.firstmember is not None or tar.pax_headers or tar.offset > self._end:  # type: ignore[attr-defined]
            return None
        self._file.seek(tar.offset)
        block = self._file.read(tarfile.BLOCKSIZE)
        plain = block[156:157] == b"0" and block[257:265] == b"ustar\x0000"
        size, checksum = block[124:135], block[148:154]
        if not (plain and size.isdigit() and checksum.isdigit() and block[135] in b"\0 "):
            return None
        try:
            length, expected = int(size, 8), int(checksum, 8)
        except ValueError:
            return None
        if sum(block) - sum(block[148:156]) + 256 != expected:
            return None
        name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
        member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
        member.size, member.offset = length, tar.offset
        member.offset_data = tar.offset + tarfile.BLOCKSIZE
        tar.offset = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return member


class _Collected:
    """Members of a tar by sample: each when it is complete for all that is known.

    That is when nothing of it came for WINDOW_BYTES and it has a file of every kind that the tar has had so far. One that lacks a
    kind waits for the end of the tar, where its files are read again from where they lie; of these there are MAX_WAITING.
    """

    def __init__(self, headers: Headers) -> None:
        self.headers = headers
        self.recent: dict[str, list[tarfile.TarInfo]] = {}
        self.waiting: dict[str, list[tarfile.TarInfo]] = {}
        self.kinds: set[str | None] = set()
        self.side_by_side = True

    def samples(self) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
        before = None
        for member in self.headers:
            key = _key(member)
            group = self.waiting.get(key) or self.recent.setdefault(key, [])
            self.side_by_side &= not group or key == before
            group.append(member)
            self.kinds.add(_kind(member))
            before = key
            yield from self._ready()
        yield from self._rest()

    def _ready(self) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
        while self.recent:
            key, group = next(iter(self.recent.items()))
            if self.headers.place - group[-1].offset <= WINDOW_BYTES:
                break
            del self.recent[key]
            if {_kind(member) for member in group} >= self.kinds:
                yield key, group
            else:
                self.waiting[key] = group
        while len(self.waiting) > MAX_WAITING:
            key = next(iter(self.waiting))
            yield key, self.waiting.pop(key)

    def _rest(self) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
        """What is left at the end; of a broken tar without samples of which a file may be lost: one without its JSON would lose
        its uid. That is the last one when the files of each sample lie side by side, as the format has it, else any."""
        left = self.waiting | self.recent
        if self.headers.problem:
            doubtful = {self.headers.last} if self.side_by_side else set(left)
            left = {key: group for key, group in left.items() if key not in doubtful}
        yield from left.items()


class _Limited:
    """The file for tarfile, with a place of its own and limits: by itself it reads extended headers of any size, and loops
    on negative sizes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._place = 0
        self._end = file.seek(0, os.SEEK_END)

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {size:,} bytes")
        self._file.seek(self._place)
        data = self._file.read(size)
        self._place += len(data)
        return data

    def seek(self, place: int) -> int:
        if (
            not self._place <= place <= self._end
        ):  # the system refuses a far place in ways that look like its own errors
            raise tarfile.ReadError(f"a size that leads to byte {place:,}")
        self._place = place
        return place


def _key(member: tarfile.TarInfo) -> str:
    """What the files of a sample share: the name up to its last dot."""
    return member.name.removeprefix("./").rpartition(".")[0]


def _kind(member: tarfile.TarInfo) -> str | None:
    """image, text or json; None for folders and what is no part of a pair, such as macOS's `._7.jpg`."""
    name = member.name.rpartition("/")[2]
    return None if name.startswith(".") or member.isdir() else KINDS.get(name.rpartition(".")[2].lower())


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
    """A local file itself, else one that is read by blocks, in the background and each once."""
    filesystem, name = fsspec.url_to_fs(path)
    if isinstance(filesystem, LocalFileSystem):
        with open(name, "rb") as file:
            yield file
        return
    # Headers are read a window ahead of what is used; the cache forgets what was touched least recently.
    blocks = {"maxblocks": 2 * (WINDOW_BYTES // BLOCK_BYTES) + 4}
    with filesystem.open(
        name, "rb", block_size=BLOCK_BYTES, cache_type="background", cache_options=blocks
    ) as remote:
        yield cast(BinaryIO, remote)
