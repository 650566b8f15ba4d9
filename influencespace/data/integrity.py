"""Whether finished files are still what their manifest says: digests are taken once, and checked before files are read again."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from influencespace.data.artifacts import (
    MANIFEST,
    MISSING,
    File,
    Manifest,
    file_digest,
    manifest_or_fault,
    read_manifest,
    remove_here,
)
from influencespace.data.buckets import BUCKETS, table_rows
from influencespace.data.mirror import exists, files_below, is_file, is_stored, size_of, sizes_below

CHEAP = 64 * 2**20
"""Bytes of a folder whose digests are checked before every use, the smallest files first; of the others the size."""


@dataclass(frozen=True)
class Fault:
    """A file that is not what its manifest says."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


def file_fault(path: Path, file: File, *, content: bool = True) -> str | None:
    """What is wrong with a file, without its content or with it; None where it is as it was written."""
    try:
        if not is_file(path):
            return "is not a file" if exists(path) else MISSING
        size = size_of(path)
        if size != file.size:
            return f"has {size:,} bytes, not {file.size:,}"
        if content and not _has_digest(path, file.digest):
            return "was changed after it was written"
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _has_digest(path: Path, digest: str) -> bool:
    if file_digest(path) == digest:
        return True
    if not is_stored(path):
        return False
    remove_here(path)  # the copy may be at fault, and not the object
    return file_digest(path) == digest


def cheap_faults(folder: Path | str, manifest: Manifest) -> list[Fault]:
    """What is wrong with the files of a finished folder: all by size, by content as far as CHEAP reaches."""
    faults, left = [], CHEAP
    known = sizes_below(Path(folder)) if is_stored(folder) else {}
    for name, file in sorted(manifest.files.items(), key=lambda item: (item[1].size, item[0])):
        left -= file.size
        path = Path(folder) / name
        if left < 0 and known.get(name) == file.size:
            continue
        if what := file_fault(path, file, content=left >= 0):
            faults.append(Fault(path, what))
    return faults


def is_cheap(manifest: Manifest, name: str) -> bool:
    """Whether `cheap_faults` reads the content of a file."""
    mine = manifest.files[name].size, name
    return sum(file.size for other, file in manifest.files.items() if (file.size, other) <= mine) <= CHEAP


def damage(folder: Path | str, fingerprint: str) -> list[Fault]:
    """What is wrong with a folder that was finished by this fingerprint; nothing where it is not such a one."""
    manifest = manifest_or_fault(folder)
    if isinstance(manifest, str):
        return [] if manifest == MISSING else [Fault(Path(folder) / MANIFEST, manifest)]
    return cheap_faults(folder, manifest) if manifest.fingerprint == fingerprint else []


def is_done(folder: Path | str, fingerprint: str) -> bool:
    """Whether `folder` was finished by the same config from the same inputs, and its files are as they were written."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.fingerprint != fingerprint:
        return False
    return not cheap_faults(folder, manifest)


@dataclass(frozen=True)
class DescribeFiles:
    """Task: size, digest and rows of some files below a folder, by their relative paths."""

    folder: Path
    names: tuple[str, ...]

    def __call__(self) -> dict[str, File]:
        return {name: describe(self.folder / name) for name in self.names}


def describe(path: Path) -> File:
    """A finished file as it is."""
    rows = table_rows(path) if path.suffix == ".parquet" else None
    return File(size=size_of(path), digest=file_digest(path), rows=rows)


def describe_tasks(folder: Path) -> list[DescribeFiles]:
    """Tasks that describe all files of an artifact: large files alone, small ones together."""
    tasks: list[DescribeFiles] = []
    names: list[str] = []
    size = 0
    known = sizes_below(folder) if is_stored(folder) else {}
    for name in artifact_files(folder):
        more = known[name] if name in known else size_of(folder / name)
        if names and size + more > CHEAP:
            tasks.append(DescribeFiles(folder, tuple(names)))
            names, size = [], 0
        names.append(name)
        size += more
    return [*tasks, DescribeFiles(folder, tuple(names))] if names else tasks


def artifact_files(folder: Path) -> Iterator[str]:
    """The files of an artifact by their relative POSIX paths: all but its manifest, hidden files, and buckets at work."""
    for path in files_below(folder):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and relative.parts[0] not in (BUCKETS, MANIFEST):
            yield relative.as_posix()
