"""The stages after the embedding on a small planted world, as the pipeline calls them; and how their results compare."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from planted import Planted
from safetensors.numpy import load_file

from influencespace.core.select import SelectConfig
from influencespace.data.artifacts import Manifest, read_manifest
from influencespace.data.blocks import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.nystrom import CurvatureConfig
from influencespace.models.training import StudentConfig
from influencespace.stages.attribute import AttributeConfig, attribute
from influencespace.stages.cluster import ClusterConfig, cluster
from influencespace.stages.confirm import serves_groups, with_chosen
from influencespace.stages.curate import curate
from influencespace.stages.curvature import TargetConfig, curvature
from influencespace.stages.decide import Scores
from influencespace.stages.dynamic import Reweighting
from influencespace.stages.evaluate import EvaluateConfig, evaluate
from influencespace.stages.fairness import fairness
from influencespace.stages.redundancy import RedundancyConfig, redundancy
from influencespace.stages.runtime import LocalRuntime, Pool, Recipe, Runtime
from influencespace.stages.student import ALL, Student, StudentsConfig, students
from influencespace.stages.towers import EmbedConfig
from influencespace.stages.train import TrainConfig, train

STAGES = (
    "student",
    "cluster",
    "redundancy",
    "curvature",
    "attribute",
    "fairness",
    "curate",
    "train",
    "evaluate",
)


@dataclass(frozen=True, kw_only=True)
class World:
    """The embedding artifacts of the three roles."""

    pool: Planted
    target: Planted
    test: Planted


def student_config(**changes: Any) -> StudentsConfig:
    train = {"dimension": 8, "steps": 20, "batch_size": 32, "learning_rate": 0.02}
    train |= {key: changes.pop(key) for key in list(changes) if key in train}
    defaults = {"choose_steps": False, "folds": 3, "contexts": 3, "block_size": 100}
    return StudentsConfig(train=StudentConfig(**train), **defaults | changes)


class Careful(LocalRuntime):
    """The plain loop, that fails where a cluster might wait for ever: at workers beside a pool, or for too many cores."""

    def __init__(self) -> None:
        self._pool_lives = False

    @property
    def cores_per_task(self) -> int:
        return max(1, self.cores - 1)

    def map(
        self, recipe: Recipe, tasks: Sequence[Any], *, num_cpus: float = 1, **options: Any
    ) -> Iterator[Any]:
        assert not self._pool_lives, "a pool may hold every core: give its workers the job, by pool.run"
        assert num_cpus <= self.cores_per_task
        yield from super().map(recipe, tasks, **options)

    @contextmanager
    def pool(self, recipe: Recipe, **options: Any) -> Iterator[Pool]:
        assert not self._pool_lives, "a pool may hold every core, and here is another"
        self._pool_lives = True
        try:
            with super().pool(recipe, **options) as pool:
                yield pool
        finally:
            self._pool_lives = False


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Every stage into `out/<stage>`, from the results of the stages before it in `source`."""

    out: Path
    world: World
    runtime: Runtime = field(default_factory=Careful)
    encoder: str = "unused"
    source_folder: Path | None = None
    student: StudentsConfig = field(default_factory=student_config)
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(k=2, batch_size=64, block_size=50))
    redundancy: RedundancyConfig = field(default_factory=RedundancyConfig)
    curvature: CurvatureConfig = field(default_factory=lambda: CurvatureConfig(rank=16))
    target: TargetConfig = field(default_factory=lambda: TargetConfig(folds=3))
    attribute: AttributeConfig = field(
        default_factory=lambda: AttributeConfig(quantiles=6, target_budget=10, placebo=40, block_size=64)
    )
    select: SelectConfig = field(default_factory=SelectConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(seeds=(0, 1)))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def source(self) -> Path:
        return self.source_folder or self.out

    @cached_property
    def sets(self) -> dict[str, PairSet]:
        return {name: PairSet(getattr(self.world, name).folder) for name in ("pool", "target", "test")}

    def manifest(self, stage: str) -> Manifest:
        """What a stage before wrote."""
        found = read_manifest(self.source / stage)
        assert found is not None, f"{stage} has not run"
        return found

    def given(self, *stages: str) -> dict[str, str]:
        """The fingerprints of what a stage reads."""
        return {"pool": self.world.pool.fingerprint, "target": self.world.target.fingerprint} | {
            stage: self.manifest(stage).fingerprint for stage in stages
        }

    def run(self, *stages: str) -> Manifest:
        """Run stages in their order, all when none is named; the last one's manifest."""
        return [getattr(self, f"_{stage}")() for stage in STAGES if stage in (stages or STAGES)][-1]

    def _student(self) -> Manifest:
        pool, target = self.sets["pool"], self.sets["target"]
        return students(pool, target, self.given(), self.student, self.out / "student", self.runtime)

    def _cluster(self) -> Manifest:
        pool = self.sets["pool"]
        return cluster(pool, len(pool), self.given(), self.cluster, self.out / "cluster", self.runtime)

    def _redundancy(self) -> Manifest:
        return redundancy(
            self.sets["pool"],
            self.source / "student",
            self.source / "cluster",
            self.given("student", "cluster"),
            self.redundancy,
            self.out / "redundancy",
            self.runtime,
        )

    def _curvature(self) -> Manifest:
        return curvature(
            self.sets["pool"],
            self.sets["target"],
            self.student,
            self.source / "student",
            self.given("student"),
            self.curvature,
            self.target,
            self.out / "curvature",
            self.runtime,
        )

    def _attribute(self) -> Manifest:
        return attribute(
            self.sets["pool"],
            self.student,
            {name: self.source / name for name in ("student", "cluster", "curvature")},
            self.given("student", "cluster", "curvature"),
            self.attribute,
            self.out / "attribute",
            self.runtime,
        )

    def _fairness(self) -> Manifest:
        return fairness(
            self.sets["pool"],
            self.sets["target"],
            self.student,
            self.curvature,
            self.source / "student",
            self.source / "attribute",
            serves_groups(self.select),
            self.attribute.form,
            self.attribute.block_size,
            (len(self.sets["pool"]), self.manifest("attribute").details["sample"]),
            self.given("student", "attribute"),
            self.out / "fairness",
            self.runtime,
        )

    def _curate(self) -> Manifest:
        return curate(
            self.sets["pool"],
            self.sets["target"],
            self.source / "attribute",
            self.source / "redundancy",
            self.source / "fairness",
            self.source / "student",
            self.given("student", "redundancy", "attribute", "fairness"),
            self.select,
            self.student,
            self.manifest("student").details["steps"],
            0,
            self.out / "curate",
            self.runtime,
        )

    def _train(self) -> Manifest:
        return train(
            self.sets["pool"],
            self.source / "curate" / "weights.parquet",
            self.student.train,
            self.manifest("student").details["steps"],
            self.given("curate"),
            self.train,
            self.out / "train",
            self.runtime,
            self.reweighting,
        )

    @property
    def reweighting(self) -> Reweighting:
        return Reweighting(
            pool=self.sets["pool"],
            target=self.sets["target"],
            students=self.student,
            student=Student(self.source / "student", ALL),
            scores=Scores(self.source / "attribute"),
            decided=with_chosen(self.select, self.manifest("curate").details),
        )

    def _evaluate(self) -> Manifest:
        return evaluate(
            self.sets["test"],
            self.sets["target"],
            self.student,
            self.source / "train",
            self.manifest("train").details["runs"],
            self.source / "curate" / "weights.parquet",
            EmbedConfig(encoder=self.encoder),
            self.given("train"),
            self.evaluate,
            self.out / "evaluate",
            self.runtime,
        )


class Killed(BaseException):
    """The end of a run by a signal: nobody catches it."""


@dataclass
class Counting(LocalRuntime):
    """The plain loop, that counts the tasks of its maps and may be killed after some of them."""

    most: float = float("inf")
    tasks: int = 0

    def map(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for result in super().map(*arguments, **options):
            self.tasks += 1
            yield result
            if self.tasks >= self.most:
                raise Killed


class Losing(LocalRuntime):
    """The plain loop on a bad cluster: the worker of every mapped task is lost as it ends, and the task is begun again."""

    def map(self, recipe: Recipe, tasks: Sequence[Any], **options: Any) -> Iterator[Any]:
        for task in tasks:
            _, answer = super().map(recipe, [task, task], **options)
            yield answer


class Idle(LocalRuntime):
    """A runtime that must not be given any work."""

    def map(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        raise AssertionError("there was nothing to do")

    def pool(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("there was nothing to do")


def times(folder: Path) -> dict[str, int]:
    """When each file of a folder was last written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def results(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a stage's folder, by file and name."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            columns = read_columns(path)
        elif path.suffix == ".safetensors":
            columns = load_file(path)
        elif path.suffix == ".npz":
            columns = dict(np.load(path))
        elif path.suffix == ".npy":
            columns = {"": np.load(path)}
        else:
            continue
        found |= {f"{path.name}/{name}": np.asarray(value) for name, value in columns.items()}
    return found


def assert_equal_results(left: Path, right: Path, spreads: float = 0.0) -> None:
    """The same files with the same numbers; floats may differ by so many standard deviations of their array."""
    first, second = results(left), results(right)
    assert first.keys() == second.keys()
    assert first
    for name, values in first.items():
        if spreads and np.issubdtype(values.dtype, np.floating):
            scale = float(np.nanstd(values)) or 1.0
            np.testing.assert_allclose(second[name], values, rtol=0, atol=spreads * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(second[name], values, err_msg=name)


def column(path: Path, name: str) -> list[Any]:
    values: list[Any] = pq.read_table(path, columns=[name])[name].to_pylist()
    return values
