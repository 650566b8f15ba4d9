"""Passes over thin columns of a pool, range by range, on workers: what `core/histogram.py` asks for, and what a stage counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

from influencespace.core.histogram import Passes, Statistic, carried_out
from influencespace.data.buckets import buckets_of
from influencespace.engine.local import Pool
from influencespace.run import Workers

RANGE = 131_072
"""Rows of a range: some columns of so many are in memory at once. Always the same, so that sums have the same last digits."""

Read = Callable[[int, int], Any]
"""Gives what a statistic observes of the rows [start, stop)."""


@dataclass(frozen=True)
class Observation:
    """Job: what a statistic observes of a range."""

    read: Read
    statistic: Statistic

    def __call__(self, start: int, stop: int) -> Any:
        return self.statistic.observe(self.read(start, stop))


def range_worker() -> Callable[[tuple[int, int], Observation], Any]:
    """The factory of workers that are sent what to observe."""
    return lambda span, observation: observation(*span)


@dataclass(frozen=True)
class RangePasses:
    """Workers for any number of passes over pools."""

    pool: Pool

    def fold(self, statistic: Statistic, read: Read, rows: int) -> Any:
        """The merged state of all ranges of some rows."""
        spans = list(buckets_of(rows, RANGE))
        return self.pool.fold(spans, statistic.merge, Observation(read, statistic))

    def result(self, passes: Passes, read: Read, rows: int) -> Any:
        """What passes return that go over some rows."""
        return carried_out(passes, lambda statistic: self.fold(statistic, read, rows))


def looped(read: Read, rows: int) -> Callable[[Statistic], Any]:
    """Makes a pass over some rows in this process."""

    def run(statistic: Statistic) -> Any:
        return reduce(statistic.merge, (statistic.observe(read(*span)) for span in buckets_of(rows, RANGE)))

    return run


@contextmanager
def range_passes(workers: Workers, rows: int) -> Iterator[RangePasses]:
    """Workers until the block ends, no more than there are ranges."""
    with workers.pool(range_worker, -(-rows // RANGE)) as pool:
        yield RangePasses(pool)
