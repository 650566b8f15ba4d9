"""The folder of an export: whose it is, which of its files are finished, and what is left over."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influencespace.data.artifacts import (
    File,
    Manifest,
    atomic_path,
    fingerprint,
    installed_versions,
    read_manifest,
    remove,
    reopen,
    write_json,
    write_manifest,
)
from influencespace.data.exports.pictures import read_pictures
from influencespace.data.exports.selection import FinishedRun, Selection, select
from influencespace.data.integrity import describe, file_fault, is_done
from influencespace.data.locations import LOCK, alone_in
from influencespace.data.mirror import exists, here, is_folder, listing
from influencespace.data.schema import ImageRef
from influencespace.errors import InputError

CLAIM = "export.json"


@dataclass(frozen=True, kw_only=True)
class KeptPair:
    """One pair as it is written."""

    number: int
    """Place in the export."""
    uid: str
    caption: str
    image: bytes
    weight: float
    score: float | None
    """None for a pair without a score."""
    group: str | None


WriteShard = Callable[[Path, Iterator[KeptPair]], None]


def write_once(
    run: FinishedRun,
    out: Path,
    kind: str,
    options: dict[str, Any],
    write: Callable[[str], dict[str, File]],
    advance: Callable[[int], None],
) -> Manifest:
    """Fill the folder `out` unless the same export of the same run is there.

    `write` takes the fingerprint of the export, calls `advance` and describes each file. Raises InputError when
    `out` holds files that are no export of this kind, and when another export is being written there.
    """
    _claim(out, kind)
    with alone_in(out.absolute()):
        try:
            return _write_once(run, out, kind, options, write, advance)
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _write_once(
    run: FinishedRun,
    out: Path,
    kind: str,
    options: dict[str, Any],
    write: Callable[[str], dict[str, File]],
    advance: Callable[[int], None],
) -> Manifest:
    started = time.monotonic()
    inputs = run.inputs()
    mine = fingerprint({"stage": "export", "kind": kind, "options": options, "inputs": inputs})
    if (done := read_manifest(out)) is not None and is_done(out, mine):
        advance(done.rows_out)
        return done
    reopen(out)
    (out / ".kept.arrow").unlink(missing_ok=True)  # what a killed export was about to write
    files = write(mine)
    rows = sum(len(uids) for uids in run.kept_uids())
    manifest = Manifest(
        stage="export",
        fingerprint=mine,
        inputs=inputs,
        rows_in=rows,
        rows_out=rows,
        files=files,
        versions=installed_versions(),
        seconds=round(time.monotonic() - started, 3),
        details={"kind": kind, **options},
    )
    write_manifest(out, manifest)
    return manifest


def write_shards(
    run: FinishedRun,
    out: Path,
    kind: str,
    suffix: str,
    write_shard: WriteShard,
    shard_size: int,
    *,
    advance: Callable[[int], None],
) -> Manifest:
    """Write the kept pairs as files of `shard_size` pairs; those that an interrupted export finished stay.

    Beside each file lies `<name>_stats.json`, as img2dataset writes it, which also records that it is complete.
    """

    def write(mine: str) -> dict[str, File]:
        files = {}
        with select(run, out / ".kept.arrow") as pairs:
            starts = range(0, len(pairs), shard_size)
            _discard(out, len(starts))
            for shard, start in enumerate(starts):
                stop = min(start + shard_size, len(pairs))
                path = out / f"{shard:08d}{suffix}"
                if (file := _finished(path, mine)) is None:
                    remove(_stats(path))
                    with atomic_path(path) as aside:
                        write_shard(aside, _read(pairs, start, stop))
                    file = _record(path, mine, stop - start)
                files[path.name] = file
                advance(stop - start)
        return files

    return write_once(run, out, kind, {"shard_size": shard_size}, write, advance)


def _read(pairs: Selection, start: int, stop: int) -> Iterator[KeptPair]:
    """The pairs [start, stop), a picture at a time."""
    rows = pairs.rows(start, stop)
    for number, (row, image) in enumerate(
        zip(rows, read_pictures(map(ImageRef.of, rows)), strict=True), start
    ):
        score = row["score"] if row["score"] == row["score"] else None
        fields = {name: row[name] for name in ("uid", "caption", "weight", "group")}
        yield KeptPair(number=number, image=image, score=score, **fields)


def _stats(path: Path) -> Path:
    return path.with_name(f"{path.stem}_stats.json")


def _record(path: Path, mine: str, count: int) -> File:
    """Record that a file is complete."""
    file = describe(path)
    stats = {"count": count, "successes": count, "bytes": file.size}
    write_json(_stats(path), stats | {"digest": file.digest, "rows": file.rows, "fingerprint": mine})
    return file


def _finished(path: Path, mine: str) -> File | None:
    """A file that an earlier export of the same pairs finished, where it still is what was recorded of it, else None."""
    try:
        stats = json.loads(here(_stats(path)).read_bytes())
        file = File(size=stats["bytes"], digest=stats["digest"], rows=stats["rows"])
        whole = stats["fingerprint"] == mine and file_fault(path, file) is None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return file if whole else None


def _claim(out: Path, kind: str) -> None:
    """Claim the folder for exports of this kind, so that nothing of anyone else's is ever overwritten."""
    if exists(out) and not is_folder(out):
        raise InputError(f"{out} is a file; an export is a folder. Name another.")
    try:
        theirs = json.loads(here(out / CLAIM).read_bytes())["kind"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        theirs = None
    if theirs == kind:
        return
    if theirs or listing(out):
        what = f"an export to {theirs}" if theirs else "other files"
        raise InputError(f"{out} holds {what}: name a new or empty folder for this export to {kind}")
    write_json(out / CLAIM, {"kind": kind})


def _discard(out: Path, count: int) -> None:
    """Remove the files beyond the first `count`, of an earlier and larger export."""
    for path in listing(out):
        number = re.fullmatch(r"(\d{8,})(_stats\.json|\.tar|\.parquet)", path.name)
        if number and int(number[1]) >= count:
            remove(path)
