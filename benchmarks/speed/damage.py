"""What storage does to finished files, one function a kind."""

import os
from collections.abc import Callable
from pathlib import Path

from influencespace.data.artifacts import MANIFEST, read_manifest


def flip(path: Path) -> None:
    """Another bit in the middle, at the same size and time."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=times)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[str, Callable[[Path], None]] = {
    "a bit flipped": flip,
    "truncated": truncate,
    "empty": empty,
    "gone": Path.unlink,
    "a folder in its place": become_folder,
}


def targets_of(run: Path) -> list[Path]:
    """The manifest and the files of every stage, and the results."""
    found = []
    for path in sorted(run.rglob(MANIFEST)):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        found += [path, *(path.parent / name for name in manifest.files)]
    return found
