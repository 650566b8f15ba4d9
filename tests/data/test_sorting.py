"""Sorting a table that nobody holds: the order of a plain sort, from runs and parts of any size."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.sorting import merge_points, sorted_tables

VALUES = np.array([0.5, np.nan, -1.0, 0.5, np.inf, -0.0, 0.0, -np.inf, 0.5, np.nan, 2.0])


def tables(values: np.ndarray, sizes: list[int]) -> Iterator[pa.Table]:
    edges = np.cumsum([0, *sizes])
    for start, stop in pairwise(edges):
        names = pa.array([f"pair {i}" for i in range(start, stop)], pa.large_string())
        yield pa.table({"uid": names, "score": values[start:stop]})


@pytest.mark.parametrize("size", [1, 2, 4, 100])
@pytest.mark.parametrize("sizes", [[11], [3, 0, 5, 3], [1] * 11])
def test_the_order_is_that_of_a_plain_sort(size: int, sizes: list[int]) -> None:
    parts = list(sorted_tables(tables(VALUES, sizes), "score", size))
    assert [len(part) for part in parts] == [min(size, 11 - i) for i in range(0, 11, size)]
    whole = pa.concat_tables(parts)
    order = np.argsort(VALUES, kind="stable")  # nan comes last, -0 equals 0
    assert whole["uid"].to_pylist() == [f"pair {i}" for i in order]
    np.testing.assert_array_equal(whole["score"].to_numpy(), VALUES[order])


def test_nothing_is_in_order() -> None:
    assert list(sorted_tables(tables(VALUES[:0], [0, 0]), "score", 3)) == []
    assert list(sorted_tables(iter(()), "score", 3)) == []


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5), st.data())
def test_runs_are_cut_where_the_least_end(runs: list[list[int]], data: st.DataObject) -> None:
    edges = np.cumsum([0, *map(len, runs)])
    keys = np.array([key for run in runs for key in sorted(run)], np.uint64)
    count = data.draw(st.integers(0, len(keys)))
    cuts = merge_points(keys, edges[:-1], edges[1:], count)
    taken = [keys[a:b].tolist() for a, b in zip(edges[:-1], cuts, strict=True)]
    assert sum(map(len, taken)) == count
    assert sorted(key for part in taken for key in part) == sorted(keys.tolist())[:count]
    # of equal keys those of earlier runs
    order = np.argsort(keys, kind="stable")[:count]
    assert sorted(order.tolist()) == [i for a, b in zip(edges[:-1], cuts, strict=True) for i in range(a, b)]


def test_no_more_is_held_than_a_run_and_a_part() -> None:
    """Of 40 runs one at a time is made, and what Arrow holds does not grow with their number."""

    def peak(runs: int) -> int:
        alive = most = 0

        def made() -> Iterator[pa.Table]:
            nonlocal alive, most
            for number in range(runs):
                values = np.random.default_rng(number).normal(size=5000)
                yield pa.table({"uid": pa.array([f"{v:.17f}" for v in values]), "score": values})
                most = max(most, pa.total_allocated_bytes() - alive)

        alive = pa.total_allocated_bytes()
        for part in sorted_tables(made(), "score", 5000):
            most = max(most, pa.total_allocated_bytes() - alive)
            del part
        return most

    assert peak(40) < 1.5 * peak(5)
