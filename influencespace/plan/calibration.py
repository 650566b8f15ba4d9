"""Times and memory by measurement: some pairs go through the real stages on one worker, in a folder thrown away after."""

import io
import json
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from influencespace import pipeline
from influencespace.config import RunConfig
from influencespace.data.artifacts import Manifest, read_manifest
from influencespace.data.imported import (
    EmbeddingBatch,
    ImportOptions,
    import_options,
    read_imported_embeddings,
)
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import ReadOptions, Sample
from influencespace.engine.local import Engine, LocalEngine, Pool, run_task
from influencespace.engine.progress import progress
from influencespace.errors import InputError
from influencespace.plan.choices import Choices
from influencespace.plan.needs import Need, Needs
from influencespace.plan.survey import survey_all
from influencespace.stages.finish import STAGES
from influencespace.stages.ingest.embed import share
from influencespace.stages.proxies.proxies import ALL

# Groups of processes that a stage starts for itself; each costs what the calibration's own one took to start. Other
# tasks find processes that are there already.
STARTS = {"embed": 2, "cluster": 1, "train": 2}
CLEAR_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 forgets the peak of this process


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One stage of the slice."""

    need: Need
    """What the formulas say of the slice."""
    seconds: float
    startup: float
    """Seconds of these that come once for each worker, as building the encoder."""
    peak: int
    """Bytes of memory."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the slice showed."""

    stages: dict[str, Timing]
    choices: Choices
    start_seconds: float
    """Of one worker process."""


def calibrate(config: RunConfig, limit: int, engine: Engine, shards: int) -> Calibration:
    """Run `limit` pairs of every role through all stages on one worker, as `engine` would give to a run of `shards`.

    Raises InputError when the slice is too small for a run, or data or encoder cannot be used.
    """
    if limit < 1:
        raise InputError(f"--limit {limit}: give a number of pairs, such as 10000")
    workers = share(config.embed, engine, shards)
    began = time.monotonic()
    with progress("calibrate", limit, "pairs") as bar:
        (found,) = engine.map(
            run_task,
            [Slice(config=config, limit=limit)],
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
        )
        bar.advance(limit)
    calibration: Calibration = found[0]
    seconds: float = found[1]
    return replace(calibration, start_seconds=max(0.0, time.monotonic() - began - seconds))


def extrapolate(need: Need, calibration: Calibration) -> Need:
    """The need of a stage with its time, and with the memory that the slice took beyond what the formulas said."""
    small = calibration.stages[need.stage]
    steady = max(0.0, small.seconds - small.startup)
    starts = STARTS.get(need.stage.split()[0], 0) * calibration.start_seconds
    return replace(
        need,
        seconds=starts + small.startup + steady * need.work / small.need.work,
        worker=need.worker + max(0, small.peak - small.need.worker),
    )


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Task: the whole job on some pairs, one repeat of each training; and the seconds it took."""

    config: RunConfig
    limit: int

    @property
    def name(self) -> str:
        return f"calibration on {self.limit} pairs"

    def __call__(self) -> tuple[Calibration, float]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="influencespace-plan-") as name:
            folder = Path(name)
            config = self.sliced(folder)
            engine = Watched()
            try:
                pipeline.run(config, folder / "run", engine)
            except InputError as error:
                raise InputError(
                    f"calibration with --limit {self.limit}: {error}. Is the limit too small?"
                ) from None
            calibration = read_run(config, folder / "run", engine)
            return calibration, time.monotonic() - began

    def sliced(self, folder: Path) -> RunConfig:
        """The config on slices of its data, written below `folder`."""
        data = self.config.data
        paths: dict[str, Any] = dict.fromkeys(pipeline.ROLES)
        for role in pipeline.ROLES:
            if (spec := getattr(data, role)) and not (role == "pool" and data.embeddings):
                paths[role] = str(folder / f"{role}.tar")
                shards = list_shards(spec, data.images)
                samples = (sample for shard in shards for sample in read_shard(shard, self.config.embed.read))
                write_slice(Path(paths[role]), samples, self.limit)
        if data.embeddings:
            embeddings = folder / "embeddings.parquet"
            options = import_options(self.config.embed.read, joined=bool(data.pool))
            write_embeddings(embeddings, data.embeddings, options, self.limit)
            paths["embeddings"] = str(embeddings)
        return replace(
            self.config,
            data=replace(data, images=None, **paths | {"pool": paths["pool"] or ""}),
            embed=replace(self.config.embed, read=ReadOptions(), keep_parts=False),
            train=replace(self.config.train, seeds=self.config.train.seeds[:1]),
            # Whether so few pairs help or harm says nothing: all are kept, lest nothing is left to train on.
            curate=replace(self.config.curate, tau_low=-1e6),
            iterate=1,
        )


def write_slice(path: Path, samples: Iterator[Any], limit: int) -> None:
    """The first images of some pairs, at least `limit` of these where there are as many, as a WebDataset tar."""
    pairs = 0
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(s for s in samples if isinstance(s, Sample)):
            fields = {"captions": list(sample.captions), "uid": sample.uid, "group": sample.group}
            text = json.dumps({name: value for name, value in fields.items() if value is not None})
            for suffix, data in (("jpg", sample.image), ("json", text.encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            pairs += len(sample.captions)
            if pairs >= limit:
                return


def write_embeddings(path: Path, source: str, options: ImportOptions, limit: int) -> None:
    """The first imported embeddings as a Parquet file."""
    writer, left = None, limit
    for batch in read_imported_embeddings(source, options):
        if not isinstance(batch, EmbeddingBatch):
            continue
        columns = {
            "uid": pa.array(batch.uids),
            "caption": pa.array(batch.captions or [""] * len(batch.uids)),
            "image_embedding": pa.array(list(batch.images), pa.list_(pa.float32())),
            "text_embedding": pa.array(list(batch.texts), pa.list_(pa.float32())),
        }
        table = pa.table(columns).slice(0, left)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        left -= len(table)
        if left <= 0:
            break
    if writer is None:
        raise InputError(f"{source} holds no usable pair")
    writer.close()


def read_run(config: RunConfig, out: Path, engine: "Watched") -> Calibration:
    """What a finished run of the slice says: seconds by its manifests, peaks by their times."""
    folders = {f"embed {role}": out / "embed" / role for role in pipeline.ROLES}
    folders |= {name: out / name for name in STAGES}
    manifests = {name: found for name, path in folders.items() if (found := read_manifest(path)) is not None}
    choices = choices_of(manifests)
    sizes = survey_all(config)
    needs = {
        need.stage: need for need in Needs(config=config, sizes=sizes, choices=choices, engine=engine).all()
    }
    ended = {name: (folders[name] / "manifest.json").stat().st_mtime for name in manifests}
    stages = {
        name: Timing(
            need=needs[name],
            seconds=manifest.seconds,
            startup=float(manifest.details.get("startup_seconds", 0)),
            peak=engine.peak_between(ended[name] - manifest.seconds, ended[name]),
        )
        for name, manifest in manifests.items()
    }
    after = (out / "report.html").stat().st_mtime - max(ended.values())
    stages["report"] = Timing(need=needs["report"], seconds=max(0.0, after), startup=0, peak=0)
    return Calibration(stages=stages, choices=choices, start_seconds=0)


def choices_of(manifests: dict[str, Manifest]) -> Choices:
    """What the run chose."""
    proxy, curvature = manifests["proxy"].details, manifests["curvature"].details
    first = next(note for note in proxy["proxies"] if note["name"] == ALL)
    return Choices(
        steps=proxy["steps"],
        tried=sum(map(int, first["target_loss_by_steps"])),
        rank=max(note["rank"] for note in curvature["proxies"].values()),
        levels=tuple(manifests["cluster"].details["levels"]),
    )


@dataclass(frozen=True)
class Moment:
    """The memory of this process when a task has ended."""

    at: float
    now: int
    """Resident bytes."""
    peak: int
    """The most resident bytes since the moment before."""


@dataclass
class Watched(LocalEngine):
    """The plain loop on one core, with the memory of this process after every task."""

    moments: list[Moment] = field(default_factory=lambda: [moment()])

    @property
    def cores(self) -> int:
        return 1

    def map(self, *args: Any, **options: Any) -> Iterator[Any]:
        for result in super().map(*args, **options):
            self.moments.append(moment())
            yield result

    @contextmanager
    def pool(self, *args: Any, **options: Any) -> Iterator[Pool]:
        with super().pool(*args, **options) as pool:
            yield pool
        self.moments.append(moment())

    def peak_between(self, began: float, ended: float) -> int:
        """Memory that a fresh process would have needed for the tasks between two clock times.

        What earlier stages left in this one is not counted.
        """
        began -= 0.01  # the seconds of a manifest are rounded
        peaks = [moment.peak for moment in self.moments if began <= moment.at <= ended]
        before = [moment.now for moment in self.moments if moment.at < began] or [self.moments[0].now]
        return self.moments[0].now + max(0, max(peaks, default=0) - before[-1])


def moment() -> Moment:
    """The memory now, and its peak since the last call (since the process began, where the system keeps no other)."""
    try:
        status = Path("/proc/self/status").read_text()
        lines = dict(line.partition(":")[::2] for line in status.splitlines())
        now, peak = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        now = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    with suppress(OSError):
        CLEAR_PEAK.write_text("5")
    return Moment(at=time.time(), now=now, peak=peak)
