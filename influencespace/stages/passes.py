"""Passes over thin columns of a pool, range by range, on workers: what `core/histogram.py` asks for, and what a stage counts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from influencespace.core.histogram import Passes, Statistic, carried_out
from influencespace.data.buckets import buckets_of
from influencespace.engine.local import THIN, MergeTree, run_task
from influencespace.run import Workers

RANGE = 131_072
"""Rows of a range: some columns of so many are in memory at once. Always the same, so that sums have the same last digits."""

Read = Callable[[int, int], Any]
"""Gives what a statistic observes of the rows [start, stop)."""


@dataclass(frozen=True)
class Observe:
    """Task: what a statistic observes of the rows [start, stop), with its number among the ranges."""

    number: int
    start: int
    stop: int
    read: Read
    statistic: Statistic

    @property
    def name(self) -> str:
        return f"{type(self.statistic).__name__} of rows {self.start} to {self.stop}"

    def __call__(self) -> tuple[int, Any]:
        return self.number, self.statistic.observe(self.read(self.start, self.stop))


@dataclass(frozen=True)
class RangePasses:
    """Any number of passes over pools. Each is tasks: actors would take longer to start than most passes to end."""

    workers: Workers

    def fold(self, statistic: Statistic, read: Read, rows: int) -> Any:
        """The merged state of all ranges of some rows, by a tree whose shape depends on the rows alone.

        Raises ValueError without rows, TaskError (or the task's InputError) where a range cannot be read.
        """
        tasks = [Observe(i, *span, read, statistic) for i, span in enumerate(buckets_of(rows, RANGE))]
        tree = MergeTree(len(tasks))
        for number, state in self.workers.engine.map(run_task, tasks, workers=0, resources=THIN):
            pair = tree.add(0, number, state)
            while pair:
                height, index, left, right = pair
                pair = tree.add(height, index, statistic.merge(left, right))
        return tree.root

    def result(self, passes: Passes, read: Read, rows: int) -> Any:
        """What passes return that go over some rows."""
        return carried_out(passes, lambda statistic: self.fold(statistic, read, rows))


def looped(read: Read, rows: int) -> Callable[[Statistic], Any]:
    """Makes a pass over some rows in this process."""

    def run(statistic: Statistic) -> Any:
        return reduce(statistic.merge, (statistic.observe(read(*span)) for span in buckets_of(rows, RANGE)))

    return run
