"""What storage does to finished files."""

import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.speed.damage import become_folder, empty, flip, truncate

Fault = Callable[[Path], object]


def remove(path: Path) -> None:
    path.unlink()


def dangle(path: Path) -> None:
    """A link to nowhere in its place."""
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


FAULTS: dict[Fault, str] = {
    flip: "was changed after it was written",
    truncate: "bytes, not",
    empty: "has 0 bytes, not",
    remove: "is missing",
    become_folder: "is not a file",
    dangle: "is missing",
}
"""Each with what is reported of it."""


def edit(manifest: Path) -> None:
    """Another number in a manifest."""
    text = manifest.read_text()
    place = text.index('"rows_out": ') + len('"rows_out": ')
    manifest.write_text(text[:place] + "1" + text[place:])


MANIFEST_FAULTS: dict[Fault, str] = {
    edit: "was changed after it was written",
    flip: "",  # in whatever place: no JSON, or changed
    truncate: "is not JSON",
    empty: "is not JSON",
    become_folder: "is a folder, not a file",
}


def copy_run(source: Path, target: Path) -> Path:
    """A run to be damaged."""
    shutil.copytree(source, target, symlinks=True)
    return target
