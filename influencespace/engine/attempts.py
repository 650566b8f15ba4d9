"""One meaning of failure: what a task's exceptions become, what is tried again, and what is set aside.

Exceptions travel as values (`TaskResult`), so that Ray retries lost workers and never errors. What storage may have
for a moment (an I/O error, a lost connection, a time-out) is tried again; all else is the same at every try.
"""

import errno
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from influencespace.engine.memory import give_back
from influencespace.errors import InputError

WorkerFactory = Callable[[], Callable[..., Any]]

TASK_RETRIES = 3
"""A worker that dies (out of memory, a crash) is always replaced, but a task may lose only so many and one more."""
MACHINE_LOSSES = 20
"""So often may the machine of a task go away: no fault of the task's, but it must end."""
BACK_OFF = (1.0, 2.0, 4.0)
"""Seconds before each further try of a task that failed by an I/O error."""
LASTING = frozenset(
    {
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EROFS),
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
    }
)
"""Errors of files that are the same at the next try: what is not there, not allowed, or full."""


class TaskError(RuntimeError):
    """A task raised an unexpected exception: names the task and carries the worker's traceback."""


@dataclass(frozen=True)
class Failed:
    """A task that was set aside, and why: it kept failing, or no worker survived it."""

    task: Any
    reason: str


@dataclass(frozen=True)
class TaskResult:
    """What a worker sends back: a value, what the user has to change (`error`), or an exception (`error` and `trace`)."""

    value: Any = None
    error: str = ""
    trace: str = ""

    def result(self) -> Any:
        """The value; raises TaskError or InputError where there is none."""
        if self.trace:
            raise TaskError(f"{self.error}\n{self.trace}")
        if self.error:
            raise InputError(self.error)
        return self.value

    def or_failed(self, task: Any, set_aside: bool) -> Any:
        """The value, or `Failed` where the task failed and the caller sets such tasks aside; else as `result`."""
        return Failed(task, self.error) if set_aside and self.trace else self.result()


def failure(task: Any, error: Exception) -> TaskResult:
    """What becomes of an exception of a task; called while it is handled."""
    if isinstance(error, InputError):
        return TaskResult(error=str(error))
    text = f"task {brief(task)} failed: {type(error).__name__}: {error}"
    return TaskResult(error=text, trace=traceback.format_exc())


NO_TRACE = "(no traceback: the process was gone)"


def lost_worker(task: Any, more: str = "") -> TaskResult:
    """The failure of a task that no worker survived."""
    error = (
        f"task {brief(task)} lost its worker {TASK_RETRIES + 1} times. Likely causes: it ran out of memory, "
        f"a crash in native code on this input, or its node is gone.{more}"
    )
    return TaskResult(error=error, trace=NO_TRACE)


class Losses:
    """How often each task lost its worker, and how often the machine was lost with it."""

    def __init__(self) -> None:
        self._workers: Counter[int] = Counter()
        self._machines: Counter[int] = Counter()

    def count(self, index: int, *, machine_gone: bool) -> bool:
        """Count one; whether that was too many."""
        (self._machines if machine_gone else self._workers)[index] += 1
        return self._workers[index] > TASK_RETRIES or self._machines[index] > MACHINE_LOSSES


def is_transient(error: BaseException | None) -> bool:
    """Whether the next try may succeed: an I/O error that is not lasting, or what was made of one."""
    if isinstance(error, OSError):
        return error.errno not in LASTING
    return isinstance(error, InputError) and is_transient(error.__cause__ or error.__context__)


def tried(call: Callable[[], Any]) -> Any:
    """`call()`, once more after each of BACK_OFF while it fails by an I/O error."""
    for seconds in BACK_OFF:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(seconds)
    return call()


def produced(items_of: Callable[[Any], Iterator[Any]], task: Any) -> Iterator[TaskResult]:
    """The items that a task gives, each as a TaskResult; the last one is its failure, where it fails.

    After an I/O error the task begins anew and what it gave already is passed over: its items are the same each time.
    """
    given = 0
    for seconds in (*BACK_OFF, None):
        try:
            for item in islice(items_of(task), given, None):
                given += 1
                yield TaskResult(item)
            return
        except Exception as error:
            if seconds is None or not is_transient(error):
                yield failure(task, error)
                return
        time.sleep(seconds)


class Worker:
    """One worker: builds its callable at the first task, and turns exceptions into results."""

    def __init__(self, factory: WorkerFactory) -> None:
        self._factory = factory
        self._call: Callable[..., Any] | None = None

    @property
    def call(self) -> Callable[..., Any]:
        """What the factory made."""
        self._call = self._call or self._factory()
        return self._call

    def attempt(self, task: Any, *shared: Any) -> TaskResult:
        """The result of one task."""
        try:
            return TaskResult(tried(lambda: self.call(task, *shared)))
        except Exception as error:
            return failure(task, error)
        finally:
            give_back()

    def produce(self, task: Any) -> Iterator[TaskResult]:
        """The items of one task; a factory that fails fails the task."""
        yield from produced(lambda task: self.call(task), task)
        give_back()

    def fold(self, task: Any, shared: Any) -> tuple[TaskResult, Any]:
        """Whether the task ended well, and its state: apart, so that the state may stay where it is."""
        return _apart(self.attempt(task, shared))

    def merge(self, merge: Callable[[Any, Any], Any], left: Any, right: Any) -> tuple[TaskResult, Any]:
        """As `fold`: two states, merged."""
        return _apart(attempt(partial(merge, left, right)))

    def run(self, job: Callable[[], Any]) -> TaskResult:
        """The result of a job."""
        return attempt(job)


def _apart(result: TaskResult) -> tuple[TaskResult, Any]:
    return replace(result, value=None), result.value


def run_task() -> Callable[..., Any]:
    """The factory for tasks that know themselves what to do: a task is called, and its result is the answer."""
    return _call


def _call(task: Callable[[], Any], *_shared: Any) -> Any:
    return task()


def attempt(task: Any) -> TaskResult:
    """The result of a task that knows itself what to do."""
    return Worker(run_task).attempt(task)


def brief(task: Any) -> str:
    """What an error calls a task: its name, or its text, shortened."""
    while isinstance(task, partial) and task.args:
        task = task.args[0]
    text = str(getattr(task, "name", task))
    return text if len(text) <= 200 else text[:200] + "..."
