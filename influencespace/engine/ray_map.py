"""Map on Ray: tasks that know themselves what to do go to any process, others to actors that are born once."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from influencespace.engine.attempts import (
    TASK_RETRIES,
    Losses,
    TaskError,
    TaskResult,
    Worker,
    WorkerFactory,
    attempt,
    lost_worker,
)
from influencespace.engine.cluster import is_alive, ray_options
from influencespace.engine.place import TICK_SECONDS, Place

Results = Iterator[tuple[int, TaskResult]]
"""The index of each task with its result, as they come."""


class Actor(Worker):
    """A worker in a process of its own."""

    def start(self) -> str:
        """The machine it is on, as soon as it is there."""
        return _node()


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _attempted(task: Any) -> Iterator[Any]:
    """Where a task has begun, and its result."""
    yield _node()
    yield attempt(task)


@dataclass
class _Begun:
    index: int
    node: str = ""


class _Map:
    """What tasks are waiting, and how often each has lost its worker."""

    def __init__(self, tasks: Sequence[Any], place: Place) -> None:
        self.tasks, self.place = tasks, place
        self.waiting = deque(range(len(tasks)))
        self._losses = Losses()

    def lost(self, index: int, node: str, error: Exception) -> TaskResult | None:
        """The failure of a task that has lost too many workers; else it waits again."""
        if self._losses.count(index, machine_gone=bool(node) and not is_alive(node)):
            return lost_worker(self.tasks[index], f" Ray says: {error}")
        self.waiting.appendleft(index)
        return None


def call_all(tasks: Sequence[Any], place: Place) -> Results:
    """The results of tasks that know themselves what to do; Ray hands them to processes that are there already.

    Starting a process costs seconds, mostly importing; a run has dozens of such calls.
    """
    work, running = _Map(tasks, place), dict[Any, _Begun]()
    while work.waiting or running:
        while work.waiting and len(running) < place.room:
            index = work.waiting.popleft()
            worker = ray.remote(_attempted).options(
                **ray_options(place.need), num_returns="streaming", max_retries=0
            )
            running[worker.remote(tasks[index])] = _Begun(index)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=TICK_SECONDS)
        if place.due and place.look(partial(_any_begun, running)):
            for unplaced in [one for one, job in running.items() if not job.node]:
                ray.cancel(unplaced)
                work.waiting.appendleft(running.pop(unplaced).index)
            continue
        for one in ready:
            job = running[one]
            try:
                answer = ray.get(next(one))
            except ray.exceptions.RayError as error:
                failed = work.lost(running.pop(one).index, job.node, error)
                if failed:
                    yield job.index, failed
                continue
            place.at_work()
            if not job.node:
                job.node = answer
            else:
                yield running.pop(one).index, answer


def _any_begun(running: dict[Any, _Begun]) -> bool:
    return any(job.node for job in running.values())


def on_actors(factory: WorkerFactory, tasks: Sequence[Any], place: Place) -> Results:
    """The results of tasks by actors that each build their callable once; more of them as machines come."""
    crew = Crew(factory, place)
    work, running = _Map(tasks, place), dict[Any, tuple[int, str]]()
    try:
        while work.waiting or running:
            crew.fill(min(place.room, len(work.waiting) + len(running)))
            while work.waiting and crew.idle:
                index, name = work.waiting.popleft(), crew.idle.popleft()
                running[crew.actors[name].attempt.remote(tasks[index])] = index, name
            ready, _ = ray.wait([*running, *crew.starting], num_returns=1, timeout=TICK_SECONDS)
            if place.due and place.look(lambda: bool(running)):
                crew.renew({name for _, name in running.values()})
                continue
            for one in ready:
                if one in crew.starting:
                    crew.started(one)
                    continue
                index, name = running.pop(one)
                try:
                    result = ray.get(one)
                except ray.exceptions.RayError as error:
                    node = crew.nodes[name]
                    crew.drop(name)
                    result = work.lost(index, node, error)
                else:
                    crew.idle.append(name)
                place.at_work()
                if result:
                    yield index, result
    finally:
        crew.dismiss()


class Crew:
    """Actors by name: those that start, those that wait for work; one that dies is dropped, and another is started."""

    def __init__(self, factory: WorkerFactory, place: Place) -> None:
        """Of workers that `factory` makes, where the place has room."""
        self._factory, self._place = factory, place
        self.actors: dict[str, Any] = {}
        self.nodes: dict[str, str] = {}
        self.starting: dict[Any, str] = {}
        self.idle: deque[str] = deque()
        self._born = 0
        self._stillborn = 0

    def fill(self, count: int) -> None:
        """Start actors until there are so many."""
        while len(self.actors) < count:
            name = str(self._born)
            self._born += 1
            options = ray_options(self._place.need)
            actor = ray.remote(Actor).options(**options, max_restarts=0).remote(self._factory)
            self.actors[name] = actor
            self.starting[actor.start.remote()] = name

    def started(self, reference: Any) -> None:
        """One is there, or died before it was; raises TaskError where all of them die."""
        name = self.starting.pop(reference)
        try:
            self.nodes[name] = ray.get(reference)
        except ray.exceptions.RayError as error:
            self.drop(name)
            self._stillborn += 1
            if self._stillborn > 10 * (TASK_RETRIES + 1):
                raise TaskError(f"workers die as soon as they start. Ray says: {error}") from error
            return
        self._stillborn = 0
        self._place.at_work()
        self.idle.append(name)

    def drop(self, name: str) -> None:
        """Forget one."""
        ray.kill(self.actors.pop(name))

    def renew(self, kept: set[str]) -> None:
        """Let all go but those that work: others are started by the new need."""
        for name in set(self.actors) - kept:
            self.drop(name)
        self.starting, self.idle = {}, deque()

    def dismiss(self) -> None:
        """The end of all of them."""
        for name in list(self.actors):
            self.drop(name)
