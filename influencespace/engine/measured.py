"""The memory and the time of workers, measured in their own processes, whatever machine they are on."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from influencespace.engine.attempts import Failed
from influencespace.engine.local import ONE_CORE, Done, Engine, Merge, Pool, WorkerFactory, nothing, run_task
from influencespace.engine.placement import Resources, places


@dataclass(frozen=True)
class Work:
    """What some work took."""

    peak: int = 0
    """Most memory of one worker, in bytes."""
    working: float = 0.0
    """Seconds of all workers together."""
    reading: float = 0.0
    """Of them, those of readers that feed others."""
    reader_peak: int = 0
    """Most memory of one reader, in bytes."""
    filled: float = 0.0
    """Seconds for which all places for workers would have been at work."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            max(self.peak, other.peak),
            self.working + other.working,
            self.reading + other.reading,
            max(self.reader_peak, other.reader_peak),
            self.filled + other.filled,
        )


class Usage:
    """What all work of an engine takes, added up."""

    def __init__(self, engine: Engine) -> None:
        self._work = Work()
        self.engine = measured(engine, self._add)
        """To work with."""

    def _add(self, work: Work) -> None:
        self._work += work

    def within(self, seconds: float) -> dict[str, float]:
        """`busy`: the share of all places for workers that was at work in so many seconds; `peak_memory` and
        `reader_peak_memory`: most bytes of one worker, and of one reader that feeds others. Nothing where nothing was done."""
        if not self._work.working:
            return {}
        peaks = {"peak_memory": self._work.peak, "reader_peak_memory": self._work.reader_peak}
        busy = round(min(1.0, self._work.filled / max(seconds, 1e-9)), 4)
        return {"busy": busy} | {name: peak for name, peak in peaks.items() if peak}


Record = Callable[[Work], None]


def measured(engine: Engine, record: Record) -> Engine:
    """A copy of `engine`; `record` is called with what a task or a fold took."""
    copied = copy(engine)
    verbs: dict[str, Any] = {"map": _map, "stream": _stream, "pool": _pool}
    vars(copied).update({name: partial(verb, engine, record) for name, verb in verbs.items()})
    return copied


def _counted(engine: Engine, record: Record, resources: Resources = ONE_CORE, **_: Any) -> Record:
    """A record of workers of a need that also says how far they filled the engine's places."""
    room = max(1, places(engine.machines, resources))

    def counted(work: Work) -> None:
        # beside GPUs readers have cores of their own
        seconds = work.working - work.reading if resources.gpus else work.working
        record(replace(work, filled=seconds / room))

    return counted


def _map(
    engine: Engine, record: Record, factory: WorkerFactory, tasks: Sequence[Any], **options: Any
) -> Iterator[Any]:
    if factory is run_task:  # an engine may have processes for these
        tasks = [partial(_measure, task) for task in tasks]
    else:
        factory = partial(_worker, factory)
    yield from _recorded(_counted(engine, record, **options), engine.map(factory, tasks, **options))


def _stream(
    engine: Engine,
    record: Record,
    produce: WorkerFactory,
    tasks: Sequence[Any],
    consume: WorkerFactory,
    **options: Any,
) -> Iterator[Any]:
    streamed = engine.stream(partial(_reader, produce), tasks, partial(_consumer, consume), **options)
    yield from _recorded(_counted(engine, record, **options), streamed)


def _reader(factory: WorkerFactory) -> Callable[[Any], Iterator[Any]]:
    produce, end = factory(), object()

    def timed(task: Any) -> Iterator[tuple[Any, Work]]:
        items = iter(produce(task))
        while True:
            item, work = _measure(next, items, end)
            if item is end:
                return
            yield item, Work(working=work.working, reading=work.working, reader_peak=work.peak)

    return timed


def _consumer(factory: WorkerFactory) -> Callable[[Any], Any]:
    consume = factory()

    def timed(item: tuple[Any, Work]) -> tuple[Any, Work]:
        result, work = _measure(consume, item[0])
        return result, work + item[1]

    return timed


def _recorded(record: Record, results: Iterator[Any]) -> Iterator[Any]:
    for one in results:
        if isinstance(one, Failed):  # set aside
            yield one
            continue
        result, work = one
        record(work)
        yield result


@contextmanager
def _pool(engine: Engine, record: Record, factory: WorkerFactory, **options: Any) -> Iterator[Pool]:
    with engine.pool(partial(_worker, factory), **options) as pool:
        yield _MeasuredPool(pool, _counted(engine, record, **options))


@dataclass(frozen=True)
class _MeasuredPool:
    pool: Pool
    record: Record

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None, *, done: Done = nothing) -> Any:
        def merged(one: Any, other: Any) -> Any:
            return merge(one[0], other[0]), one[1] + other[1]

        result, work = self.pool.fold(tasks, merged, shared, done=done)
        self.record(work)
        return result

    def run(self, job: Callable[[], Any]) -> Any:
        result, work = self.pool.run(partial(_measure, job))
        self.record(work)
        return result


def _worker(factory: WorkerFactory) -> Callable[..., Any]:
    return partial(_measure, factory())


def _measure(call: Callable[..., Any], *arguments: Any) -> tuple[Any, Work]:
    """The result, the time, and the peak memory of this process meanwhile (since it began, where no other is recorded)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the earlier peak is forgotten
    began = time.perf_counter()
    result = call(*arguments)
    seconds = time.perf_counter() - began
    try:
        status = Path("/proc/self/status").read_text()
        return result, Work(1024 * int(status.partition("VmHWM:")[2].split()[0]), seconds)
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return result, Work(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, seconds)
