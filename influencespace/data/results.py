"""The results in a run's folder: what they are called, their manifest, and how they are read."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import (
    MANIFEST,
    Manifest,
    fingerprint,
    read_manifest,
    remove,
    write_manifest,
)
from influencespace.data.integrity import CHEAP, Fault, describe, file_fault
from influencespace.data.mirror import here
from influencespace.errors import InputError

CURATED, SUMMARY, REPORT = "curated.parquet", "summary.json", "report.html"
RESULTS = (CURATED, SUMMARY, REPORT)
CONFIG = "config.yaml"
BATCH_ROWS = 65_536  # of curated.parquet that are read at once


def forget_results(run: Path) -> None:
    """Remove the results of a run, their manifest first, so that no run is finished by what is about to be replaced."""
    for name in (MANIFEST, *RESULTS):
        remove(run / name)


def reopen_results(run: Path) -> list[Fault]:
    """Remove the manifest of the results, which are about to be written; what was wrong with them."""
    manifest = read_manifest(run)
    faults = [] if manifest is None else result_faults(run, manifest)
    remove(run / MANIFEST)
    return faults


def result_faults(run: Path, manifest: Manifest) -> list[Fault]:
    """What is wrong with the results and the config, all read."""
    found = ((run / name, file_fault(run / name, file)) for name, file in manifest.files.items())
    return [Fault(path, what) for path, what in found if what]


def finish_results(run: Path, stages: Mapping[str, Manifest], config: Any) -> None:
    """Declare the results finished: made by a config, given as plain mappings, from stages, given by their folders."""
    manifest = Manifest(
        stage="results",
        fingerprint=fingerprint(config),
        inputs={name: stage.content for name, stage in stages.items()},
        files={name: describe(run / name) for name in (CONFIG, *RESULTS)},
        details={"config": config},
    )
    write_manifest(run, manifest)


def check_result(run: Path, name: str) -> Path:
    """The path of a result that is as it was written, where that is known; raises InputError where it is not.

    Of a large file the size is compared.
    """
    manifest, path = read_manifest(run), run / name
    file = None if manifest is None else manifest.files.get(name)
    if file and (what := file_fault(path, file, content=file.size <= CHEAP)):
        raise InputError(f"{path} {what}: `influencespace repair {run}` makes it again")
    return path


def curated_batches(run: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """curated.parquet of a run's folder, some columns or, if none is named, all; raises InputError for an unknown one."""
    path = here(check_result(run, CURATED))
    if unknown := set(columns).difference(pq.read_schema(path).names):
        names = ", ".join(pq.read_schema(path).names)
        raise InputError(f"{path} has no column {min(unknown)!r}; it has {names}")
    return _batches(path, columns)


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=list(columns) or None)


def read_summary(run: Path | str) -> dict[str, Any]:
    """`summary.json` of a finished run's folder; raises InputError where there is none, or a damaged one."""
    path = Path(run) / SUMMARY
    try:
        summary = json.loads(here(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run} holds no finished run (no summary.json). Is it mistyped? A run that was interrupted is finished by the "
            "command that began it."
        ) from None
    except (ValueError, IsADirectoryError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it and run again") from None
    if not isinstance(summary, dict):
        raise InputError(f"{path} is damaged (an object is expected): remove it and run again")
    check_result(Path(run), SUMMARY)
    return summary
