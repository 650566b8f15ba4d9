"""A Run, its Stages, and how a stage is carried out: fingerprint, skip, work, manifest - once, for all of them."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import (
    MANIFEST,
    MISSING,
    Manifest,
    fingerprint,
    installed_versions,
    manifest_or_fault,
    remove,
    remove_half_written,
    rename,
    write_manifest,
)
from influencespace.data.buckets import ComputeColumns, buckets_of, join_buckets, remove_work, write_tasks
from influencespace.data.exchange import Exchange, ReduceGroups
from influencespace.data.integrity import cheap_faults, damage, describe_tasks, is_done
from influencespace.data.locations import alone_in
from influencespace.data.mirror import exists, here, is_file, is_folder, listing
from influencespace.data.pair_set import PairSet
from influencespace.data.results import CURATED, REPORT, check_result, curated_batches, read_summary
from influencespace.engine.local import THIN, Engine, Pool, WorkerFactory, run_once, run_task
from influencespace.engine.measured import Usage
from influencespace.engine.placement import WORKER_BYTES, Resources
from influencespace.engine.progress import Bar, progress
from influencespace.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Run:
    """A folder of artifacts and what they are made from: cheap to pickle, given to every stage, command and benchmark."""

    folder: Path
    config: Any
    """The RunConfig, composed of the stages' own sections, so that it lies above them."""
    sets: Mapping[str, PairSet] = field(default_factory=dict)
    """The pool, the target and the test set; of a later round also `everything`, the pool of the first."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What the sets were made from: name -> fingerprint."""
    previous: "Run | None" = None
    """The round before this one."""

    @property
    def pool(self) -> PairSet:
        return self.sets["pool"]

    @property
    def target(self) -> PairSet:
        return self.sets["target"]

    @property
    def test(self) -> PairSet:
        return self.sets["test"]

    @property
    def everything(self) -> PairSet:
        """The pool of the first round, of which later ones see what the round before kept."""
        return self.sets.get("everything", self.pool)

    @property
    def first(self) -> "Run":
        """The first round."""
        return self if self.previous is None else self.previous.first

    @property
    def seed(self) -> int:
        """From which every random choice derives."""
        return int(self.config.seed)

    def at(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.folder / stage

    def manifest(self, stage: str, purpose: str = "") -> Manifest:
        """What a finished stage recorded; raises InputError where it is not finished, or its manifest damaged."""
        manifest = manifest_or_fault(self.at(stage))
        if isinstance(manifest, Manifest):
            return manifest
        if manifest != MISSING:
            raise InputError(f"{self.at(stage)}/manifest.json {manifest}: {self._advice}")
        raise InputError(
            f"{self.folder} has no finished {stage} stage{purpose and f' {purpose}'}: run `influencespace run` with "
            "this folder first, or check the path"
        )

    def check(self, stage: str) -> None:
        """Check the files of a finished stage before they are read; raises InputError where one is not as it was written."""
        if faults := cheap_faults(self.at(stage), self.manifest(stage)):
            raise InputError(f"{faults[0]}: {self._advice}")

    @property
    def _advice(self) -> str:
        return f"`influencespace repair {self.first.folder}` makes it again"

    def summary(self) -> dict[str, Any]:
        """Every number of the table of a finished run; raises InputError where it is not finished."""
        return read_summary(self.folder)

    def curated(self) -> pa.Table:
        """The decision on every pair of a finished run: uid, kept, weight (mean 1 over the kept), score, its standard error
        score_se, stratum, reason.

        Raises InputError where the run is not finished.
        """
        self.summary()
        return pq.read_table(here(check_result(self.folder, CURATED)))

    def curated_batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """`curated`, or some columns of it, in batches of at most 65,536 pairs: of any pool, one batch is in memory."""
        self.summary()
        return curated_batches(self.folder, columns)

    def report(self) -> Path:
        """The self-contained page of a finished run; raises InputError where it is not finished."""
        self.summary()
        path = check_result(self.folder, REPORT)
        if is_file(path):
            return here(path)
        raise InputError(f"{path} is missing: run the same command again")

    def export(self, to: str, out: Path | str, *, shard_size: int = 10_000) -> Manifest:
        """Write the kept pairs into a folder as `npy` (DataComp), `webdataset` or `parquet`, `shard_size` of them a file.

        Raises InputError for another format, a folder that holds other files, and a run that is not finished or worked in.
        """
        from influencespace.data.exports import export

        summary = self.summary()
        kept = round(summary["kept_fraction"] * summary["rows"]["pool"])
        with alone_in(self.folder), progress("export", kept, "pairs") as bar:
            return export(self.folder, to, out, shard_size=shard_size, advance=bar.advance)


@dataclass(frozen=True, kw_only=True)
class Details:
    """What a stage reports of its work: every row that came in is either kept or rejected."""

    rows_in: int = 0
    rows_out: int = 0
    rejected: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


class Stage(ABC):
    """Artifacts in, one artifact out. A new one is a class and an entry in `pipeline.STAGES`."""

    name: str
    """Of its folder."""
    version: ClassVar[int] = 1
    """Raised when the same settings would give other files."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The stages whose files it reads."""

    @abstractmethod
    def settings(self, config: Any) -> Any:
        """All of the RunConfig that its files depend on, in a form that `fingerprint` takes."""

    def inputs(self, run: Run) -> Mapping[str, str]:
        """What it reads from outside the run: name -> fingerprint."""
        return {}

    def resources(self, run: Run) -> Resources:
        """What one of its workers needs."""
        return THIN

    @abstractmethod
    def work(self, run: Run, workers: "Workers") -> Details:
        """Write the artifact's files into `workers.folder`; raises InputError for what the user has to change."""

    def tidy(self, run: Run) -> None:
        """Remove what only served the work, once its result is there."""
        return


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What a stage works with: a folder to write into, and verbs over tasks that show their progress.

    Finished units of work (buckets, trained proxies) are files in `folder`, which belongs to one fingerprint: a unit is done
    if and only if its file is there.
    """

    engine: Engine
    folder: Path
    stage: str
    resources: Resources = field(default_factory=Resources)

    @property
    def cores(self) -> int:
        return self.engine.cores

    @property
    def device(self) -> str:
        """Where heavy tasks compute: on GPUs where there are any."""
        return "cuda" if any(machine.gpus for machine in self.engine.machines) else "cpu"

    def heavy(self, gpu_share: float = 0.25, memory: int = WORKER_BYTES, **more: Any) -> Resources:
        """What one worker of a heavy task needs: a core, and a share of a GPU where there are any."""
        return Resources(gpus=gpu_share if self.device == "cuda" else 0.0, memory=memory, **more)

    def once(self, job: Callable[[], Any], memory: int = WORKER_BYTES) -> Any:
        """Run one job on one worker, away from the driver."""
        return run_once(self.engine, job, Resources(memory=memory))

    def map(
        self,
        tasks: Sequence[Callable[[], Any]],
        *,
        total: int | None = None,
        unit: str = "pairs",
        label: str = "",
        size: Callable[[Any], int] = lambda result: 1,
        resources: Resources | None = None,
    ) -> list[Any]:
        """The results of all tasks, in the order in which they end; `size` of a result advances the progress to `total`."""
        results = []
        with self.progress(len(tasks) if total is None else total, unit, label) as bar:
            for result in self.engine.map(run_task, tasks, workers=0, resources=resources or self.resources):
                results.append(result)
                bar.advance(size(result))
        return results

    def buckets(self, name: str, compute: ComputeColumns, rows: range, size: int, **shown: Any) -> list[int]:
        """Write what `compute(start, stop)` gives for every bucket of some rows; where the buckets begin. More is as of `map`."""
        spans = [(rows.start + a, rows.start + b) for a, b in buckets_of(len(rows), size)]
        self.map(write_tasks(self.folder, name, compute, spans), total=len(rows), size=int, **shown)
        return [start for start, _ in spans]

    def table(self, name: str, compute: ComputeColumns, rows: int, size: int, **shown: Any) -> None:
        """Write `name`.parquet: what `compute(start, stop)` gives for every bucket of the rows, in their order."""
        self.join(name, self.buckets(name, compute, range(rows), size, **shown))

    def join(self, name: str, starts: Sequence[int]) -> None:
        """Write `name`.parquet from finished buckets."""
        self.once(partial(join_buckets, self.folder, name, tuple(starts)))

    def group_by(
        self,
        name: str,
        emit: ComputeColumns,
        key: str,
        reduce: ReduceGroups,
        rows: int,
        size: int,
        *,
        resources: Resources | None = None,
        **more: Any,
    ) -> None:
        """Write `name`.parquet, in row order: what `reduce` gives for groups of the rows of `emit` alike in the column
        `key`; options of the exchange."""
        label, exchange = name.lstrip("."), Exchange(self.folder, name, emit, key, reduce, rows, size, **more)
        for tasks, total, unit in exchange.steps():
            self.map(tasks, total=total, unit=unit, label=label, size=int, resources=resources)

    @contextmanager
    def pool(
        self, factory: WorkerFactory, tasks: int, *, resources: Resources | None = None
    ) -> Iterator[Pool]:
        """Workers that live until the block ends, no more than there are tasks."""
        workers = tasks if tasks < self.cores else 0  # 0: all there is room for, now and later
        with self.engine.pool(factory, workers=workers, resources=resources or self.resources) as pool:
            yield pool

    @contextmanager
    def progress(self, total: int, unit: str = "pairs", label: str = "") -> Iterator[Bar]:
        """Show rate and time left of what goes on in the block."""
        with progress(f"{self.stage} ({label})" if label else self.stage, total, unit) as bar:
            yield bar


def stage_fingerprint(stage: Stage, run: Run) -> tuple[str, dict[str, str]]:
    """What the stage's files depend on, as one fingerprint, and the fingerprints of its inputs by name."""
    inputs = {
        **run.inputs,
        **stage.inputs(run),
        **{name: run.manifest(name).content for name in stage.needs},
    }
    settings = stage.settings(run.config)
    return fingerprint([stage.name, stage.version, settings, inputs]), inputs


def carry_out(stage: Stage, run: Run, engine: Engine) -> Manifest:
    """The stage's manifest: of what is there already by the same settings from the same inputs, or of new work.

    The work is done in a folder beside the stage's, named by its fingerprint, which takes the stage's place once it is whole:
    a killed stage continues there, and files of other settings are never taken for its own.
    """
    folder = run.at(stage.name).resolve()  # it may lie elsewhere by a link, which stays
    mark, inputs = stage_fingerprint(stage, run)
    working = folder.with_name(f".{folder.name}-{mark[:16]}")
    if not is_done(folder, mark):
        if faults := damage(folder, mark):
            more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
            print(f"{stage.name}: done again, as {faults[0]}{more}", file=sys.stderr, flush=True)
        if not is_done(working, mark):  # whole, but killed before it took its place
            _work(stage, run, engine, working, (mark, inputs))
        remove_work(working)
        remove(folder)
        rename(working, folder)
    for left in listing(
        folder.parent, f".{folder.name}-{'[0-9a-f]' * 16}"
    ):  # not of a stage with a longer name
        remove(left)
    stage.tidy(run)
    return run.manifest(str(stage.name))


def _work(
    stage: Stage, run: Run, engine: Engine, working: Path, made_from: tuple[str, dict[str, str]]
) -> None:
    began = time.monotonic()
    for name in stage.needs:
        run.check(name)
    if exists(working / MANIFEST) or not is_folder(working):
        remove(working)  # whole, and damaged since: no file of it counts as done
    working.mkdir(parents=True, exist_ok=True)
    remove_half_written(working)
    usage, needs = Usage(engine), stage.resources(run)
    workers = Workers(engine=usage.engine, folder=working, stage=str(stage.name), resources=needs)
    reported = stage.work(run, workers)
    described = engine.map(run_task, describe_tasks(working), workers=engine.cores, resources=THIN)
    files = {name: file for some in described for name, file in some.items()}
    manifest = Manifest(
        stage=str(stage.name),
        fingerprint=made_from[0],
        inputs=made_from[1],
        rows_in=reported.rows_in,
        rows_out=reported.rows_out,
        rejected=reported.rejected,
        files=dict(sorted(files.items())),
        versions=installed_versions(),
        seconds=round(seconds := time.monotonic() - began, 3),
        usage=usage.within(seconds),
        details=dict(reported.details),
    )
    write_manifest(working, manifest)
