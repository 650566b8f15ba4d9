"""The streaming verb on Ray: one Ray Data pipeline, from readers on any node to a pool of workers."""

import logging
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from influencespace.engine.attempts import TaskResult, Worker, WorkerFactory, brief
from influencespace.engine.placement import Resources

# A worker that dies (killed node, out of memory) is always replaced, but a task may lose only so many.
TASK_RETRIES = 3
IN_FLIGHT = 2  # items that a worker has: one it works on, the next ones on their way to it
NO_TRACE = "(no traceback: the process was gone)"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What flows where: each task's items from `produce` to `consume`."""

    produce: WorkerFactory
    consume: WorkerFactory
    readers: Resources
    resources: Resources
    workers: tuple[int, int]
    max_readers: int | None
    """How many readers work at once; None for as many as find room."""

    def results(self, tasks: Sequence[Any]) -> Iterator[tuple[int, TaskResult]]:
        """The index of a task and the result of one of its items, as they come, or the failure of the task."""
        starts = ray.remote(Starts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        rows = self._dataset(tasks, starts).iter_batches(
            batch_size=1, batch_format="pyarrow", prefetch_batches=0
        )
        lost: set[int] = set()
        for row in rows:
            index = row["index"][0].as_py()
            result: TaskResult = pickle.loads(row["result"][0].as_py())
            if result.trace == NO_TRACE:
                lost.add(index)
                result = lost_worker(tasks[index])
            yield index, result
        # A reader that dies again and again may have given items before: what it gives at last can be passed over.
        for index in ray.get(starts.lost.remote()):
            if index not in lost:
                yield index, lost_worker(tasks[index])

    def _dataset(self, tasks: Sequence[Any], starts: Any) -> Any:
        """One row and one block for each task, each item and each result, so that single ones are handed out."""
        items = [{"index": index, "task": pickle.dumps(task)} for index, task in enumerate(tasks)]
        data = ray_data()
        rows = data.from_items(items, override_num_blocks=len(items))
        rows.context.target_max_block_size = 1  # bytes: each row is a block of its own
        least, most = self.workers
        most_readers = self.max_readers or len(tasks)
        most_readers += (
            most_readers == most
        )  # by another number Ray Data sees that reading and consuming stay apart
        read = rows.map_batches(
            _Reader(self.produce, starts),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.TaskPoolStrategy(most_readers),
            **ray_options(self.readers),
        )
        return read.map_batches(
            _Consumer,
            fn_constructor_args=(self.consume, starts),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=data.ActorPoolStrategy(
                min_size=least, max_size=max(least, most), max_tasks_in_flight_per_actor=IN_FLIGHT
            ),
            **ray_options(self.resources),
        )


class Starts:
    """How often each task or item was begun and not ended, kept by an actor of its own: Ray Data itself would retry for ever."""

    def __init__(self) -> None:
        self._counts: Counter[Any] = Counter()
        self._lost: set[int] = set()

    def begin(self, key: Any) -> int:
        self._counts[key] += 1
        return self._counts[key]

    def end(self, key: Any) -> None:
        """It is done: what is lost later, with its node, is done again and is no fault of its own."""
        self._counts.pop(key, None)

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
            yield _row(index, 0, lost_worker(task))
            return
        for number, item in enumerate(Worker(self.produce).produce(task)):
            yield _row(index, number, item)
        self.starts.end.remote(index)


class _Consumer:
    """One of the workers: an item in, its result out."""

    def __init__(self, consume: WorkerFactory, starts: Any) -> None:
        self._worker = Worker(consume)
        self._starts = starts
        self._again = ray.get_runtime_context().was_current_actor_reconstructed

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        index, number = batch["index"][0].as_py(), batch["number"][0].as_py()
        item = _item(batch)
        result = item if item.error else self._attempt((index, number), item.value)
        return {"index": [index], "result": [pickle.dumps(result)]}

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


def lost_worker(task: Any) -> TaskResult:
    """The failure of a task that no worker survived."""
    error = (
        f"task {brief(task)} lost its worker {TASK_RETRIES + 1} times. Likely causes: it ran out of memory, "
        "a crash in native code on this input, or its node is gone."
    )
    return TaskResult(error=error, trace=NO_TRACE)


def ray_options(resources: Resources) -> dict[str, float]:
    """Resources as Ray calls them."""
    optional = {"num_gpus": resources.gpus, "memory": resources.memory}
    return {"num_cpus": resources.cpus} | {name: value for name, value in optional.items() if value}


def ray_data() -> Any:
    """Ray Data without its own progress and reports: the stages show theirs."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    # What it says about numbers of tasks and workers is no matter of the user's.
    warnings.filterwarnings("ignore", module=r"ray\.data\.")
    # Here, because the import sets the level anew.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data
