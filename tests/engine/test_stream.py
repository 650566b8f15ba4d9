"""The streaming verb on Ray equals the plain nested loop: with any number of workers, and with lost readers and workers."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from influencespace.engine.attempts import Failed, TaskError
from influencespace.engine.local import Engine, LocalEngine
from influencespace.errors import InputError


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return LocalEngine() if request.param == "local" else request.getfixturevalue("ray_engine")


@dataclass(frozen=True)
class Read:
    """A factory whose reader gives as many arrays as its task says; it raises, complains or dies before one of them."""

    fail_at: tuple[int, int] = (-1, -1)
    complain_at: tuple[int, int] = (-1, -1)
    die_at: tuple[int, int] = (-1, -1)
    marker: Path | None = None
    floats: int = 1000

    def __call__(self) -> Callable[[int], Iterator[tuple[int, int, np.ndarray]]]:
        return self.read

    def read(self, task: int) -> Iterator[tuple[int, int, np.ndarray]]:
        for number in range(task):
            if (task, number) == self.fail_at:
                raise ZeroDivisionError("no such number")
            if (task, number) == self.complain_at:
                raise InputError("this number is not allowed")
            if (task, number) == self.die_at:
                die(self.marker)
            yield task, number, np.full(self.floats, task + number / 100)


@dataclass(frozen=True)
class Sum:
    """A factory whose worker adds up an item; it raises or dies at one of them."""

    fail_at: tuple[int, int] = (-1, -1)
    die_at: tuple[int, int] = (-1, -1)
    marker: Path | None = None

    def __call__(self) -> Callable[[tuple[int, int, np.ndarray]], tuple[int, int, float]]:
        return self.add

    def add(self, item: tuple[int, int, np.ndarray]) -> tuple[int, int, float]:
        task, number, values = item
        if (task, number) == self.fail_at:
            raise ZeroDivisionError("no such sum")
        if (task, number) == self.die_at:
            die(self.marker)
        values += 0  # it belongs to the worker
        return task, number, float(values.sum())


def die(marker: Path | None) -> None:
    """Once, where there is a marker; else always."""
    if marker is None or not marker.exists():
        if marker is not None:
            marker.touch()
        os._exit(1)


TASKS = [3, 0, 5, 1, 4]
TRUTH = {(task, number, 1000 * task + 10.0 * number) for task in TASKS for number in range(task)}


def test_every_item_of_every_task_is_consumed(engine: Engine) -> None:
    results = list(engine.stream(Read(), TASKS, Sum()))
    assert len(results) == len(TRUTH)
    assert {(task, number, round(total, 6)) for task, number, total in results} == TRUTH
    assert list(engine.stream(Read(), [], Sum())) == []
    assert list(engine.stream(Read(), [0], Sum())) == []


@pytest.mark.ray
def test_any_number_of_workers_gives_the_same_results(ray_engine: Engine) -> None:
    truth = sorted(LocalEngine().stream(Read(), TASKS, Sum()))
    for workers in (3, (1, 2)):
        assert sorted(ray_engine.stream(Read(), TASKS, Sum(), workers=workers)) == truth


@pytest.mark.ray
def test_a_lost_reader_and_a_lost_worker_cost_nothing(ray_engine: Engine, tmp_path: Path) -> None:
    read = Read(die_at=(5, 3), marker=tmp_path / "reader")
    consume = Sum(die_at=(4, 2), marker=tmp_path / "worker")
    results = list(ray_engine.stream(read, TASKS, consume, workers=2))
    assert {(task, number, round(total, 6)) for task, number, total in results} == TRUTH
    assert len(results) == len(TRUTH)
    assert (tmp_path / "reader").exists()
    assert (tmp_path / "worker").exists()


@pytest.mark.ray
@pytest.mark.parametrize(("read", "consume"), [(Read(die_at=(5, 3)), Sum()), (Read(), Sum(die_at=(5, 3)))])
def test_a_task_that_kills_every_worker_is_reported(ray_engine: Engine, read: Read, consume: Sum) -> None:
    results = list(ray_engine.stream(read, TASKS, consume, workers=2, set_aside=True))
    (failed,) = [result for result in results if isinstance(result, Failed)]
    assert failed.task == 5
    assert "task 5 lost its worker 4 times" in failed.reason
    done = {result[:2] for result in results if not isinstance(result, Failed)}
    assert done >= {(task, number) for task in TASKS if task != 5 for number in range(task)}
    with pytest.raises(TaskError, match="task 5 lost its worker 4 times"):
        list(ray_engine.stream(read, TASKS, consume, workers=2))


@pytest.mark.parametrize(("read", "consume"), [(Read(fail_at=(5, 3)), Sum()), (Read(), Sum(fail_at=(5, 3)))])
def test_what_fails_is_raised_or_set_aside(engine: Engine, read: Read, consume: Sum) -> None:
    with pytest.raises(TaskError, match=r"failed: ZeroDivisionError: no such (number|sum)"):
        list(engine.stream(read, TASKS, consume))
    results = list(engine.stream(read, TASKS, consume, set_aside=True))
    (failed,) = [result for result in results if isinstance(result, Failed)]
    assert failed.task == 5
    assert "ZeroDivisionError" in failed.reason


def test_an_error_for_people_ends_the_stream(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"^this number is not allowed$"):
        list(engine.stream(Read(complain_at=(4, 1)), TASKS, Sum(), set_aside=True))
