"""The streaming verb on Ray: one Ray Data pipeline, from readers on any node to a pool of workers."""

import logging
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from influencespace.engine.attempts import (
    NO_TRACE,
    TASK_RETRIES,
    TaskResult,
    Worker,
    WorkerFactory,
    lost_worker,
)
from influencespace.engine.cluster import alive_machines, ray_options
from influencespace.engine.place import TICK_SECONDS, Place
from influencespace.engine.placement import beside

LOST = -1  # the number of what is no item, but says that no reader survived its task
IN_FLIGHT = 2  # items that a worker has: one it works on, the next ones on their way to it


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What flows where: each task's items from `produce` to `consume`."""

    produce: WorkerFactory
    consume: WorkerFactory
    readers: Place
    place: Place
    """Of the workers that consume."""
    workers: tuple[int, int]
    cores: int | None
    """How many readers work at once; None for as many as find room."""

    def results(self, tasks: Sequence[Any]) -> Iterator[tuple[int, TaskResult]]:
        """The index of a task and the result of one of its items, as they come, or the failure of the task."""
        starts = ray.remote(Starts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        came: dict[int, set[int]] = {
            index: set() for index in range(len(tasks))
        }  # of tasks that are not done
        while came:
            left = sorted(came)
            flow = _Flow(self._dataset([(index, tasks[index]) for index in left], starts))
            try:
                for row in self._rows(flow, starts):
                    index, number = row["index"][0].as_py(), row["number"][0].as_py()
                    if number not in came[index]:
                        came[index].add(number)
                        result: TaskResult = pickle.loads(row["result"][0].as_py())
                        yield index, lost_worker(tasks[index]) if result.trace == NO_TRACE else result
            except _Again:  # with what is not done: its items may be consumed twice
                for index, items in ray.get(starts.ended.remote()).items():
                    if len(came.get(index, ())) == items:
                        del came[index]
                continue
            finally:
                flow.stop()
            # A reader that dies again and again may have given items before: what it gives at last can be passed over.
            for index in ray.get(starts.lost.remote()):
                if LOST not in came[index]:
                    yield index, lost_worker(tasks[index])
            return

    def _rows(self, flow: "_Flow", starts: Any) -> Iterator[pa.Table]:
        """The rows as they come, and why none come for long; raises _Again where the workers need another place."""

        def at_work(what: str) -> bool:
            return bool(ray.get(getattr(starts, what).remote()))

        flow.start()
        while True:
            with suppress(Empty):
                row = flow.queue.get(timeout=TICK_SECONDS)
                if row is None:
                    return
                if isinstance(row, BaseException):
                    raise row
                self.readers.at_work()
                self.place.at_work()
                yield row
            if self.place.due:
                changed = self.readers.look(lambda: at_work("begun"))
                if self.place.look(lambda: at_work("born")) or changed:
                    raise _Again

    def _sizes(self) -> tuple[int, int]:
        """From how many to how many workers, so that one reader at least finds a place beside them."""
        least, most = self.workers
        room = beside(alive_machines(), self.place.need, self.readers.need)
        least = max(1, min(least, room))
        return least, max(least, min(most, self.place.room) if self.cores else most)

    def _dataset(self, tasks: Sequence[tuple[int, Any]], starts: Any) -> Any:
        """One row and one block for each task, each item and each result, so that single ones are handed out."""
        items = [{"index": index, "task": pickle.dumps(task)} for index, task in tasks]
        data = ray_data()
        rows = data.from_items(items, override_num_blocks=len(items))
        rows.context.target_max_block_size = 1  # bytes: each row is a block of its own
        least, most = self._sizes()
        readers = self.cores or len(tasks)
        readers += readers == most  # by another number Ray Data sees that reading and consuming stay apart
        read = rows.map_batches(
            _Reader(self.produce, starts),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.TaskPoolStrategy(readers),
            **ray_options(self.readers.need),
        )
        return read.map_batches(
            _Consumer,
            fn_constructor_args=(self.consume, starts),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=data.ActorPoolStrategy(
                min_size=least, max_size=most, max_tasks_in_flight_per_actor=IN_FLIGHT
            ),
            **ray_options(self.place.need),
        )


class _Again(Exception):
    """The pipeline has to be built anew: what its workers need is nowhere any more."""


class _Flow:
    """The rows of a data set, drawn by a thread, so that the caller need not wait for them in silence."""

    def __init__(self, dataset: Any) -> None:
        self.queue: Queue[Any] = Queue(maxsize=4)
        self._dataset = dataset
        self._stopped = Event()

    def start(self) -> None:
        Thread(target=self._draw, daemon=True, name="stream").start()

    def stop(self) -> None:
        """End the work, whether or not its rows were drawn."""
        self._stopped.set()
        with suppress(Exception):  # there may be none, or no Ray any more
            self._dataset._current_executor.shutdown(force=True)

    def _draw(self) -> None:
        try:
            options = {"batch_size": 1, "batch_format": "pyarrow", "prefetch_batches": 0}
            for row in self._dataset.iter_batches(**options):
                if not self._put(row):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, row: Any) -> bool:
        while not self._stopped.is_set():
            with suppress(Full):
                self.queue.put(row, timeout=0.1)
                return True
        return False


class Starts:
    """How often each task or item was begun and not ended, kept by an actor of its own: Ray Data itself would retry for ever."""

    def __init__(self) -> None:
        self._counts: Counter[Any] = Counter()
        self._lost: set[int] = set()
        self._ended: dict[int, int] = {}
        self._begun = self._born = 0

    def begin(self, key: Any) -> int:
        self._begun += 1
        self._counts[key] += 1
        return self._counts[key]

    def end(self, key: Any) -> None:
        """It is done: what is lost later, with its node, is done again and is no fault of its own."""
        self._counts.pop(key, None)

    def end_task(self, index: int, items: int) -> None:
        """A task is read, with so many items."""
        self.end(index)
        self._ended[index] = items

    def ended(self) -> dict[int, int]:
        """How many items each task has that was read to its end."""
        return self._ended

    def bear(self) -> None:
        """One more worker is there."""
        self._born += 1

    def begun(self) -> int:
        return self._begun

    def born(self) -> int:
        return self._born

    def lose(self, index: int) -> None:
        """A task that nobody tries again."""
        self._lost.add(index)

    def lost(self) -> list[int]:
        return sorted(self._lost)


@dataclass(frozen=True)
class _Reader:
    """Reads one task: a row for each of its items."""

    produce: WorkerFactory
    starts: Any

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        index, task = batch["index"][0].as_py(), pickle.loads(batch["task"][0].as_py())
        if ray.get(self.starts.begin.remote(index)) > TASK_RETRIES + 1:
            ray.get(self.starts.lose.remote(index))
            yield _row(index, LOST, lost_worker(task))
            return
        number = -1
        for number, item in enumerate(Worker(self.produce).produce(task)):
            yield _row(index, number, item)
        self.starts.end_task.remote(index, number + 1)


class _Consumer:
    """One of the workers: an item in, its result out."""

    def __init__(self, consume: WorkerFactory, starts: Any) -> None:
        self._worker = Worker(consume)
        self._starts = starts
        self._again = ray.get_runtime_context().was_current_actor_reconstructed
        starts.bear.remote()

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        index, number = batch["index"][0].as_py(), batch["number"][0].as_py()
        item = _item(batch)
        result = item if item.error else self._attempt((index, number), item.value)
        return {"index": [index], "number": [number], "result": [pickle.dumps(result)]}

    def _attempt(self, key: tuple[int, int], item: Any) -> TaskResult:
        begun = self._starts.begin.remote(key)
        # Nobody waits for the count as long as no worker was lost here.
        if self._again and ray.get(begun) > TASK_RETRIES + 1:
            return lost_worker(key)
        result = self._worker.attempt(item)
        self._starts.end.remote(key)
        return result


def _row(index: int, number: int, item: TaskResult) -> pa.Table:
    """One row; arrays in the item are copied once, into a column of parts: how it is pickled, then each array."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(item, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(pickled), *(array.raw() for array in arrays)]
    ends = np.cumsum([0, *(part.nbytes for part in parts)])
    data = np.empty(ends[-1], np.uint8)
    for part, start, end in zip(parts, ends[:-1], ends[1:]):
        data[start:end] = part
    column = pa.Array.from_buffers(
        pa.large_binary(), len(parts), [None, pa.py_buffer(ends), pa.py_buffer(data)]
    )
    listed = pa.LargeListArray.from_arrays(pa.array([0, len(parts)], pa.int64()), column)
    return pa.table({"index": [index], "number": [number], "item": listed})


def _item(batch: pa.Table) -> TaskResult:
    """The item of a row; its arrays are the reader's own, and may be changed."""
    pickled, *arrays = batch["item"][0].values
    buffers = [np.frombuffer(array.as_buffer(), np.uint8).copy() for array in arrays]
    result: TaskResult = pickle.loads(pickled.as_buffer(), buffers=buffers)
    return result


def ray_data() -> Any:
    """Ray Data without its own progress and reports: the stages show theirs."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    # What it says about numbers of tasks and workers is no matter of the user's.
    warnings.filterwarnings("ignore", module=r"ray\.data\.")
    # Here, because the import sets the level anew.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data
