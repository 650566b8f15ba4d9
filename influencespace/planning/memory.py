"""The memory of workers, measured in their own processes, whatever machine they are on."""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from influencespace.engine.attempts import Failed
from influencespace.engine.local import Done, Engine, Merge, Pool, WorkerFactory, nothing, run_task

Record = Callable[[int], None]


def measured(engine: Engine, record: Record) -> Engine:
    """A copy of `engine`; `record` is called with the peak memory of a worker during a task or a fold, in bytes."""
    copied = copy(engine)
    verbs: dict[str, Any] = {"map": _map, "stream": _stream, "pool": _pool}
    vars(copied).update({name: partial(verb, engine, record) for name, verb in verbs.items()})
    return copied


def _map(
    engine: Engine, record: Record, factory: WorkerFactory, tasks: Sequence[Any], **options: Any
) -> Iterator[Any]:
    if factory is run_task:  # an engine may have processes for these
        tasks = [partial(_measure, task) for task in tasks]
    else:
        factory = partial(_worker, factory)
    yield from _recorded(record, engine.map(factory, tasks, **options))


def _stream(
    engine: Engine,
    record: Record,
    produce: WorkerFactory,
    tasks: Sequence[Any],
    consume: WorkerFactory,
    **options: Any,
) -> Iterator[Any]:
    """The peak of those who consume: readers hold less."""
    yield from _recorded(record, engine.stream(produce, tasks, partial(_worker, consume), **options))


def _recorded(record: Record, results: Iterator[Any]) -> Iterator[Any]:
    for one in results:
        if isinstance(one, Failed):  # set aside
            yield one
            continue
        result, peak = one
        record(peak)
        yield result


@contextmanager
def _pool(engine: Engine, record: Record, factory: WorkerFactory, **options: Any) -> Iterator[Pool]:
    with engine.pool(partial(_worker, factory), **options) as pool:
        yield _MeasuredPool(pool, record)


@dataclass(frozen=True)
class _MeasuredPool:
    pool: Pool
    record: Record

    def fold(self, tasks: Sequence[Any], merge: Merge, shared: Any = None, *, done: Done = nothing) -> Any:
        def merged(one: Any, other: Any) -> Any:
            return merge(one[0], other[0]), max(one[1], other[1])

        result, peak = self.pool.fold(tasks, merged, shared, done=done)
        self.record(peak)
        return result

    def run(self, job: Callable[[], Any]) -> Any:
        result, peak = self.pool.run(partial(_measure, job))
        self.record(peak)
        return result


def _worker(factory: WorkerFactory) -> Callable[..., Any]:
    return partial(_measure, factory())


def _measure(call: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """The result, and the peak memory of this process meanwhile (since it began, where no other is recorded)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the earlier peak is forgotten
    result = call(*arguments)
    try:
        status = Path("/proc/self/status").read_text()
        return result, 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return result, unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
