"""Laws of the group-by through files: equal to numpy's, whatever the ranges, the partitions, the engine and the kills."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.buckets import Columns, read_columns
from influencespace.data.exchange import Exchange, Vectors
from influencespace.engine.local import Engine, LocalEngine
from influencespace.run import Workers


@dataclass(frozen=True)
class Emit:
    """Random keys, a number and a vector of each row."""

    keys: tuple[int, ...]

    def __call__(self, start: int, stop: int) -> Columns:
        row = np.arange(start, stop)
        vector = np.stack([row, row**2], 1).astype(np.float32)
        return {"key": np.array(self.keys[start:stop], np.int64), "value": row * 0.5, "vector": vector}


def reduce(columns: Columns) -> Columns:
    """Of each row: size of its group, sum of vectors, and the greatest value of the rows before it in its group."""
    assert (np.diff(columns["key"]) >= 0).all()
    rows = columns["row"]
    assert ((np.diff(columns["key"]) > 0) | (np.diff(rows) > 0)).all()
    _, place, size = np.unique(columns["key"], return_inverse=True, return_counts=True)
    total = np.zeros((len(size), 2), np.float64)
    np.add.at(total, place, columns["vector"])
    first = np.searchsorted(place, np.arange(len(size)))
    return {
        "size": size[place],
        "total": total[place],
        "first": rows[first][place],
        "value": columns["value"],
    }


def check(keys: tuple[int, ...], path: Path) -> None:
    """The results are those of pandas, in row order."""
    frame = pd.DataFrame({"key": keys, "row": np.arange(len(keys))})
    found, groups = read_columns(path), frame.groupby("key")["row"]
    np.testing.assert_array_equal(found["size"], groups.transform("size"))
    np.testing.assert_array_equal(found["first"], groups.transform("min"))
    np.testing.assert_array_equal(found["value"], frame["row"] * 0.5)
    frame["square"] = frame["row"] ** 2
    expected = np.stack([groups.transform("sum"), frame.groupby("key")["square"].transform("sum")], 1)
    np.testing.assert_allclose(found["total"], expected)


def workers(folder: Path, engine: Engine | None = None) -> Workers:
    return Workers(engine=engine or LocalEngine(), folder=folder, stage="test")


@given(
    keys=st.lists(st.one_of(st.integers(0, 5), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=60),
    size=st.integers(1, 70),
    partition_rows=st.integers(1, 70),
)
def test_groups_are_those_of_pandas(
    tmp_path_factory: pytest.TempPathFactory, keys: list[int], size: int, partition_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    workers(folder).group_by(
        "groups", Emit(tuple(keys)), "key", reduce, len(keys), size, partition_rows=partition_rows
    )
    check(tuple(keys), folder / "groups.parquet")


def vectors_of(start: int, stop: int) -> Columns:
    """Two columns of vectors of each row."""
    row = np.arange(start, stop)
    return {
        "square": np.stack([row, row**2], 1).astype(np.float32),
        "half": np.stack([row] * 3, 1).astype(np.float16),
    }


def reduce_vectors(columns: Columns, vectors: Mapping[str, Vectors]) -> Columns:
    """As `reduce`, by vectors that are read a few rows at a time, the last first."""
    assert "square" not in columns
    rows = np.arange(len(columns["row"]))
    blocks = [rows[start : start + 3] for start in range(0, len(rows), 3)][::-1]
    square = np.empty((len(rows), 2), np.float32)
    for block in blocks:
        square[block] = vectors["square"][block]
    np.testing.assert_array_equal(vectors["half"][rows[::-1]][:, 2], columns["row"][::-1])
    return reduce(columns | {"vector": square})


@given(
    keys=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    size=st.integers(1, 70),
    partition_rows=st.integers(1, 70),
)
def test_vectors_go_with_their_rows(
    tmp_path_factory: pytest.TempPathFactory, keys: list[int], size: int, partition_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    workers(folder).group_by(
        *("groups", Emit(tuple(keys)), "key", reduce_vectors, len(keys), size),
        partition_rows=partition_rows,
        vectors=vectors_of,
    )
    check(tuple(keys), folder / "groups.parquet")


KEYS = tuple(np.random.default_rng(0).integers(0, 40, 500).tolist())


def test_one_group_may_be_larger_than_a_partition(tmp_path: Path) -> None:
    keys = (7,) * 100
    workers(tmp_path).group_by("groups", Emit(keys), "key", reduce, 100, 9, partition_rows=10)
    check(keys, tmp_path / "groups.parquet")


def test_partitions_share_the_rows() -> None:
    exchange = Exchange(Path(), "groups", Emit(KEYS), "key", reduce, 1_000_001, 100_000)
    assert exchange.partitions == 5
    assert exchange.starts == list(range(0, 1_000_001, 100_000))


class Stop(BaseException):
    """The end of a run by a signal."""


@dataclass(frozen=True)
class Limited:
    """Emits or reduces so many times in all, and is killed then."""

    calls: list[int]
    limit: int

    def _count(self) -> None:
        if len(self.calls) >= self.limit:
            raise Stop
        self.calls.append(1)

    def emit(self, start: int, stop: int) -> Columns:
        self._count()
        return Emit(KEYS)(start, stop)

    def reduce(self, columns: Columns) -> Columns:
        self._count()
        return reduce(columns)


def test_a_killed_exchange_goes_on_where_it_was(tmp_path: Path) -> None:
    calls: list[int] = []
    for limit in range(100):
        limited = Limited(calls, limit)
        try:
            workers(tmp_path).group_by(
                "groups", limited.emit, "key", limited.reduce, 500, 60, partition_rows=100
            )
        except Stop:
            continue
        break
    assert len(calls) == 9 + 5  # ranges and partitions: none is computed twice
    check(KEYS, tmp_path / "groups.parquet")


def test_a_finished_exchange_is_not_begun_again(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        limited = Limited(calls, 14)
        workers(tmp_path).group_by("groups", limited.emit, "key", limited.reduce, 500, 60, partition_rows=100)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["buckets", "groups.parquet"]


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_every_engine_writes_the_same_file(
    tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    mine: Engine = LocalEngine() if engine == "local" else request.getfixturevalue("ray_engine")
    files = []
    for name, one in (("mine", mine), ("plain", LocalEngine())):
        workers(tmp_path / name, one).group_by(
            "groups", Emit(KEYS), "key", reduce, 500, 60, partition_rows=100
        )
        files.append((tmp_path / name / "groups.parquet").read_bytes())
    assert files[0] == files[1]
    check(KEYS, tmp_path / "mine" / "groups.parquet")
