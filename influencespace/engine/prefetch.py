"""Work ahead: the next batches are read and prepared while the current one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.1


def prefetch(
    items: Iterable[Item], work: Callable[[Item], Result], *, threads: int, ahead: int
) -> Iterator[Result]:
    """Yield `work(item)` in the order of `items`, computed by `threads` threads at most `ahead` items early.

    A background thread draws the items. An exception of either comes out here, in its turn.
    """
    queue: Queue[Future[Result] | None] = Queue(maxsize=ahead)
    stop = Event()

    def put(future: Future[Result] | None) -> None:
        while not stop.is_set():
            with suppress(Full):
                queue.put(future, timeout=POLL_SECONDS)
                return

    def feed() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put(executor.submit(work, item))
            put(None)
        except Exception as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            put(failed)

    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as executor:
        feeder = Thread(target=feed, daemon=True)
        feeder.start()
        try:
            while (future := queue.get()) is not None:
                yield future.result()
        finally:
            stop.set()
            _cancel(queue)
            feeder.join()


def _cancel(queue: "Queue[Future[Result] | None]") -> None:
    while True:
        try:
            future = queue.get_nowait()
        except Empty:
            return
        if future is not None:
            future.cancel()
