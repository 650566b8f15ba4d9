"""Finished folders: files that appear whole or not at all, and a manifest that is written last.

Plain files and one rename, so that a run folder is safe on NFS and a killed run leaves nothing half done. In an object store
(`data/mirror.py`) a file is put whole, and of a folder the manifest comes last and goes first.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from influencespace.data import mirror

MANIFEST = "manifest.json"
DIGEST = "digest"  # in a manifest: of all else in it
MISSING = "is missing"
PACKAGES = ("influencespace", "torch", "ray", "transformers", "pyarrow", "numpy")


@dataclass(frozen=True, kw_only=True)
class File:
    """What a finished file must be."""

    size: int
    """Bytes."""
    digest: str
    """Of its content."""
    rows: int | None = None
    """Of a Parquet file."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a stage did: written last, so its presence means that the folder is complete."""

    stage: str
    fingerprint: str
    """Of the stage's config and of the fingerprints of its inputs."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Name of each input -> its fingerprint."""
    rows_in: int = 0
    rows_out: int = 0
    rejected: int = 0
    files: dict[str, File] = Field(default_factory=dict)
    """Each file below the folder, by its relative POSIX path."""
    versions: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0
    usage: dict[str, float] = Field(default_factory=dict)
    """What its workers took, as `engine.measured.Usage` has it."""
    details: dict[str, Any] = Field(default_factory=dict)

    @property
    def content(self) -> str:
        """What a later stage depends on: the settings that it was made by, and the files as they are."""
        return fingerprint([self.fingerprint, {name: file.digest for name, file in self.files.items()}])


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a path to write to that becomes `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield aside
        if mirror.is_stored(path):
            mirror.put(aside, path)
            aside.replace(path)
        else:
            _sync(aside)
            aside.replace(path)
            _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, or nothing."""
    if mirror.is_stored(path):
        mirror.remove_objects(path, MANIFEST)
    remove_here(path)


def remove_here(path: Path) -> None:
    """The same, of this machine alone: what lies in a store stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def remove_half_written(folder: Path) -> None:
    """Remove what a killed process was about to write, here, below a folder."""
    for path in folder.rglob(".*.tmp"):
        remove_here(path)


def rename(old: Path, new: Path) -> None:
    """Give a folder another place, where there is none."""
    if mirror.is_stored(new):
        mirror.rename_objects(old, new, MANIFEST)
    else:
        old.rename(new)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as readable JSON, keys in their order, atomically."""
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(value, indent=2, default=_plain) + "\n", encoding="utf-8")


def copy_file(source: Path | str, target: Path | str) -> None:
    """Copy a file, atomically."""
    with atomic_path(target) as aside:
        shutil.copyfile(mirror.here(Path(source)), aside)


def fingerprint(value: Any) -> str:
    """32 hex digits that are equal for equal content: mappings in any order, dataclasses, paths, lists.

    Raises TypeError for what has no stable JSON form.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path | str) -> str:
    """32 hex digits of a file's content, read as a stream."""
    with mirror.here(Path(path)).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def folder_digest(folder: Path | str) -> str:
    """32 hex digits of the names and the content of all files below `folder`, hidden ones left out."""
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in mirror.files_below(folder)}
    visible = {name: path for name, path in files.items() if not name.startswith(".") and "/." not in name}
    return fingerprint({name: file_digest(path) for name, path in visible.items()})


def write_manifest(folder: Path | str, manifest: Manifest) -> None:
    """Declare `folder` finished; with a digest of what is declared, so that a changed number is noticed.

    Raises AssertionError unless every row that came in is either kept or rejected.
    """
    assert manifest.rows_in == manifest.rows_out + manifest.rejected, (
        f"{manifest.stage}: {manifest.rows_in} rows in, but {manifest.rows_out} kept "
        f"and {manifest.rejected} rejected"
    )
    tree = json.loads(json.dumps(manifest, default=_plain))
    write_json(Path(folder) / MANIFEST, {**tree, DIGEST: fingerprint(tree)})


def read_manifest(folder: Path | str) -> Manifest | None:
    """The manifest of a finished folder; None where there is none, a damaged one, or one of another layout."""
    manifest = manifest_or_fault(folder)
    return manifest if isinstance(manifest, Manifest) else None


def manifest_or_fault(folder: Path | str) -> Manifest | str:
    """The manifest of a finished folder, or why there is none: `is missing` and what else may be wrong with the file."""
    try:
        tree = json.loads(mirror.here(Path(folder) / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except IsADirectoryError:
        return "is a folder, not a file"
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(tree, dict) or DIGEST not in tree:
        return "is of another version"
    if tree.pop(DIGEST) != fingerprint(tree):
        return "was changed after it was written"
    try:
        return TypeAdapter(Manifest).validate_python(tree)
    except ValidationError:
        return "is of another version"


def reopen(folder: Path | str) -> Path:
    """Make `folder` unfinished: its manifest goes first, so that nobody reads files about to be replaced.

    What a killed run had half written goes too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove(folder / MANIFEST)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    _sync(folder)
    return folder


def installed_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"no stable JSON form for {type(value).__name__}: {value!r}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
