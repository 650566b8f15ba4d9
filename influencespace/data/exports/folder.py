"""The folder of an export: whose it is, which of its files are finished, and what is left over."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influencespace.data.artifacts import (
    Manifest,
    atomic_path,
    file_digest,
    fingerprint,
    installed_versions,
    is_done,
    read_manifest,
    reopen,
    write_json,
    write_manifest,
)
from influencespace.data.exports.pictures import read_pictures
from influencespace.data.exports.selection import FinishedRun, Selection, select
from influencespace.data.schema import ImageRef
from influencespace.errors import InputError

Advance = Callable[[int], None]

# As DataComp's resharder: files of some hundred megabytes.
DEFAULT_SHARD_SIZE = 10_000

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


@dataclass(frozen=True, kw_only=True)
class ShardFormat:
    """A format of many files: a file's suffix, and what writes its pairs."""

    name: str
    suffix: str
    write: WriteShard


def ignore(count: int) -> None:
    """The `Advance` of callers who do not ask for progress."""


def write_once(
    run: FinishedRun,
    out: Path,
    kind: str,
    options: dict[str, Any],
    write: Callable[[], dict[str, str]],
    advance: Advance,
) -> Manifest:
    """Fill the folder `out` unless the same export of the same run is there; `write` gives files and digests, and advances.

    Raises InputError when `out` holds files that are no export of this kind.
    """
    started = time.monotonic()
    inputs = run.inputs()
    _claim(out, kind)
    mark = fingerprint({"stage": "export", "kind": kind, "options": options, "inputs": inputs})
    if (done := read_manifest(out)) is not None and is_done(out, mark):
        advance(done.rows_out)
        return done
    reopen(out)
    (out / ".kept.arrow").unlink(missing_ok=True)  # what a killed export was about to write
    files = write()
    rows = sum(len(uids) for uids in run.kept_uids())
    manifest = Manifest(
        stage="export",
        fingerprint=mark,
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
    run_folder: Path, out: Path, form: ShardFormat, shard_size: int, advance: Advance
) -> Manifest:
    """Write the kept pairs as files of `shard_size` pairs; those that an interrupted export finished stay.

    Beside each file lies `<name>_stats.json`, as img2dataset writes it, which is also its mark of completion.
    Raises InputError as `export` does.
    """
    if shard_size < 1:
        raise InputError(f"shard_size is {shard_size}: a file needs at least one pair")
    run = FinishedRun.open(run_folder)
    mark = fingerprint({"kind": form.name, "shard_size": shard_size, "inputs": run.inputs()})

    def write() -> dict[str, str]:
        with select(run, out / ".kept.arrow") as pairs:
            starts = range(0, len(pairs), shard_size)
            _discard(out, len(starts))
            files = {}
            for shard, start in enumerate(starts):
                stop = min(start + shard_size, len(pairs))
                path = out / f"{shard:08d}.{form.suffix}"
                files[path.name] = _finished(path, mark) or _write_shard(path, form, pairs, start, stop, mark)
                advance(stop - start)
        return files

    return write_once(run, out, form.name, {"shard_size": shard_size}, write, advance)


def _write_shard(path: Path, form: ShardFormat, pairs: Selection, start: int, stop: int, mark: str) -> str:
    _stats(path).unlink(missing_ok=True)
    with atomic_path(path) as aside:
        form.write(aside, _read(pairs, start, stop))
    digest = file_digest(path)
    count = stop - start
    stats = {"count": count, "successes": count, "bytes": path.stat().st_size}
    write_json(_stats(path), stats | {"digest": digest, "fingerprint": mark})
    return digest


def _read(pairs: Selection, start: int, stop: int) -> Iterator[KeptPair]:
    """The pairs [start, stop), a picture at a time."""
    rows = pairs.rows(start, stop)
    refs = (
        ImageRef(
            path=row["image_path"],
            offset=row["image_offset"],
            length=row["image_length"],
            row=row["image_row"],
        )
        for row in rows
    )
    for number, (row, image) in enumerate(zip(rows, read_pictures(refs), strict=True), start):
        score = row["score"]
        yield KeptPair(
            number=number,
            uid=row["uid"],
            caption=row["caption"],
            image=image,
            weight=row["weight"],
            score=score if score == score else None,
            group=row["group"],
        )


def _stats(path: Path) -> Path:
    return path.with_name(f"{path.stem}_stats.json")


def _finished(path: Path, mark: str) -> str | None:
    """The digest of a file that an earlier export of the same pairs finished, else None."""
    try:
        stats = json.loads(_stats(path).read_bytes())
        whole = stats["fingerprint"] == mark and stats["bytes"] == path.stat().st_size
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return str(stats["digest"]) if whole else None


def _claim(out: Path, kind: str) -> None:
    """Mark the folder as an export of this kind, so that nothing of anyone else's is ever overwritten."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; an export is a folder. Name another.")
    try:
        theirs = json.loads((out / CLAIM).read_bytes())["kind"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        theirs = None
    if theirs == kind:
        return
    if theirs or (out.is_dir() and any(out.iterdir())):
        what = f"an export to {theirs}" if theirs else "other files"
        raise InputError(f"{out} holds {what}: name a new or empty folder for this export to {kind}")
    write_json(out / CLAIM, {"kind": kind})


def _discard(out: Path, count: int) -> None:
    """Remove the files beyond the first `count`, of an earlier and larger export."""
    for path in out.iterdir():
        number = re.fullmatch(r"(\d{8,})(_stats\.json|\.tar|\.parquet)", path.name)
        if number and int(number[1]) >= count:
            path.unlink()
