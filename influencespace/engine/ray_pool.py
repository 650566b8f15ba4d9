"""Folds on Ray: actors that live as long as the pool, and states that stay where they were made."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from influencespace.engine.attempts import MACHINE_LOSSES, Losses, TaskError, WorkerFactory, lost_worker
from influencespace.engine.cluster import is_alive
from influencespace.engine.local import AHEAD, Done, Merge, MergeTree, nothing
from influencespace.engine.place import TICK_SECONDS, Place
from influencespace.engine.ray_map import Crew


@dataclass(frozen=True)
class _Job:
    """A task of a fold, or two states that are merged: its place in the tree, and the two states."""

    height: int
    index: int
    pair: tuple[Any, Any] | None = None

    @property
    def task(self) -> int:
        """The first of its tasks."""
        return self.index << self.height


class _Again(Exception):
    """The fold has to begin anew: states were lost with a machine, or no machine has what the actors need."""


class RayPool:
    """Actors are given work as they start: on a busy cluster some may never find a place. More start as machines come."""

    def __init__(self, factory: WorkerFactory, place: Place) -> None:
        self._place, self._crew = place, Crew(factory, place)
        self._crew.fill(place.room)

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None, *, done: Done = nothing) -> Any:
        """States stay where they were made or merged: only the last one comes here."""
        ended: set[int] = set()

        def once(index: int) -> None:
            if index not in ended:
                ended.add(index)
                done(tasks[index])

        shared, merge, losses = ray.put(shared), ray.put(merge), Losses()
        for _ in range(MACHINE_LOSSES):
            try:
                return self._fold(tasks, (merge, shared), losses, once)
            except _Again:
                self._crew.renew(set())
        raise TaskError(f"a fold lost states with their machines {MACHINE_LOSSES} times")

    def _fold(
        self, tasks: Sequence[Any], given: tuple[Any, Any], losses: Losses, once: Callable[[int], None]
    ) -> Any:
        tree, (merge, shared) = MergeTree(len(tasks)), given
        waiting = deque(_Job(0, index) for index in range(len(tasks)))
        merges: deque[_Job] = deque()
        running: dict[Any, tuple[_Job, str, Any]] = {}
        try:
            while waiting or merges or running:
                most = min((job.index for job, *_ in running.values() if not job.height), default=len(tasks))
                most += AHEAD * (len(self._crew.idle) + len(running))
                while self._crew.idle and (merges or (waiting and waiting[0].index < most)):
                    name, job = self._crew.idle.popleft(), (merges or waiting).popleft()
                    actor = self._crew.actors[name]
                    if job.pair:
                        reference, state = actor.merge.options(num_returns=2).remote(merge, *job.pair)
                    else:
                        reference, state = actor.fold.options(num_returns=2).remote(tasks[job.index], shared)
                    running[reference] = job, name, state
                for reference in self._next(running):
                    job, name, state = running.pop(reference)
                    if not self._ended(reference, name, losses, job.task, tasks):
                        (merges if job.pair else waiting).appendleft(job)
                        continue
                    if not job.height:
                        once(job.index)
                    if merged := tree.add(job.height, job.index, state):
                        merges.append(_Job(merged[0], merged[1], merged[2:]))
        finally:
            self._crew.idle.extend(name for _, name, _ in running.values())
        try:
            return ray.get(tree.root)
        except ray.exceptions.RayError:
            raise _Again from None

    def _ended(self, reference: Any, name: str, losses: Losses, index: int, tasks: Sequence[Any]) -> bool:
        """Whether a job has ended well, so that its actor is idle; else, with its actor lost, it is to be done again.

        Raises what the job raised, TaskError where it has lost too many workers, and _Again where its states are gone.
        """
        try:
            result = ray.get(reference)
        except ray.exceptions.ObjectLostError:
            raise _Again from None
        except ray.exceptions.RayError as error:
            node = self._crew.nodes[name]
            self._crew.drop(name)
            if losses.count(index, machine_gone=not is_alive(node)):
                lost_worker(tasks[index], f" Ray says: {error}").result()
            return False
        self._crew.idle.append(name)
        result.result()
        return True

    def _next(self, running: dict[Any, Any]) -> list[Any]:
        """A job that has ended, where one has; meanwhile actors start."""
        ready, _ = ray.wait([*running, *self._crew.starting], num_returns=1, timeout=TICK_SECONDS)
        if self._place.due and self._place.look(lambda: bool(running)):
            raise _Again
        self._crew.fill(self._place.room)
        for one in ready:
            if one in self._crew.starting:
                self._crew.started(one)
                continue
            self._place.at_work()
            return [one]
        return []

    def run(self, job: Callable[[], Any]) -> Any:
        """One job on one of the actors."""
        losses = Losses()
        while True:
            try:
                while not self._crew.idle:
                    self._next({})
                name = self._crew.idle.popleft()
                reference = self._crew.actors[name].run.remote(job)
                while not ray.wait([reference], timeout=TICK_SECONDS)[0]:
                    if self._place.due and self._place.look(lambda: True):
                        raise _Again
                if self._ended(reference, name, losses, 0, [job]):
                    return ray.get(reference).value
            except _Again:
                self._crew.renew(set())

    def end(self) -> None:
        """The end of all actors."""
        self._crew.dismiss()
