"""The only two verbs of the stages: *map* tasks over workers, and *fold* tasks into one state.

A recipe crosses the wire and the worker is born where it works: `recipe()` returns the callable that is then
given one task after another. Folded states are merged in the order of the tasks, whatever the order in which
they finish, so that any number of actors gives the same bits. `LocalRuntime` is the plain loop: the truth.
"""

import logging
import os
import pickle
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray

from influencespace.errors import InputError

Recipe = Callable[[], Callable[..., Any]]
Merge = Callable[[Any, Any], Any]

# A worker that dies (killed node, out of memory) is always replaced, but a task may lose only so many.
TASK_RETRIES = 3
# How far an actor may run ahead of the slowest task: bounds the states that wait to be merged in order.
AHEAD = 4


class TaskError(RuntimeError):
    """A task raised an unexpected exception: names the task and carries the worker's traceback."""


class Pool(Protocol):
    """Persistent workers for repeated folds."""

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None) -> Any:
        """Merge `worker(task, shared)` over `tasks`, in their order.

        Raises ValueError without tasks, TaskError (or the worker's InputError) where a task fails.
        """

    def run(self, job: Callable[[], Any]) -> Any:
        """One job on one of the workers. While a pool lives it may hold every core: a map would wait for ever."""


class Runtime(Protocol):
    """Where the work of the stages is done."""

    @property
    def cores(self) -> int:
        """CPU cores that there really are, in all machines together."""

    @property
    def cores_per_task(self) -> int:
        """The most CPU cores that one task may ask for: a task that asks for more would wait for ever."""

    @property
    def gpus(self) -> int:
        """GPUs, in all machines together."""

    @property
    def memory(self) -> int:
        """Bytes of memory for workers, in all machines together."""

    def map(
        self,
        recipe: Recipe,
        tasks: Sequence[Any],
        *,
        num_actors: int = 1,
        num_cpus: float = 1,
        num_gpus: float = 0,
    ) -> Iterator[Any]:
        """Yield `worker(task)` for each task, as they finish: small picklable results; big ones go to files.

        Raises TaskError (or the worker's InputError) where a task fails.
        """

    def pool(
        self, recipe: Recipe, *, num_actors: int = 1, num_cpus: float = 1, num_gpus: float = 0
    ) -> AbstractContextManager[Pool]:
        """Workers that live until the block ends."""


def call() -> Callable[..., Any]:
    """The recipe for tasks that know themselves what to do: a task is called, and its result is the answer."""
    return _call


def _call(task: Callable[[], Any], *_shared: Any) -> Any:
    return task()


def run_once(runtime: Runtime, job: Callable[[], Any]) -> Any:
    """Run one job on one worker, away from the driver."""
    (result,) = runtime.map(call, [job])
    return result


class LocalRuntime:
    """Everything in this process, one task after another: the truth that tests compare with."""

    def __repr__(self) -> str:
        return "LocalRuntime()"

    @property
    def cores(self) -> int:
        return machine_cores()

    @property
    def cores_per_task(self) -> int:
        return self.cores

    @property
    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()

    @property
    def memory(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def map(
        self,
        recipe: Recipe,
        tasks: Sequence[Any],
        *,
        num_actors: int = 1,
        num_cpus: float = 1,
        num_gpus: float = 0,
    ) -> Iterator[Any]:
        worker = _Worker(recipe)
        for task in tasks:
            yield worker.attempt(task).result()

    @contextmanager
    def pool(
        self, recipe: Recipe, *, num_actors: int = 1, num_cpus: float = 1, num_gpus: float = 0
    ) -> Iterator[Pool]:
        yield _LocalPool(_Worker(recipe))


class RayRuntime:
    """The same two verbs on Ray: Ray Data's actor pool for map, plain actors for folds."""

    def __init__(self, cores: int | None = None) -> None:
        self._cores = cores

    def __repr__(self) -> str:
        return f"RayRuntime(cores={self.cores})"

    @property
    def cores(self) -> int:
        return self._cores or max(1, int(ray.cluster_resources().get("CPU", 1)))

    @property
    def cores_per_task(self) -> int:
        """On a cluster all but one of the largest machine's: a submitted job's driver may hold one itself."""
        if self._cores:
            return self._cores
        machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        return max(1, int(max(machines, default=1)) - 1)

    @property
    def gpus(self) -> int:
        return int(ray.cluster_resources().get("GPU", 0))

    @property
    def memory(self) -> int:
        return int(ray.cluster_resources().get("memory", 0))

    def map(
        self,
        recipe: Recipe,
        tasks: Sequence[Any],
        *,
        num_actors: int = 1,
        num_cpus: float = 1,
        num_gpus: float = 0,
    ) -> Iterator[Any]:
        if not tasks:
            return
        if recipe is call:
            yield from _call_all(tasks, max(1, num_actors), _resources(num_cpus, num_gpus))
            return
        # One row and one block a task: Ray Data then hands out single tasks and gives back single results.
        items = [{"index": index, "task": pickle.dumps(task)} for index, task in enumerate(tasks)]
        starts = ray.remote(_Starts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        results = _data().from_items(items, override_num_blocks=len(items))
        results = results.map_batches(
            _MapWorker,
            fn_constructor_args=(recipe, starts),
            batch_size=1,
            # Shards take long: a task that waited behind another would leave some other worker idle.
            compute=_data().ActorPoolStrategy(
                size=max(1, min(num_actors, len(items))), max_tasks_in_flight_per_actor=1
            ),
            **_resources(num_cpus, num_gpus),
        )
        for row in results.iter_rows():
            outcome: _Outcome = pickle.loads(row["outcome"])
            yield outcome.result()

    @contextmanager
    def pool(
        self, recipe: Recipe, *, num_actors: int = 1, num_cpus: float = 1, num_gpus: float = 0
    ) -> Iterator[Pool]:
        actor = ray.remote(_Worker).options(
            **_resources(num_cpus, num_gpus), max_restarts=-1, max_task_retries=TASK_RETRIES
        )
        actors = [actor.remote(recipe) for _ in range(max(1, num_actors))]
        try:
            yield _RayPool(actors)
        finally:
            for one in actors:
                ray.kill(one)


def _call_all(tasks: Sequence[Any], at_once: int, resources: dict[str, float]) -> Iterator[Any]:
    """Tasks that know themselves what to do need no actor: Ray hands them to processes that are there already.

    Starting a process costs seconds, mostly importing; a run has dozens of such calls.
    """
    attempt = ray.remote(_attempt).options(**resources, max_retries=TASK_RETRIES)
    waiting = deque(tasks)
    running: dict[Any, Any] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            task = waiting.popleft()
            running[attempt.remote(task)] = task
        (reference, *_), _ = ray.wait(list(running), num_returns=1)
        yield _result(reference, running.pop(reference))


@dataclass(frozen=True)
class _Outcome:
    """What a worker sends back; exceptions travel as values: Ray then retries lost workers, never errors."""

    value: Any = None
    error: str = ""
    trace: str = ""

    def result(self) -> Any:
        if self.trace:
            raise TaskError(f"{self.error}\n{self.trace}")
        if self.error:
            raise InputError(self.error)
        return self.value


def _result(reference: Any, task: Any) -> Any:
    """The worker's result; raises what it raised, and TaskError where no worker survived the task."""
    try:
        outcome: _Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise TaskError(f"{_lost(task)} Ray says: {error}") from error
    return outcome.result()


class _Worker:
    """One worker: builds its callable at the first task, and turns exceptions into outcomes."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._call: Callable[..., Any] | None = None

    def start(self) -> None:
        """Answered as soon as there is a process."""

    def attempt(self, task: Any, *shared: Any) -> _Outcome:
        try:
            self._call = self._call or self._recipe()
            return _Outcome(self._call(task, *shared))
        except InputError as error:
            return _Outcome(error=str(error))
        except Exception as error:
            return _Outcome(
                error=f"task {_brief(task)} failed: {type(error).__name__}: {error}",
                trace=traceback.format_exc(),
            )

    def run(self, job: Callable[[], Any]) -> _Outcome:
        return _attempt(job)


def _attempt(task: Any) -> _Outcome:
    return _Worker(call).attempt(task)


class _Starts:
    """How often each task was begun, kept by an actor of its own: Ray Data itself would retry for ever."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, index: int) -> int:
        self._counts[index] += 1
        return self._counts[index]


class _MapWorker:
    """A worker as Ray Data calls it: one row in, one row out."""

    def __init__(self, recipe: Recipe, starts: Any) -> None:
        self._worker = _Worker(recipe)
        self._starts = starts

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        task = pickle.loads(batch["task"][0])
        if ray.get(self._starts.begin.remote(int(batch["index"][0]))) > TASK_RETRIES + 1:
            outcome = _Outcome(error=_lost(task), trace="(no traceback: the process was gone)")
        else:
            outcome = self._worker.attempt(task)
        return {"outcome": [pickle.dumps(outcome)]}


@dataclass(frozen=True)
class _LocalPool:
    worker: _Worker

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None) -> Any:
        states = (self.worker.attempt(task, shared).result() for task in tasks)
        return _merge_all(states, merge)

    def run(self, job: Callable[[], Any]) -> Any:
        return _attempt(job).result()


class _RayPool:
    """Actors are given work as they start: on a busy cluster some may never find a place."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._starting = {actor.start.remote(): actor for actor in actors}
        self._idle: deque[Any] = deque()

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None) -> Any:
        return _merge_all(self._states(tasks, ray.put(shared)), merge)

    def _states(self, tasks: Sequence[Any], shared: Any) -> Iterator[Any]:
        """The states in the order of the tasks; an actor gets its next task as soon as it has done one."""
        waiting = deque(range(len(tasks)))
        running: dict[Any, tuple[int, Any]] = {}
        finished: dict[int, Any] = {}
        try:
            for turn in range(len(tasks)):
                while turn not in finished:
                    most = turn + AHEAD * (len(self._idle) + len(running))
                    while self._idle and waiting and waiting[0] < most:
                        index, actor = waiting.popleft(), self._idle.popleft()
                        running[actor.attempt.remote(tasks[index], shared)] = index, actor
                    (reference, *_), _ = ray.wait([*running, *self._starting], num_returns=1)
                    if reference in self._starting:
                        self._idle.append(self._starting.pop(reference))
                        continue
                    index, actor = running.pop(reference)
                    finished[index] = reference
                    self._idle.append(actor)
                yield _result(finished.pop(turn), tasks[turn])
        finally:
            self._idle.extend(actor for _, actor in running.values())

    def run(self, job: Callable[[], Any]) -> Any:
        while not self._idle:
            (reference, *_), _ = ray.wait(list(self._starting), num_returns=1)
            self._idle.append(self._starting.pop(reference))
        return _result(self._idle[0].run.remote(job), job)


def _merge_all(states: Iterator[Any], merge: Merge) -> Any:
    first = next(states, _NOTHING)
    if first is _NOTHING:
        raise ValueError("a fold needs at least one task")
    total = first
    for state in states:
        total = merge(total, state)
    return total


_NOTHING = object()


def _lost(task: Any) -> str:
    return (
        f"task {_brief(task)} lost its worker {TASK_RETRIES + 1} times. Likely causes: it ran out of memory, "
        "a crash in native code on this input, or its node is gone."
    )


def _brief(task: Any) -> str:
    task = task.args[0] if isinstance(task, partial) and task.args else task
    text = str(getattr(task, "name", task))
    return text if len(text) <= 200 else text[:200] + "..."


def _resources(num_cpus: float, num_gpus: float) -> dict[str, float]:
    return {"num_cpus": num_cpus} | ({"num_gpus": num_gpus} if num_gpus else {})


def _data() -> Any:
    """Ray Data without its own progress and reports: the stages show theirs."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    # Here, because the import sets the level anew.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data


def machine_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
