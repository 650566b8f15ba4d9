"""The only verbs of the stages: *map* tasks over workers, *fold* tasks into one state, *stream* from readers to workers.

A factory crosses the wire and the worker is born where it works: `factory()` returns the callable that is then
given one task after another. Folded states are merged on the workers by a binary tree whose shape depends on the number of
tasks alone, so that any number of actors gives the same bits. `LocalEngine` is the plain loop: the truth.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from influencespace.engine.attempts import TaskError, Worker, WorkerFactory, attempt, run_task
from influencespace.engine.placement import WORKER_BYTES, Machine, Resources

__all__ = ["TaskError", "WorkerFactory", "run_task"]  # what goes with the verbs

Merge = Callable[[Any, Any], Any]
Done = Callable[[Any], object]
AtOnce = int | tuple[int, int]
"""So many workers, or at least and at most so many: the engine then takes what there is room for."""

# How far a worker may run ahead of the slowest task: bounds the states that wait to be merged.
AHEAD = 4
ONE_CORE = Resources()
THIN = Resources(memory=WORKER_BYTES)
"""Of a task on some thin columns."""


def nothing(_: Any) -> None:
    """What to do where nothing is to be done."""


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
        set_aside: bool = False,
    ) -> Iterator[Any]:
        """Yield `worker(task)` for each task, as they finish: small picklable results; big ones go to files.

        With `workers` = 0 there are as many at once as there is room for, also on machines that come later. I/O errors are tried
        again. Raises TaskError (or the worker's InputError) where a task fails, and InputError where no
        machine has the resources. With `set_aside`, a task that raises or that no worker survives gives `Failed` instead.
        """

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
        """Yield `consumer(item)` for each item of `producer(task)`, of each task: one pass, as they finish.

        `produce()` returns a callable that turns a task into an iterator of picklable items (they may be large: few are under
        way at once), the same ones each time; it works with the resources of `readers` wherever there is room. `consume()`
        returns a callable, born once in each of `workers` workers (so many, or from so many to so many), that turns an item
        into a small result. An item may be consumed again after its worker or machine is lost. Failures are as in `map`;
        results of a task that fails later may have come before.
        """

    def pool(
        self, factory: WorkerFactory, *, workers: int = 1, resources: Resources = ONE_CORE
    ) -> AbstractContextManager[Pool]:
        """Workers that live until the block ends; with `workers` = 0 as many as there is room for, now and later."""

    def keep_logs(self, folder: Path) -> None:
        """Copy what the workers of this run wrote (their output and their errors) into a folder, where they wrote anything."""


def run_once(engine: Engine, job: Callable[[], Any], resources: Resources = THIN) -> Any:
    """Run one job on one worker, away from the driver."""
    (result,) = engine.map(run_task, [job], resources=resources)
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
        set_aside: bool = False,
    ) -> Iterator[Any]:
        worker = Worker(factory)
        for task in tasks:
            yield worker.attempt(task).or_failed(task, set_aside)

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
        reader, worker = Worker(produce), Worker(consume)
        for task in tasks:
            for item in reader.produce(task):
                result = item if item.error else worker.attempt(item.value)
                yield result.or_failed(task, set_aside)

    @contextmanager
    def pool(
        self, factory: WorkerFactory, *, workers: int = 1, resources: Resources = ONE_CORE
    ) -> Iterator[Pool]:
        yield _LocalPool(Worker(factory))

    def keep_logs(self, folder: Path) -> None:
        return


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


def machine_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
