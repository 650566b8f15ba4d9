"""The stages on a small planted world, carried out as the pipeline does; engines that watch them; how results compare."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import Planted
from safetensors.numpy import load_file

from influencespace.config import as_tree, load_config
from influencespace.data.artifacts import Manifest
from influencespace.data.buckets import Columns, read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import (
    ONE_CORE,
    Done,
    Engine,
    LocalEngine,
    Merge,
    Pool,
    WorkerFactory,
    nothing,
    run_task,
)
from influencespace.engine.placement import Resources
from influencespace.pipeline import STAGES
from influencespace.run import Run, Stage, carry_out
from influencespace.stages import passes
from influencespace.stages.rivals import descent, rivals
from influencespace.stages.scoring import influence, sampling
from influencespace.stages.scoring.score import Score, ScoreConfig
from influencespace.stages.scoring.trace import GradientIndex, TraceConfig
from influencespace.stages.selection import pair_evidence, selection

NAMES = tuple(str(stage.name) for stage in STAGES)
BESIDE: tuple[Stage, ...] = (
    Score(ScoreConfig(bucket_size=50)),
    GradientIndex(TraceConfig(index_dimension=10_000, bucket_size=50)),
)
"""Stages of commands on a finished run."""
BY_NAME: dict[str, Stage] = {str(stage.name): stage for stage in (*STAGES, *BESIDE)}
SMALL: dict[str, Any] = {
    "proxy.train.dimension": 8,
    "proxy.train.steps": 20,
    "proxy.train.batch_size": 32,
    "proxy.train.learning_rate": 0.02,
    "proxy.choose_steps": False,
    "proxy.folds": 3,
    "proxy.negative_batches": 3,
    "proxy.bucket_size": 100,
    "cluster.k": 2,
    "cluster.step_pairs": 32,
    "cluster.bucket_size": 50,
    "curvature.rank": 16,
    "curvature.target_folds": 3,
    "influence.quantiles": 6,
    "influence.target_samples": 10,
    "influence.control_samples": 40,
    "influence.bucket_size": 64,
    "selection.weighting": "auto",
    "train.seeds": [0, 1],
}
"""Settings, by their dotted names, with which every stage has something to do."""

World = dict[str, Planted]


def run_on(folder: Path, world: Mapping[str, Planted], settings: Mapping[str, Any] | None = None) -> Run:
    """A run on planted sets, with small settings but for these."""
    return Run(
        folder=folder,
        config=load_config(None, SMALL | dict(settings or {})),
        sets={role: PairSet(planted.folder) for role, planted in world.items()},
        inputs={role: planted.fingerprint for role, planted in world.items()},
    )


def with_settings(run: Run, settings: Mapping[str, Any]) -> Run:
    """The run with other settings, by their dotted names."""
    return replace(run, config=load_config(None, as_tree(run.config) | dict(settings)))


def with_sets(run: Run, **planted: Planted) -> Run:
    """The run with other sets, which are other inputs."""
    return replace(
        run,
        sets={**run.sets, **{role: PairSet(one.folder) for role, one in planted.items()}},
        inputs={**run.inputs, **{role: one.fingerprint for role, one in planted.items()}},
    )


def carry(run: Run, *names: str, engine: Engine | None = None) -> Manifest:
    """Carry out stages in their order, all when none is named; the last one's manifest."""
    engine = engine or Careful()
    return [carry_out(BY_NAME[name], run, engine) for name in BY_NAME if name in (names or NAMES)][-1]


def needed(name: str) -> set[str]:
    """All stages that a stage depends on, and those that these depend on."""
    needs = set(BY_NAME[name].needs)
    return needs.union(*map(needed, needs))


def beside(run: Run, folder: Path, *names: str, settings: Mapping[str, Any] | None = None) -> Run:
    """A run in another folder that has these stages before it, and links to the finished ones that they need: no others."""
    links = set[str]().union(*map(needed, names)) - set(names)
    folder.mkdir(parents=True, exist_ok=True)
    for name in links:
        if not (folder / name).exists():
            (folder / name).symlink_to(run.at(name))
    return with_settings(replace(run, folder=folder), settings or {})


def carry_beside(run: Run, folder: Path, name: str, **settings: Any) -> Run:
    """The run in another folder, where one stage has been done by other settings of its own section."""
    section = {"proxies": "proxy"}.get(name, name)
    other = beside(run, folder, name, settings={f"{section}.{key}": value for key, value in settings.items()})
    carry(other, name)
    return other


@dataclass(frozen=True)
class _Watched:
    """A pool whose work an engine wraps."""

    pool: Pool
    wrap: Callable[[WorkerFactory], WorkerFactory]

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None, *, done: Done = nothing) -> Any:
        return self.pool.fold(tasks, merge, shared, done=done)

    def run(self, job: Callable[[], Any]) -> Any:
        return self.pool.run(lambda: self.wrap(run_task)()(job))


class Careful(LocalEngine):
    """The plain loop, that fails where a cluster might wait for ever: at workers beside a pool, or for too many cores."""

    def __init__(self) -> None:
        self._pool_lives = False

    @property
    def cores_per_task(self) -> int:
        return max(1, self.cores - 1)

    def wrap(self, factory: WorkerFactory) -> WorkerFactory:
        """What is done to the workers."""
        return factory

    def map(
        self,
        factory: WorkerFactory,
        tasks: Sequence[Any],
        *,
        workers: int = 1,
        resources: Resources = ONE_CORE,
    ) -> Iterator[Any]:
        assert not self._pool_lives, "a pool may hold every core: give its workers the job, by pool.run"
        assert resources.cpus <= self.cores_per_task
        yield from super().map(self.wrap(factory), tasks, workers=workers, resources=resources)

    @contextmanager
    def pool(
        self, factory: WorkerFactory, *, workers: int = 1, resources: Resources = ONE_CORE
    ) -> Iterator[Pool]:
        assert not self._pool_lives, "a pool may hold every core, and here is another"
        self._pool_lives = True
        try:
            with super().pool(self.wrap(factory), workers=workers, resources=resources) as pool:
                yield _Watched(pool, self.wrap)
        finally:
            self._pool_lives = False


class Killed(BaseException):
    """The end of a run by a signal: nobody catches it."""


@dataclass
class Counting(Careful):
    """Counts the tasks that are done, and is killed where there would be more than so many."""

    limit: float = float("inf")
    tasks: int = 0
    _pool_lives: bool = field(default=False, init=False)

    def wrap(self, factory: WorkerFactory) -> WorkerFactory:
        def counted() -> Callable[..., Any]:
            work = factory()

            def one(*task: Any) -> Any:
                if self.tasks >= self.limit:
                    raise Killed
                result = work(*task)
                self.tasks += 1
                return result

            return one

        return counted


class Losing(Careful):
    """A bad cluster: the worker of every task is lost as it ends, and the task is begun again by another."""

    def wrap(self, factory: WorkerFactory) -> WorkerFactory:
        return lambda: lambda *task: [factory()(*task) for _ in range(2)][-1]


class Idle(LocalEngine):
    """An engine that must not be given any work."""

    def map(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        raise AssertionError("there was nothing to do")

    def pool(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("there was nothing to do")


def set_range(patch: pytest.MonkeyPatch, size: int) -> None:
    """Let passes over thin columns go by ranges of so many pairs."""
    for module in (passes, sampling, influence, pair_evidence, selection, rivals, descent):
        patch.setattr(module, "RANGE", size)


def times(folder: Path) -> dict[str, int]:
    """When each file of a folder was last written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def results(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a stage's folder, by file and name."""
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            columns: Any = read_columns(path)
        elif path.suffix == ".safetensors":
            columns = load_file(path)
        elif path.suffix == ".npz":
            columns = dict(np.load(path))
        elif path.suffix == ".npy":
            columns = {"": np.load(path)}
        else:
            continue
        arrays |= {f"{path.name}/{name}": np.asarray(value) for name, value in columns.items()}
    return arrays


def assert_equal_results(left: Path, right: Path, spreads: float = 0.0) -> None:
    """The same files with the same numbers; floats may differ by so many standard deviations of their array."""
    first, second = results(left), results(right)
    assert first.keys() == second.keys()
    for name, values in first.items():
        if spreads and np.issubdtype(values.dtype, np.floating):
            scale = float(np.nanstd(values)) or 1.0
            np.testing.assert_allclose(second[name], values, rtol=0, atol=spreads * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(second[name], values, err_msg=name)


def quality_of(run: Run) -> np.ndarray:
    """Quality of every pair of the pool: both scores in units of their spread, and their mean."""
    scores = columns(run, "proxies/quality")
    both = np.stack([scores["neg_clip_in"], scores["neg_clip_out"]])
    quality: np.ndarray = ((both - both.mean(1, keepdims=True)) / both.std(1, keepdims=True)).mean(0)
    return quality


def columns(run: Run, file: str, *names: str) -> Columns:
    """Columns of a file of the run, such as `influence/strata`."""
    return read_columns(run.folder / f"{file}.parquet", *names)
