"""One meaning of failure: I/O errors are tried again, all else is not, and what fails for good says so."""

import errno
from collections.abc import Callable, Iterator

import pytest

from influencespace.engine import attempts
from influencespace.engine.attempts import Failed, TaskError, Worker, is_transient
from influencespace.engine.local import LocalEngine
from influencespace.errors import InputError


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited."""
    waited: list[float] = []
    monkeypatch.setattr(attempts.time, "sleep", waited.append)
    return waited


def flaky(failures: list[Exception]) -> Callable[[], Callable[[int], int]]:
    """A factory of workers that raise these, one after another, before they do anything."""

    def work(task: int) -> int:
        if failures:
            raise failures.pop(0)
        return task + 1

    return lambda: work


EIO = OSError(errno.EIO, "Input/output error")


def test_io_errors_are_tried_again_after_longer_and_longer_pauses(pauses: list[float]) -> None:
    failures = [EIO, TimeoutError("timed out"), ConnectionResetError("reset")]
    assert list(LocalEngine().map(flaky(failures), [1, 2])) == [2, 3]
    assert pauses == [1.0, 2.0, 4.0]


def test_an_io_error_that_lasts_fails_its_task(pauses: list[float]) -> None:
    with pytest.raises(TaskError, match=r"task 1 failed: OSError.*Input/output error"):
        list(LocalEngine().map(flaky([EIO] * 4), [1]))
    assert pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "not allowed"),
        OSError(errno.ENOSPC, "no space left"),
        ValueError("no number"),
        InputError("this shard is no tar"),
    ],
    ids=lambda error: str(error),
)
def test_what_is_the_same_at_every_try_is_not_tried_again(error: Exception, pauses: list[float]) -> None:
    with pytest.raises((TaskError, InputError)):
        list(LocalEngine().map(flaky([error]), [1]))
    assert pauses == []


def test_what_was_made_of_an_io_error_is_tried_again(pauses: list[float]) -> None:
    def complaint() -> InputError:
        try:
            try:
                raise EIO
            except OSError:
                raise InputError("x.tar cannot be read") from None
        except InputError as error:
            return error

    assert is_transient(complaint())
    assert list(LocalEngine().map(flaky([complaint()]), [1])) == [2]
    assert pauses == [1.0]


def test_tasks_that_fail_are_set_aside_where_the_caller_asks() -> None:
    tasks = [1, 2]
    failed, done = LocalEngine().map(flaky([ValueError("no number")]), tasks, set_aside=True)
    assert failed == Failed(1, "task 1 failed: ValueError: no number")
    assert done == 3
    with pytest.raises(
        InputError, match="change this"
    ):  # what the user has to change ends the run all the same
        list(LocalEngine().map(flaky([InputError("change this")]), tasks, set_aside=True))


def test_a_stream_goes_on_where_an_io_error_cut_it() -> None:
    opened = []

    def read(task: int) -> Iterator[int]:
        opened.append(task)
        for number in range(4):
            if number == 2 and len(opened) == 1:
                raise EIO
            yield 10 * task + number

    items = [result.value for result in Worker(lambda: read).produce(3)]
    assert items == [30, 31, 32, 33]
    assert opened == [3, 3]


def test_a_stream_that_fails_for_good_gives_what_it_has_and_then_the_reason() -> None:
    def read(task: int) -> Iterator[int]:
        yield task
        raise EIO

    first, last = Worker(lambda: read).produce(3)
    assert first.value == 3
    assert "Input/output error" in last.error


def test_the_longest_name_of_a_task_is_cut() -> None:
    assert len(attempts.brief("x" * 1000)) == 203
