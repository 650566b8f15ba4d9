"""The verbs of the stages on Ray: tasks and actors for map, actors for folds, a Ray Data pipeline for streams."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from influencespace.engine.attempts import WorkerFactory, run_task
from influencespace.engine.cluster import alive_machines
from influencespace.engine.local import ONE_CORE, AtOnce, Pool
from influencespace.engine.logs import keep_logs
from influencespace.engine.place import Place
from influencespace.engine.placement import Machine, Resources
from influencespace.engine.ray_map import call_all, on_actors
from influencespace.engine.ray_pool import RayPool
from influencespace.engine.ray_stream import Pipeline


class RayEngine:
    """Every core of the cluster, or so many of this machine's."""

    def __init__(self, cores: int | None = None) -> None:
        self._cores = cores

    def __repr__(self) -> str:
        return f"RayEngine(cores={self.cores})"

    @property
    def cores(self) -> int:
        return self._cores or max(1, int(ray.cluster_resources().get("CPU", 1)))

    @property
    def cores_per_task(self) -> int:
        """On a cluster all but one of the largest machine's: a submitted job's driver may hold one itself."""
        if self._cores:
            return self._cores
        return max(1, int(max((machine.cpus for machine in self.machines), default=1)) - 1)

    @property
    def machines(self) -> Sequence[Machine]:
        machines = alive_machines()
        return [replace(machine, cpus=self._cores) for machine in machines] if self._cores else machines

    def map(
        self,
        factory: WorkerFactory,
        tasks: Sequence[Any],
        *,
        workers: int = 1,
        resources: Resources = ONE_CORE,
        set_aside: bool = False,
    ) -> Iterator[Any]:
        if not tasks:
            return
        place = self._place(resources, workers)
        results = call_all(tasks, place) if factory is run_task else on_actors(factory, tasks, place)
        for index, result in results:
            yield result.or_failed(tasks[index], set_aside)

    def stream(
        self,
        produce: WorkerFactory,
        tasks: Sequence[Any],
        consume: WorkerFactory,
        *,
        workers: AtOnce = 1,
        resources: Resources = ONE_CORE,
        readers: Resources = ONE_CORE,
        set_aside: bool = False,
    ) -> Iterator[Any]:
        if not tasks:
            return
        pipeline = Pipeline(
            produce=produce,
            consume=consume,
            readers=self._place(readers),
            place=self._place(resources),
            workers=(workers, workers) if isinstance(workers, int) else workers,
            cores=self._cores,
        )
        for index, result in pipeline.results(tasks):
            yield result.or_failed(tasks[index], set_aside)

    @contextmanager
    def pool(
        self, factory: WorkerFactory, *, workers: int = 1, resources: Resources = ONE_CORE
    ) -> Iterator[Pool]:
        pool = RayPool(factory, self._place(resources, workers))
        try:
            yield pool
        finally:
            pool.end()

    def keep_logs(self, folder: Path) -> None:
        keep_logs(folder)

    def _place(self, need: Resources, asked: int = 0) -> Place:
        return Place(lambda: self.machines, need, asked)
