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

from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import Manifest, read_manifest
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, LocalEngine, Pool, WorkerFactory
from influencespace.estimators.influence import CurvatureConfig
from influencespace.models.training import HeadsConfig
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.proxies.proxies import ALL, Proxy, ProxyConfig, proxies
from influencespace.stages.scoring.cluster import ClusterConfig, cluster
from influencespace.stages.scoring.curvature import TargetConfig, curvature
from influencespace.stages.scoring.fairness import fairness
from influencespace.stages.scoring.influence import InfluenceConfig, attribute
from influencespace.stages.selection.evidence import Scores
from influencespace.stages.selection.redundancy import RedundancyConfig, redundancy
from influencespace.stages.selection.selection import curate
from influencespace.stages.selection.weighting import serves_groups, with_chosen
from influencespace.stages.training.dynamic import Reweighting
from influencespace.stages.training.evaluate import EvaluateConfig, evaluate
from influencespace.stages.training.train import TrainConfig, train

STAGES = (
    "proxy",
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


def proxy_config(**changes: Any) -> ProxyConfig:
    train = {"dimension": 8, "steps": 20, "batch_size": 32, "learning_rate": 0.02}
    train |= {key: changes.pop(key) for key in list(changes) if key in train}
    defaults = {"choose_steps": False, "folds": 3, "contexts": 3, "bucket_size": 100}
    return ProxyConfig(train=HeadsConfig(**train), **defaults | changes)


class Careful(LocalEngine):
    """The plain loop, that fails where a cluster might wait for ever: at workers beside a pool, or for too many cores."""

    def __init__(self) -> None:
        self._pool_lives = False

    @property
    def cores_per_task(self) -> int:
        return max(1, self.cores - 1)

    def map(
        self, recipe: WorkerFactory, tasks: Sequence[Any], *, num_cpus: float = 1, **options: Any
    ) -> Iterator[Any]:
        assert not self._pool_lives, "a pool may hold every core: give its workers the job, by pool.run"
        assert num_cpus <= self.cores_per_task
        yield from super().map(recipe, tasks, **options)

    @contextmanager
    def pool(self, recipe: WorkerFactory, **options: Any) -> Iterator[Pool]:
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
    engine: Engine = field(default_factory=Careful)
    encoder: str = "unused"
    source_folder: Path | None = None
    proxy: ProxyConfig = field(default_factory=proxy_config)
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(k=2, batch_size=64, bucket_size=50))
    redundancy: RedundancyConfig = field(default_factory=RedundancyConfig)
    curvature: CurvatureConfig = field(default_factory=lambda: CurvatureConfig(rank=16))
    target: TargetConfig = field(default_factory=lambda: TargetConfig(folds=3))
    attribute: InfluenceConfig = field(
        default_factory=lambda: InfluenceConfig(
            quantiles=6, target_budget=10, caption_control=40, bucket_size=64
        )
    )
    select: SelectionConfig = field(default_factory=SelectionConfig)
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

    def _proxy(self) -> Manifest:
        pool, target = self.sets["pool"], self.sets["target"]
        return proxies(pool, target, self.given(), self.proxy, self.out / "proxy", self.engine)

    def _cluster(self) -> Manifest:
        pool = self.sets["pool"]
        return cluster(pool, len(pool), self.given(), self.cluster, self.out / "cluster", self.engine)

    def _redundancy(self) -> Manifest:
        return redundancy(
            self.sets["pool"],
            self.source / "proxy",
            self.source / "cluster",
            self.given("proxy", "cluster"),
            self.redundancy,
            self.out / "redundancy",
            self.engine,
        )

    def _curvature(self) -> Manifest:
        return curvature(
            self.sets["pool"],
            self.sets["target"],
            self.proxy,
            self.source / "proxy",
            self.given("proxy"),
            self.curvature,
            self.target,
            self.out / "curvature",
            self.engine,
        )

    def _attribute(self) -> Manifest:
        return attribute(
            self.sets["pool"],
            self.proxy,
            {name: self.source / name for name in ("proxy", "cluster", "curvature")},
            self.given("proxy", "cluster", "curvature"),
            self.attribute,
            self.out / "attribute",
            self.engine,
        )

    def _fairness(self) -> Manifest:
        return fairness(
            self.sets["pool"],
            self.sets["target"],
            self.proxy,
            self.curvature,
            self.source / "proxy",
            self.source / "attribute",
            serves_groups(self.select),
            self.attribute.form,
            self.attribute.bucket_size,
            (len(self.sets["pool"]), self.manifest("attribute").details["sample"]),
            self.given("proxy", "attribute"),
            self.out / "fairness",
            self.engine,
        )

    def _curate(self) -> Manifest:
        return curate(
            self.sets["pool"],
            self.sets["target"],
            self.source / "attribute",
            self.source / "redundancy",
            self.source / "fairness",
            self.source / "proxy",
            self.given("proxy", "redundancy", "attribute", "fairness"),
            self.select,
            self.proxy,
            self.manifest("proxy").details["steps"],
            0,
            self.out / "curate",
            self.engine,
        )

    def _train(self) -> Manifest:
        return train(
            self.sets["pool"],
            self.source / "curate" / "weights.parquet",
            self.proxy.train,
            self.manifest("proxy").details["steps"],
            self.given("curate"),
            self.train,
            self.out / "train",
            self.engine,
            self.reweighting,
        )

    @property
    def reweighting(self) -> Reweighting:
        return Reweighting(
            pool=self.sets["pool"],
            target=self.sets["target"],
            proxies=self.proxy,
            proxy=Proxy(self.source / "proxy", ALL),
            scores=Scores(self.source / "attribute"),
            decided=with_chosen(self.select, self.manifest("curate").details),
        )

    def _evaluate(self) -> Manifest:
        return evaluate(
            self.sets["test"],
            self.sets["target"],
            self.proxy,
            self.source / "train",
            self.manifest("train").details["runs"],
            self.source / "curate" / "weights.parquet",
            EmbedConfig(encoder=self.encoder),
            self.given("train"),
            self.evaluate,
            self.out / "evaluate",
            self.engine,
        )


class Killed(BaseException):
    """The end of a run by a signal: nobody catches it."""


@dataclass
class Counting(LocalEngine):
    """The plain loop, that counts the tasks of its maps and may be killed after some of them."""

    most: float = float("inf")
    tasks: int = 0

    def map(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for result in super().map(*arguments, **options):
            self.tasks += 1
            yield result
            if self.tasks >= self.most:
                raise Killed


class Losing(LocalEngine):
    """The plain loop on a bad cluster: the worker of every mapped task is lost as it ends, and the task is begun again."""

    def map(self, recipe: WorkerFactory, tasks: Sequence[Any], **options: Any) -> Iterator[Any]:
        for task in tasks:
            _, answer = super().map(recipe, [task, task], **options)
            yield answer


class Idle(LocalEngine):
    """A engine that must not be given any work."""

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
