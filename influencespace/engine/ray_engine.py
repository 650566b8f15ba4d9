"""The two verbs of the stages on Ray: Ray Data's actor pool for map, plain actors for folds."""

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from influencespace.engine.attempts import TaskResult, Worker, WorkerFactory, attempt, run_task
from influencespace.engine.local import AHEAD, ONE_CORE, AtOnce, Done, Merge, MergeTree, Pool, nothing
from influencespace.engine.placement import Machine, Resources, beside, check_place
from influencespace.engine.ray_stream import (
    TASK_RETRIES,
    Pipeline,
    Starts,
    lost_worker,
    ray_data,
    ray_options,
)


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
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [
            Machine(
                cpus=self._cores or has.get("CPU", 0),
                gpus=has.get("GPU", 0),
                memory=int(has.get("memory", 0)),
            )
            for has in alive
        ]

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
        check_place(self.machines, resources)
        if factory is run_task:
            for index, result in _call_all(tasks, max(1, workers), ray_options(resources)):
                yield result.or_failed(tasks[index], set_aside)
            return
        # One row and one block a task: Ray Data then hands out single tasks and gives back single results.
        items = [{"index": index, "task": pickle.dumps(task)} for index, task in enumerate(tasks)]
        starts = ray.remote(Starts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        results = ray_data().from_items(items, override_num_blocks=len(items))
        results = results.map_batches(
            _MapWorker,
            fn_constructor_args=(factory, starts),
            batch_size=1,
            # Shards take long: a task that waited behind another would leave some other worker idle.
            compute=ray_data().ActorPoolStrategy(
                size=max(1, min(workers, len(items))), max_tasks_in_flight_per_actor=1
            ),
            **ray_options(resources),
        )
        for row in results.iter_rows():
            yield pickle.loads(row["result"]).or_failed(tasks[row["index"]], set_aside)

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
        for need in (readers, resources):
            check_place(self.machines, need)
        least, most = (workers, workers) if isinstance(workers, int) else workers
        room = beside(self.machines, resources, readers)
        pipeline = Pipeline(
            produce=produce,
            consume=consume,
            readers=readers,
            resources=resources,
            workers=(max(1, min(least, room)), max(1, most)),
            max_readers=self._cores,
        )
        for index, result in pipeline.results(tasks):
            yield result.or_failed(tasks[index], set_aside)

    @contextmanager
    def pool(
        self, factory: WorkerFactory, *, workers: int = 1, resources: Resources = ONE_CORE
    ) -> Iterator[Pool]:
        check_place(self.machines, resources)
        actor = ray.remote(Worker).options(
            **ray_options(resources), max_restarts=-1, max_task_retries=TASK_RETRIES
        )
        actors = [actor.remote(factory) for _ in range(max(1, workers))]
        try:
            yield _RayPool(actors)
        finally:
            for one in actors:
                ray.kill(one)


def _call_all(
    tasks: Sequence[Any], at_once: int, resources: dict[str, float]
) -> Iterator[tuple[int, TaskResult]]:
    """Tasks that know themselves what to do need no actor: Ray hands them to processes that are there already.

    Starting a process costs seconds, mostly importing; a run has dozens of such calls.
    """
    worker = ray.remote(attempt).options(**resources, max_retries=TASK_RETRIES)
    waiting = deque(range(len(tasks)))
    running: dict[Any, int] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            index = waiting.popleft()
            running[worker.remote(tasks[index])] = index
        (reference, *_), _ = ray.wait(list(running), num_returns=1)
        index = running.pop(reference)
        yield index, _result(reference, tasks[index])


def _result(reference: Any, task: Any) -> TaskResult:
    """The worker's result; a failure where no worker survived the task."""
    try:
        result: TaskResult = ray.get(reference)
    except ray.exceptions.RayError as error:
        lost = lost_worker(task)
        return replace(lost, error=f"{lost.error} Ray says: {error}")
    return result


class _MapWorker:
    """A worker as Ray Data calls it: one row in, one row out."""

    def __init__(self, factory: WorkerFactory, starts: Any) -> None:
        self._worker = Worker(factory)
        self._starts = starts

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        task = pickle.loads(batch["task"][0])
        if ray.get(self._starts.begin.remote(int(batch["index"][0]))) > TASK_RETRIES + 1:
            result = lost_worker(task)
        else:
            result = self._worker.attempt(task)
        return {"index": [batch["index"][0]], "result": [pickle.dumps(result)]}


@dataclass(frozen=True)
class _Running:
    """A task of a fold, or two states that are merged: its place in the tree, where its state will be, and who works on it."""

    height: int
    index: int
    state: Any
    actor: Any


class _RayPool:
    """Actors are given work as they start: on a busy cluster some may never find a place."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._starting = {actor.start.remote(): actor for actor in actors}
        self._idle: deque[Any] = deque()

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None, *, done: Done = nothing) -> Any:
        """States stay where they were made or merged: only the last one comes here."""
        tree, shared, merge = MergeTree(len(tasks)), ray.put(shared), ray.put(merge)
        waiting = deque(range(len(tasks)))
        merges: deque[tuple[int, int, Any, Any]] = deque()
        running: dict[Any, _Running] = {}
        try:
            while waiting or merges or running:
                most = min((job.index for job in running.values() if not job.height), default=len(tasks))
                most += AHEAD * (len(self._idle) + len(running))
                while self._idle and (merges or (waiting and waiting[0] < most)):
                    actor = self._idle.popleft()
                    if merges:
                        height, index, left, right = merges.popleft()
                        reference, state = actor.merge.options(num_returns=2).remote(merge, left, right)
                    else:
                        height, index = 0, waiting.popleft()
                        reference, state = actor.fold.options(num_returns=2).remote(tasks[index], shared)
                    running[reference] = _Running(height, index, state, actor)
                (reference, *_), _ = ray.wait([*running, *self._starting], num_returns=1)
                if reference in self._starting:
                    self._idle.append(self._starting.pop(reference))
                    continue
                job = running.pop(reference)
                self._idle.append(job.actor)
                _result(reference, tasks[job.index << job.height]).result()
                if not job.height:
                    done(tasks[job.index])
                if pair := tree.add(job.height, job.index, job.state):
                    merges.append(pair)
        finally:
            self._idle.extend(job.actor for job in running.values())
        return ray.get(tree.root)

    def run(self, job: Callable[[], Any]) -> Any:
        while not self._idle:
            (reference, *_), _ = ray.wait(list(self._starting), num_returns=1)
            self._idle.append(self._starting.pop(reference))
        return _result(self._idle[0].run.remote(job), job).result()
