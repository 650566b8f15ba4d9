"""Folds on Ray: actors that live as long as the pool, and states that stay where they were made."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from influencespace.engine.attempts import TASK_RETRIES, TaskResult, WorkerFactory, lost_worker
from influencespace.engine.cluster import ray_options
from influencespace.engine.local import AHEAD, Done, Merge, MergeTree, nothing
from influencespace.engine.place import TICK_SECONDS, Place
from influencespace.engine.ray_map import Actor


@dataclass(frozen=True)
class _Running:
    """A task of a fold, or two states that are merged: its place in the tree, where its state will be, and who works on it."""

    height: int
    index: int
    state: Any
    actor: Any


class _Again(Exception):
    """The fold has to begin anew: states were lost with a machine."""


class RayPool:
    """Actors are given work as they start: on a busy cluster some may never find a place. More start as machines come."""

    def __init__(self, factory: WorkerFactory, place: Place) -> None:
        self._factory, self._place = factory, place
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._idle: deque[Any] = deque()
        self._grow()

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None, *, done: Done = nothing) -> Any:
        """States stay where they were made or merged: only the last one comes here."""
        ended: set[int] = set()

        def once(index: int) -> None:
            if index not in ended:
                ended.add(index)
                done(tasks[index])

        shared, merge = ray.put(shared), ray.put(merge)
        for _ in range(TASK_RETRIES):
            try:
                return self._fold(tasks, merge, shared, once)
            except _Again:
                self._renew()
        return self._fold(tasks, merge, shared, once)

    def _fold(self, tasks: Sequence[Any], merge: Any, shared: Any, once: Callable[[int], None]) -> Any:
        tree = MergeTree(len(tasks))
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
                reference = self._next(running)
                if reference is None:
                    continue
                job = running.pop(reference)
                self._idle.append(job.actor)
                result_of(reference, tasks[job.index << job.height]).result()
                if not job.height:
                    once(job.index)
                if pair := tree.add(job.height, job.index, job.state):
                    merges.append(pair)
        finally:
            self._idle.extend(job.actor for job in running.values())
        try:
            return ray.get(tree.root)
        except ray.exceptions.ObjectLostError:
            raise _Again from None

    def _next(self, running: dict[Any, _Running]) -> Any:
        """A job that has ended, or None; meanwhile actors start."""
        ready, _ = ray.wait([*running, *self._starting], num_returns=1, timeout=TICK_SECONDS)
        if self._place.due:
            if self._place.look(lambda: any(is_there(job.actor) for job in running.values())):
                raise _Again
            self._grow()
        for one in ready:
            self._place.at_work()
            if one not in self._starting:
                return one
            self._idle.append(self._starting.pop(one))
        return None

    def run(self, job: Callable[[], Any]) -> Any:
        """One job on one of the actors."""
        while True:
            try:
                while not self._idle:
                    self._next({})
                return result_of(self._idle[0].run.remote(job), job).result()
            except _Again:
                self._renew()

    def _grow(self) -> None:
        kind = ray.remote(Actor).options(
            **ray_options(self._place.need), max_restarts=-1, max_task_retries=TASK_RETRIES
        )
        while len(self._actors) < self._place.room:
            self._actors.append(kind.remote(self._factory))
            self._starting[self._actors[-1].start.remote()] = self._actors[-1]

    def _renew(self) -> None:
        """Other actors, by what the place now gives."""
        self.end()
        self._starting, self._idle = {}, deque()
        self._grow()

    def end(self) -> None:
        """The end of all actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def is_there(actor: Any) -> bool:
    """Whether an actor has a process just now."""
    from ray._private.state import actors

    return bool(actors(actor._actor_id.hex()).get("State") == "ALIVE")


def result_of(reference: Any, task: Any) -> TaskResult:
    """The worker's result; a failure where no worker survived the task."""
    try:
        result: TaskResult = ray.get(reference)
    except ray.exceptions.ObjectLostError:
        raise _Again from None
    except ray.exceptions.RayError as error:
        return lost_worker(task, f" Ray says: {error}")
    return result
