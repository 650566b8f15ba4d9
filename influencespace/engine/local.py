"""The only two verbs of the stages: *map* tasks over workers, and *fold* tasks into one state.

A factory crosses the wire and the worker is born where it works: `factory()` returns the callable that is then
given one task after another. Folded states are merged on the workers by a binary tree whose shape depends on the number of
tasks alone, so that any number of actors gives the same bits. `LocalEngine` is the plain loop: the truth.
"""

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from influencespace.engine.placement import Machine, Resources
from influencespace.errors import InputError

WorkerFactory = Callable[[], Callable[..., Any]]
Merge = Callable[[Any, Any], Any]
Done = Callable[[Any], object]

# How far a worker may run ahead of the slowest task: bounds the states that wait to be merged.
AHEAD = 4
ONE_CORE = Resources()


def nothing(_: Any) -> None:
    """What to do where nothing is to be done."""


class TaskError(RuntimeError):
    """A task raised an unexpected exception: names the task and carries the worker's traceback."""


class Pool(Protocol):
    """Persistent workers for repeated folds."""

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None, *, done: Done = nothing) -> Any:
        """Merge `worker(task, shared)` over `tasks` by a binary tree: neighbours first, the earlier one on the left.

        Workers merge too, so that the caller holds one state only; it calls `done` with each task that has ended.

        Raises ValueError without tasks, TaskError (or the worker's InputError) where a task fails.
        """

    def run(self, job: Callable[[], Any]) -> Any:
        """One job on one of the workers. While a pool lives it may hold every core: a map would wait for ever."""


class Engine(Protocol):
    """Where the work of the stages is done."""

    @property
    def cores(self) -> int:
        """CPU cores that there really are, in all machines together."""

    @property
    def cores_per_task(self) -> int:
        """The most CPU cores that one task may ask for: a task that asks for more would wait for ever."""

    @property
    def machines(self) -> Sequence[Machine]:
        """What each machine has for workers."""

    def map(
        self,
        factory: WorkerFactory,
        tasks: Sequence[Any],
        *,
        workers: int = 1,
        resources: Resources = ONE_CORE,
    ) -> Iterator[Any]:
        """Yield `worker(task)` for each task, as they finish: small picklable results; big ones go to files.

        Raises TaskError (or the worker's InputError) where a task fails, and InputError where no machine has the resources.
        """

    def stream(self, produce: Any, tasks: Any, consume: Any, **more: Any) -> Iterator[Any]:
        """Placeholder."""

    def pool(
        self, factory: WorkerFactory, *, workers: int = 1, resources: Resources = ONE_CORE
    ) -> AbstractContextManager[Pool]:
        """Workers that live until the block ends."""


def run_task() -> Callable[..., Any]:
    """The factory for tasks that know themselves what to do: a task is called, and its result is the answer."""
    return _call


def _call(task: Callable[[], Any], *_shared: Any) -> Any:
    return task()


def run_once(engine: Engine, job: Callable[[], Any]) -> Any:
    """Run one job on one worker, away from the driver."""
    (result,) = engine.map(run_task, [job])
    return result


class LocalEngine:
    """Everything in this process, one task after another: the truth that tests compare with."""

    def __repr__(self) -> str:
        return "LocalEngine()"

    @property
    def cores(self) -> int:
        return machine_cores()

    @property
    def cores_per_task(self) -> int:
        return self.cores

    @property
    def machines(self) -> Sequence[Machine]:
        import torch

        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [Machine(cpus=self.cores, gpus=torch.cuda.device_count(), memory=memory)]

    def map(
        self,
        factory: WorkerFactory,
        tasks: Sequence[Any],
        *,
        workers: int = 1,
        resources: Resources = ONE_CORE,
    ) -> Iterator[Any]:
        worker = Worker(factory)
        for task in tasks:
            yield worker.attempt(task).result()

    def stream(self, produce: Any, tasks: Any, consume: Any, **more: Any) -> Iterator[Any]:
        reader, encode = produce(), consume()
        for task in tasks:
            for item in reader(task):
                yield encode(item)

    @contextmanager
    def pool(
        self, factory: WorkerFactory, *, workers: int = 1, resources: Resources = ONE_CORE
    ) -> Iterator[Pool]:
        yield _LocalPool(Worker(factory))


@dataclass(frozen=True)
class TaskResult:
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


class Worker:
    """One worker: builds its callable at the first task, and turns exceptions into outcomes."""

    def __init__(self, factory: WorkerFactory) -> None:
        self._factory = factory
        self._call: Callable[..., Any] | None = None

    def start(self) -> None:
        """Answered as soon as there is a process."""

    def attempt(self, task: Any, *shared: Any) -> TaskResult:
        try:
            self._call = self._call or self._factory()
            return TaskResult(self._call(task, *shared))
        except InputError as error:
            return TaskResult(error=str(error))
        except Exception as error:
            return TaskResult(
                error=f"task {brief(task)} failed: {type(error).__name__}: {error}",
                trace=traceback.format_exc(),
            )

    def fold(self, task: Any, shared: Any) -> tuple[TaskResult, Any]:
        """Whether the task ended well, and its state: apart, so that the state may stay where it is."""
        return _apart(self.attempt(task, shared))

    def merge(self, merge: Merge, left: Any, right: Any) -> tuple[TaskResult, Any]:
        """As `fold`: two states, merged."""
        return _apart(attempt(partial(merge, left, right)))

    def run(self, job: Callable[[], Any]) -> TaskResult:
        return attempt(job)


def _apart(result: TaskResult) -> tuple[TaskResult, Any]:
    return replace(result, value=None), result.value


def attempt(task: Any) -> TaskResult:
    """The outcome of a task that knows itself what to do."""
    return Worker(run_task).attempt(task)


@dataclass(frozen=True)
class _LocalPool:
    worker: Worker

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None, *, done: Done = nothing) -> Any:
        def states() -> Iterator[Any]:
            for task in tasks:
                state = self.worker.attempt(task, shared).result()
                done(task)
                yield state

        return merge_all(states(), partial(_merged, merge))

    def run(self, job: Callable[[], Any]) -> Any:
        return attempt(job).result()


def _merged(merge: Merge, left: Any, right: Any) -> Any:
    return attempt(partial(merge, left, right)).result()


def merge_all(states: Iterator[Any], merge: Merge) -> Any:
    """One state of all, merged by a binary tree; raises ValueError where there is none.

    At most one state of each height waits. `MergeTree` is the same tree for states that come in any order.
    """
    waiting: list[tuple[int, Any]] = []
    for state in states:
        height = 0
        while waiting and waiting[-1][0] == height:
            state, height = merge(waiting.pop()[1], state), height + 1
        waiting.append((height, state))
    if not waiting:
        raise ValueError("a fold needs at least one task")
    _, total = waiting.pop()
    while waiting:
        total = merge(waiting.pop()[1], total)
    return total


class MergeTree:
    """Which states of a fold are to be merged next, as they come: node i of height h covers the tasks from i * 2**h on."""

    def __init__(self, tasks: int) -> None:
        if not tasks:
            raise ValueError("a fold needs at least one task")
        self._width = [tasks]
        while self._width[-1] > 1:
            self._width.append((self._width[-1] + 1) // 2)
        self._waiting: dict[tuple[int, int], Any] = {}
        self.root: Any = None

    def add(self, height: int, index: int, state: Any) -> tuple[int, int, Any, Any] | None:
        """Take a state; where its neighbour is there: height and index of the two merged, and both, the earlier one first."""
        while index % 2 == 0 and index + 1 == self._width[height] > 1:  # without a neighbour
            height, index = height + 1, index // 2
        if height == len(self._width) - 1:
            self.root = state
            return None
        neighbour = height, index ^ 1
        if neighbour not in self._waiting:
            self._waiting[height, index] = state
            return None
        other = self._waiting.pop(neighbour)
        left, right = (other, state) if index % 2 else (state, other)
        return height + 1, index // 2, left, right


def brief(task: Any) -> str:
    """What an error calls a task: its name, or its text, shortened."""
    task = task.args[0] if isinstance(task, partial) and task.args else task
    text = str(getattr(task, "name", task))
    return text if len(text) <= 200 else text[:200] + "..."


def machine_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
