"""Whether all files of a run are as they were written, by every digest and count; and how what is not is made again."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from influencespace import pipeline
from influencespace.config import RunConfig, load_config, save_config
from influencespace.data.artifacts import MANIFEST, MISSING, File, Manifest, manifest_or_fault, remove
from influencespace.data.integrity import Fault, file_fault, is_cheap
from influencespace.data.mirror import all_below, is_file, is_folder, is_there, listing
from influencespace.data.results import CONFIG, RESULTS, forget_results
from influencespace.engine.local import Engine, machine_cores
from influencespace.engine.progress import progress
from influencespace.errors import InputError
from influencespace.run import Run
from influencespace.stages.ingest.split import Split

DEPTH = 3  # of folders between a run and an artifact of it: round-1/embed/pool
OF_COMMANDS = {"scores": "score", "trace": "trace", "sweep": "sweep"}
"""Folders of a run that other commands write, and these."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it was written."""

    fault: Fault
    artifact: str | None = None
    """Folder of the run that is to be made again; "" for the results, None where the file only is to be removed."""
    unread: bool = False
    """Whether the stages that read the file may not have noticed: it is too large to be read whole before every use."""


@dataclass(frozen=True)
class StoredRun:
    """The artifacts of a run folder as their manifests describe them."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> "StoredRun":
        """Raises InputError where there is no run."""
        if not is_file(folder / CONFIG) and not is_file(folder / MANIFEST):
            raise InputError(f"{folder} holds no run (no {CONFIG}). Is it mistyped?")
        return cls(folder)

    @cached_property
    def results(self) -> Manifest | str:
        return manifest_or_fault(self.folder)

    @cached_property
    def artifacts(self) -> dict[str, Manifest | str]:
        """By their folders: those that are there, and those that the results were made from."""
        expected = [] if isinstance(self.results, str) else self.results.inputs
        names = dict.fromkeys([*expected, *_artifacts_in(self.folder, self.folder)])
        return {name: manifest_or_fault(self.folder / name) for name in names}

    @property
    def files(self) -> Iterator[tuple[str, str, File]]:
        """Folder of the artifact, name and description of every file."""
        for artifact, manifest in {**self.artifacts, "": self.results}.items():
            if isinstance(manifest, Manifest):
                for name, file in manifest.files.items():
                    yield artifact, name, file

    def manifest(self, artifact: str) -> Manifest | None:
        manifest = self.artifacts.get(artifact, MISSING)
        return manifest if isinstance(manifest, Manifest) else None

    def of_commands(self, artifact: str) -> str | None:
        """The command that writes an artifact, where it is none of the run itself."""
        return OF_COMMANDS.get(artifact.partition("/")[0])

    def dependents(self, artifact: str) -> set[str]:
        """The artifacts that were made from one, and those that were made from these."""
        found, base = set[str](), artifact.partition("/")[0] if artifact.startswith("round-") else ""
        left = [artifact.removeprefix(f"{base}/")]
        while left:
            needed = left.pop()
            for name, manifest in self.artifacts.items():
                if isinstance(manifest, Manifest) and needed in manifest.inputs and name not in found:
                    found.add(name)
                    left.append(manifest.stage)
        return found


def _artifacts_in(folder: Path, root: Path) -> Iterator[str]:
    """Folders below one that have a manifest; they may lie elsewhere by links."""
    for path in listing(folder):
        if not path.name.startswith(".") and is_folder(path):
            name = path.relative_to(root)
            if is_there(path / MANIFEST):
                yield name.as_posix()
            elif len(name.parts) < DEPTH:
                yield from _artifacts_in(path, root)


def verify_run(folder: Path) -> list[Problem]:
    """Everything in a run folder that is not as it was written; all of it is read.

    Raises InputError where there is no run.
    """
    run = StoredRun.open(folder)
    return [*_manifests(run), *_files(run), *_counts(run), *_leftovers(run)]


def is_finished(folder: Path) -> bool:
    """Whether a run has got as far as its results."""
    return any(is_there(folder / name) for name in (MANIFEST, *RESULTS))


def _manifests(run: StoredRun) -> Iterator[Problem]:
    if isinstance(run.results, str) and is_finished(run.folder):
        yield Problem(fault=Fault(run.folder / MANIFEST, run.results), artifact="")
    for name, manifest in run.artifacts.items():
        if isinstance(manifest, str):
            yield Problem(fault=Fault(run.folder / name / MANIFEST, manifest), artifact=name)
        elif isinstance(run.results, Manifest) and manifest.content != run.results.inputs.get(
            name, manifest.content
        ):
            what = "is not the one that the results were made from"
            yield Problem(fault=Fault(run.folder / name / MANIFEST, what), artifact="")


def _files(run: StoredRun) -> Iterator[Problem]:
    files = list(run.files)
    paths = [run.folder / artifact / name for artifact, name, _ in files]
    total = sum(file.size for _, _, file in files)
    with (
        ThreadPoolExecutor(machine_cores()) as threads,
        progress("verify", max(1, round(total / 1e6)), "MB") as bar,
    ):
        shown = 0.0
        whats = threads.map(file_fault, paths, [file for _, _, file in files])
        for (artifact, name, file), path, what in zip(files, paths, whats, strict=True):
            shown += file.size / 1e6
            bar.advance(int(shown))
            shown -= int(shown)
            if what:
                manifest = run.manifest(artifact)
                unread = manifest is not None and not is_cheap(manifest, name)
                yield Problem(fault=Fault(path, what), artifact=artifact, unread=unread)


def _counts(run: StoredRun) -> Iterator[Problem]:
    """Rows of what one stage wrote against those of another: all pairs of the split are decided on."""
    split, selection, results = run.manifest(Split.name), run.manifest("selection"), run.results
    if split is None or selection is None:
        return
    pairs, path = split.details["rows"]["pool"], run.folder / "selection" / MANIFEST
    if selection.rows_in != pairs:
        fault = Fault(path, f"counts {selection.rows_in:,} pairs, and the split has {pairs:,}")
        yield Problem(fault=fault, artifact="selection")
    for manifest, artifact in ((selection, "selection"), (results, "")):
        file = manifest.files.get("curated.parquet") if isinstance(manifest, Manifest) else None
        if file is not None and file.rows != pairs:
            what = f"has {file.rows} rows, and the split has {pairs:,}"
            yield Problem(fault=Fault(run.folder / artifact / "curated.parquet", what), artifact=artifact)


def _leftovers(run: StoredRun) -> Iterator[Problem]:
    """Files that no manifest names: half-written ones, and strangers."""
    for path in listing(run.folder, ".*.tmp"):
        yield Problem(fault=Fault(path, "was left half written"))
    for name, manifest in run.artifacts.items():
        if not isinstance(manifest, Manifest) or run.of_commands(name):
            continue
        folder = run.folder / name
        for path in all_below(folder):
            relative = path.relative_to(folder).as_posix()
            if relative not in (*manifest.files, MANIFEST):
                yield Problem(fault=Fault(path, "is no part of this stage"))


def advice(run: Path, problem: Problem) -> str:
    """What to do about a problem, as half a sentence."""
    repair = f"`influencespace repair {run}`"
    if problem.artifact is None:
        return f"{repair} removes it"
    if command := StoredRun(run).of_commands(problem.artifact):
        return f"{repair} removes it, and `influencespace {command}` makes it again"
    return f"{repair} makes it again"


def repair_run(folder: Path, problems: Sequence[Problem], engine: Engine) -> Run:
    """Remove what is not as it was written, and carry the run on by its own config, which makes again what is missing.

    Raises InputError where the config is damaged and not recorded elsewhere, and for data that are gone.
    """
    run = StoredRun.open(folder)
    config = _config(run)
    again = {problem.artifact for problem in problems if problem.artifact}
    for problem in problems:
        if problem.artifact is None:
            remove(problem.fault.path)
        elif problem.artifact and problem.unread:
            again |= run.dependents(problem.artifact)
    for artifact in again:
        remove(folder / artifact if run.of_commands(artifact) else folder / artifact / MANIFEST)
    if problems:
        forget_results(folder)
    return pipeline.curate(config, folder, engine)


def _config(run: StoredRun) -> RunConfig:
    """The config of a run: the one that its results were made by, where they are finished."""
    path = run.folder / CONFIG
    if isinstance(run.results, str):
        return load_config(path)
    recorded: Mapping[str, Any] = run.results.details["config"]
    config = load_config(None, recorded)
    if file_fault(path, run.results.files[CONFIG]):
        remove(path)
        save_config(config, path)
    return config
