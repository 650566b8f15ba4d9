"""WebDataset tars: files with one name up to the last dot are a sample, e.g. `7.jpg`, `7.txt`, `7.json`.

A tar is first walked header by header, then its samples are read one at a time. So members may come in any
order, one sample is in memory, and every image has a known byte range. Nothing is ever extracted to disk.
"""

import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from influencespace.data.captions import RawSample, assemble, original_captions, printable
from influencespace.data.images import MAX_ENCODED_BYTES, escapes
from influencespace.data.schema import ImageRef, ReadOptions, Rejection, Sample, Shard

BLOCK = tarfile.BLOCKSIZE

KINDS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "text", "json": "json"}

# The texts of one image are kilobytes, long names and pax headers are bytes: more is damage or an attack.
MAX_TEXT_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 2**20

_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_ABOUT_THE_NEXT = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class BrokenTar(ValueError):
    """The tar makes no sense from here on; the message is the reason."""


class _BadSample(ValueError):
    """A sample cannot be read; the message is the reason."""


@dataclass(frozen=True)
class Member:
    """One entry of a tar: where its data lies, and why it must not be read, if so."""

    name: str
    offset: int
    length: int
    problem: str = ""

    @property
    def key(self) -> str:
        """What the files of a sample share: the name up to its last dot."""
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str | None:
        """image, text or json; None for what is no part of a pair, such as macOS's `._7.jpg`."""
        hidden = PurePosixPath(self.name).name.startswith(".")
        return None if hidden else KINDS.get(self.name.rpartition(".")[2].lower())


def read_webdataset(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejection]:
    """The samples of a tar in order of first appearance; of a broken tar those that are surely whole.

    The rest of a broken tar is one Rejection. Raises OSError when the file cannot be read at all.
    """
    with _open_seekable(shard.path) as file:
        entries, problem = index_tar(file)
        members = [member for member in entries if member.kind]
        doubtful = _doubtful_keys(members) if problem else set()
        groups: dict[str, list[Member]] = {}
        for member in members:
            groups.setdefault(member.key, []).append(member)
        for key, group in groups.items():
            if key not in doubtful:
                yield from _read_group(file, shard, key, group, options)
    if problem:
        uid = printable(members[-1].key) if members else PurePosixPath(shard.path).name
        yield Rejection(shard=shard.path, uid=uid, reason=f"broken tar, the rest is lost: {problem}")


def index_tar(file: BinaryIO) -> tuple[list[Member], str]:
    """The files of a tar up to its end or to where it breaks, and what broke ("" when the tar is whole)."""
    members = []
    try:
        for member in _walk(file):
            members.append(member)
    except BrokenTar as error:
        return members, str(error)
    return members, ""


def _doubtful_keys(members: list[Member]) -> set[str]:
    """The samples of a broken tar of which a file may be lost: a sample without its JSON would lose its uid.

    That is the last one when the files of each sample lie side by side, as the format has it, else any.
    """
    runs = [key for key, _ in groupby(member.key for member in members)]
    side_by_side = len(set(runs)) == len(runs)
    return set(runs[-1:]) if side_by_side else set(runs)


def _walk(file: BinaryIO) -> Iterator[Member]:
    """The headers in order, without folders; raises BrokenTar where the tar is cut or damaged."""
    size = file.seek(0, 2)
    offset = 0
    long_name = ""
    pax: dict[str, bytes] = {}
    while (header := _read_header(file, offset)) is not None:
        start = offset + BLOCK
        length = _as_int(pax["size"]) if "size" in pax else header.size
        if header.type in _WITHOUT_DATA:
            length = 0
        if length < 0 or header.type == tarfile.GNUTYPE_SPARSE:
            raise BrokenTar(f"{header.name!r} is a sparse file or has a negative size")
        offset = start + -(-length // BLOCK) * BLOCK

        if header.type in _ABOUT_THE_NEXT:
            data = _read_extension(file, start, length, size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _as_name(data.partition(b"\0")[0])
            elif header.type in _PAX:
                pax = _pax_records(data)
            continue

        name = long_name or header.name
        if "path" in pax:
            name = _as_name(pax["path"])
        if header.type != tarfile.DIRTYPE:
            problem = _why_refused(header.type, name, pax)
            yield Member(name.removeprefix("./"), start, length, problem)
        if start + length > size:
            raise BrokenTar(f"cut inside {name!r}")
        long_name, pax = "", {}


def _read_header(file: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    """The header at `offset`; None for the block of zeros that ends a tar."""
    file.seek(offset)
    block = file.read(BLOCK)
    if not block:
        raise BrokenTar(f"no end mark at byte {offset}, it may be cut")
    if block == bytes(BLOCK):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BrokenTar(f"{error} at byte {offset}") from None


def _read_extension(file: BinaryIO, start: int, length: int, size: int) -> bytes:
    if length > MAX_HEADER_BYTES or start + length > size:
        raise BrokenTar(f"cut or oversized extended header at byte {start}")
    file.seek(start)
    return file.read(length)


def _pax_records(data: bytes) -> dict[str, bytes]:
    """Records of the form `length key=value newline`, the length counting all of it."""
    records = {}
    while data := data.lstrip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = _as_int(digits)
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if length > len(data) or data[length - 1 : length] != b"\n" or not equals:
            raise BrokenTar("malformed pax header")
        records[key.decode("utf-8", "replace")] = value
        data = data[length:]
    return records


def _as_int(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise BrokenTar("malformed number in a pax header")
    return int(digits)


def _as_name(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _why_refused(kind: bytes, name: str, pax: dict[str, bytes]) -> str:
    if kind not in _REGULAR:
        return f"{name!r} is {_WITHOUT_DATA.get(kind, 'of an unknown type')}, not a file"
    if escapes(name):
        return f"{name!r} leads out of the archive"
    if any(key.startswith("GNU.sparse") for key in pax):
        return f"{name!r} is a sparse file"
    return ""


def _read_group(
    file: BinaryIO, shard: Shard, key: str, group: list[Member], options: ReadOptions
) -> Iterator[Sample | Rejection]:
    try:
        raw = _read_raw(file, shard, key, group, options)
    except _BadSample as error:
        yield Rejection(shard=shard.path, uid=printable(key), reason=printable(str(error)))
        return
    yield from assemble(raw, options)


def _read_raw(file: BinaryIO, shard: Shard, key: str, group: list[Member], options: ReadOptions) -> RawSample:
    by_kind: dict[str | None, Member] = {}
    for member in group:
        if member.problem:
            raise _BadSample(member.problem)
        if (other := by_kind.setdefault(member.kind, member)) is not member:
            raise _BadSample(f"{other.name!r} and {member.name!r} are both the {member.kind} of one sample")
    fields = _read_fields(file, by_kind.get("json"))
    image = by_kind.get("image")
    ref = ImageRef(path=shard.path)
    if image:
        ref = ImageRef(path=shard.path, offset=image.offset, length=image.length)
    if options.caption_column:
        captions = original_captions(fields.get(options.caption_column))
    else:
        text = _read(file, by_kind["text"], MAX_TEXT_BYTES) if "text" in by_kind else None
        captions = original_captions(fields.get("captions"), text, fields.get("caption"))
    return RawSample(
        shard=shard.path,
        key=key,
        image=_read(file, image, MAX_ENCODED_BYTES) if image else None,
        captions=captions,
        uid=fields.get(options.uid_column),
        group=fields.get(options.group_column),
        ref=ref,
        missing="the image is missing (no .jpg, .jpeg, .png or .webp beside its texts)",
    )


def _read_fields(file: BinaryIO, member: Member | None) -> dict[str, Any]:
    if member is None:
        return {}
    try:
        fields = json.loads(_read(file, member, MAX_TEXT_BYTES))
    except (ValueError, RecursionError) as error:
        raise _BadSample(f"malformed JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _BadSample(f"malformed JSON: an object is expected, not {type(fields).__name__}")
    return fields


def _read(file: BinaryIO, member: Member, limit: int) -> bytes:
    if member.length > limit:
        raise _BadSample(f"{member.name!r} has {member.length:,} bytes, more than {limit:,}")
    file.seek(member.offset)
    return file.read(member.length)


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
        yield cast(BinaryIO, copy)
