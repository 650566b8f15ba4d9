"""Map and fold on Ray equal the plain loop: in any order, with any number of actors, with lost workers."""

import io
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.engine.local import (
    Engine,
    LocalEngine,
    MergeTree,
    TaskError,
    merge_all,
    run_once,
    run_task,
)
from influencespace.engine.placement import Resources
from influencespace.engine.progress import duration, progress
from influencespace.engine.ray_engine import RayEngine
from influencespace.engine.session import _knock, start_ray
from influencespace.errors import InputError


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return LocalEngine() if request.param == "local" else request.getfixturevalue("ray_engine")


@dataclass(frozen=True)
class Square:
    """A factory; its worker dies, raises or complains at chosen tasks."""

    fail_at: int = -1
    complain_at: int = -1
    die_at: int = -1
    marker: Path | None = None

    def __call__(self) -> Callable[..., int]:
        return self.work

    def work(self, task: int, shared: int | None = None) -> int:
        if task == self.fail_at:
            raise ZeroDivisionError("no such number")
        if task == self.complain_at:
            raise InputError("this number is not allowed")
        if task == self.die_at and (self.marker is None or not self.marker.exists()):
            if self.marker is not None:
                self.marker.touch()
            os._exit(1)
        return task * task + (shared or 0)


@dataclass(frozen=True)
class Noise:
    """A factory whose states are floats, where the order of a sum shows in the last bits."""

    def __call__(self) -> Callable[..., np.ndarray]:
        return lambda task, shared: np.random.default_rng(task).normal(size=100) * 10.0 ** (task % 7) + shared


TWO_CORES = Resources(cpus=2)


def in_a_list(left: int | list[int], right: int) -> list[int]:
    return [*(left if isinstance(left, list) else [left]), right]


def add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left + right


def test_map_gives_every_result_once(engine: Engine) -> None:
    assert sorted(engine.map(Square(), range(5), workers=2)) == [0, 1, 4, 9, 16]
    assert list(engine.map(Square(), [])) == []


def bracket(left: str, right: str) -> str:
    return f"({left} {right})"


@given(tasks=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_states_that_come_in_any_order_are_merged_by_the_tree_of_the_plain_loop(
    tasks: int, seed: int
) -> None:
    tree = MergeTree(tasks)
    ready = [(0, index, str(index)) for index in range(tasks)]
    generator = np.random.default_rng(seed)
    while ready:
        pair = tree.add(*ready.pop(int(generator.integers(len(ready)))))
        if pair:
            height, index, left, right = pair
            ready.append((height, index, bracket(left, right)))
    assert tree.root == merge_all(map(str, range(tasks)), bracket)


def test_neighbours_are_merged_first() -> None:
    assert merge_all(map(str, range(5)), bracket) == "(((0 1) (2 3)) 4)"


def test_the_caller_of_a_fold_is_told_of_every_task_that_has_ended(engine: Engine) -> None:
    ended: list[int] = []
    with engine.pool(Square(), workers=2) as pool:
        assert pool.fold(range(5), add, done=ended.append) == 30
    assert sorted(ended) == [0, 1, 2, 3, 4]


def test_a_state_that_cannot_be_merged_names_its_first_task(engine: Engine) -> None:
    with engine.pool(Square()) as pool, pytest.raises(TaskError, match="ZeroDivisionError"):
        pool.fold(range(4), refuse)
    with engine.pool(Square()) as pool:
        assert pool.fold([3, 1, 2], in_a_list) == [9, 1, 4]


def refuse(left: Any, right: Any) -> Any:
    raise ZeroDivisionError


def test_fold_merges_in_the_order_of_the_tasks(engine: Engine) -> None:
    with engine.pool(Square(), workers=2) as pool:
        assert pool.fold([3, 1, 2], in_a_list) == [9, 1, 4]
        assert pool.fold([3], add, shared=100) == 109
        with pytest.raises(ValueError, match="at least one task"):
            pool.fold([], add)


@pytest.mark.ray
def test_any_number_of_workers_gives_the_same_bits(ray_engine: Engine) -> None:
    tasks = list(range(12))
    with LocalEngine().pool(Noise()) as pool:
        truth = pool.fold(tasks, add, shared=0.1)
    for workers in (1, 3):
        with ray_engine.pool(Noise(), workers=workers) as pool:
            for _ in range(2):
                np.testing.assert_array_equal(pool.fold(tasks, add, shared=0.1), truth)


def test_an_unexpected_error_names_the_task(engine: Engine) -> None:
    with pytest.raises(TaskError, match=r"task 2 failed: ZeroDivisionError: no such number"):
        list(engine.map(Square(fail_at=2), range(4), workers=2))
    with (
        engine.pool(Square(fail_at=2)) as pool,
        pytest.raises(TaskError, match=r"task 2 failed: ZeroDivisionError"),
    ):
        pool.fold(range(4), add)


def test_an_error_for_people_stays_one(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"^this number is not allowed$"):
        list(engine.map(Square(complain_at=1), range(2)))


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_its_task_done_again(ray_engine: Engine, tmp_path: Path) -> None:
    mapped = ray_engine.map(Square(die_at=2, marker=tmp_path / "map"), range(4), workers=2)
    assert sorted(mapped) == [0, 1, 4, 9]
    assert (tmp_path / "map").exists()
    with ray_engine.pool(Square(die_at=2, marker=tmp_path / "fold"), workers=2) as pool:
        assert pool.fold(range(4), add) == 14
    assert (tmp_path / "fold").exists()


@pytest.mark.ray
def test_a_task_that_kills_every_worker_ends_the_run(
    ray_engine: Engine,
) -> None:
    with pytest.raises(TaskError, match=r"task 2 lost its worker 4 times"):
        list(ray_engine.map(Square(die_at=2), range(4)))
    with (
        ray_engine.pool(Square(die_at=2)) as pool,
        pytest.raises(TaskError, match=r"task 2 lost its worker 4 times"),
    ):
        pool.fold(range(4), add)


@pytest.mark.ray
def test_a_pool_may_hold_every_core_and_still_run_a_job(ray_engine: Engine) -> None:
    with ray_engine.pool(Square(), workers=4, resources=TWO_CORES) as pool:
        assert pool.fold(range(32), add) == sum(n * n for n in range(32))
        assert pool.run(Job(20)) == 22


@pytest.mark.ray
def test_a_pool_works_with_the_actors_that_find_a_place(ray_engine: Engine) -> None:
    with ray_engine.pool(Square(), workers=3, resources=TWO_CORES) as large:
        assert large.fold(range(7), add) == 91
        with ray_engine.pool(Square(), workers=3, resources=TWO_CORES) as pool:  # one finds two cores
            assert pool.fold([3, 1, 2], in_a_list) == [9, 1, 4]
            assert pool.run(Job(20)) == 22
        assert sorted(ray_engine.map(Square(), range(5), workers=3)) == [0, 1, 4, 9, 16]


def test_a_job_of_a_pool_may_fail(engine: Engine) -> None:
    with engine.pool(Square()) as pool:
        with pytest.raises(TaskError, match=r"failed: TypeError"):
            pool.run(Job("nothing"))  # type: ignore[arg-type]
        assert pool.fold([3, 1, 2], in_a_list) == [9, 1, 4]


@pytest.mark.ray
def test_no_task_may_ask_for_more_than_a_machine_has(ray_engine: Engine) -> None:
    assert RayEngine().cores_per_task == 7  # of 8: a submitted job's driver may hold one
    assert RayEngine(2).cores_per_task == 2
    (machine,) = RayEngine().machines
    assert (machine.cpus, machine.gpus) == (8, 0)
    assert machine.memory > 0
    for resources in (Resources(cpus=9), Resources(gpus=1), Resources(memory=10**15)):
        with pytest.raises(InputError, match="no machine has them"):
            list(ray_engine.map(Square(), range(2), resources=resources))
        refused = pytest.raises(InputError, match="no machine has them")
        with refused, ray_engine.pool(Square(), resources=resources):
            pass


@pytest.mark.ray
def test_resources_are_those_of_every_worker(ray_engine: Engine) -> None:
    resources = Resources(cpus=2, memory=10**6)
    for factory, tasks in ((run_task, [assigned]), (Assigned(), [0])):
        assert list(ray_engine.map(factory, tasks, resources=resources)) == [(2, 10**6)]
    with ray_engine.pool(Assigned(), resources=resources) as pool:
        assert pool.fold([0], in_a_list) == (2, 10**6)


def assigned() -> tuple[float, float]:
    import ray

    resources = ray.get_runtime_context().get_assigned_resources()
    return resources["CPU"], resources["memory"]


@dataclass(frozen=True)
class Assigned:
    """A factory whose workers report what they have."""

    def __call__(self) -> Callable[..., tuple[float, float]]:
        return lambda *task: assigned()


def test_one_job_runs_on_one_worker(engine: Engine) -> None:
    assert run_once(engine, Job(20)) == 22


def wait_policy() -> str:
    return os.environ["OMP_WAIT_POLICY"]


def test_the_environment_of_workers_lets_threads_sleep_while_they_wait(engine: Engine) -> None:
    """OpenMP reads it from the environment. Spinning threads make a training on a busy machine several times slower."""
    assert run_once(engine, wait_policy) == "PASSIVE"


@dataclass(frozen=True)
class Job:
    number: int

    def __call__(self) -> int:
        return self.number + 2


@pytest.mark.ray
def test_starting_ray_twice_uses_the_first_and_leaves_it_running(ray_engine: Engine) -> None:
    import ray

    with start_ray() as again:
        assert again.cores == 8
    assert ray.is_initialized()


def test_progress_without_a_terminal_writes_plain_lines() -> None:
    stream = io.StringIO()
    with progress("embed", 1500, unit="pairs", stream=stream) as bar:
        bar.advance(1000)
        bar.advance(500)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("embed: 1,500 of 1,500 pairs, ")
    assert line.endswith("pairs/s, 00:00 left")


def test_progress_that_stops_early_shows_how_far_it_came() -> None:
    stream = io.StringIO()
    with suppress(ZeroDivisionError), progress("embed", 3, stream=stream) as bar:
        bar.advance()
        bar.advance(1 // 0)
    assert stream.getvalue().startswith("embed: 1 of 3 pairs, ")


def test_progress_on_a_terminal_shows_rate_and_total() -> None:
    stream = Terminal()
    with progress("embed", 3, stream=stream) as bar:
        bar.advance(3)
    assert "3/3" in stream.getvalue()
    assert "/s" in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.2, "8s"), (185, "3m05s"), (7620, "2h07m"), (float("inf"), "unknown time")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_no_ray_to_join_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", alone)
    with pytest.raises(InputError, match="no Ray to join at auto"), start_ray("auto"):
        pass


def test_a_cluster_that_does_not_answer_is_reported_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(InputError, match="no Ray cluster answers at"):
            _knock(address)
    for address in ("nowhere", "nowhere:port", ":6379"):
        with pytest.raises(InputError, match=f"there is no address {address}: give host:port"):
            _knock(address)


def speak() -> None:
    print("a word of a worker", flush=True)


@pytest.mark.ray
def test_what_workers_wrote_is_kept(ray_engine: Engine, tmp_path: Path) -> None:
    run_once(ray_engine, speak)
    ray_engine.keep_logs(tmp_path / "logs")
    kept = list((tmp_path / "logs").glob("*-worker-*.out"))
    assert any("a word of a worker" in path.read_text() for path in kept)
    LocalEngine().keep_logs(tmp_path / "none")
    assert not (tmp_path / "none").exists()
