"""Buckets of a stage's results: written once, joined in order, and removed afterwards."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influencespace.data import buckets
from influencespace.data.buckets import (
    Columns,
    WriteBucket,
    buckets_of,
    join_buckets,
    read_bucket,
    read_columns,
    read_rows,
    remove_work,
    table_rows,
    write_bucket,
)


def test_a_bucket_that_is_there_is_not_computed_again(tmp_path: Path) -> None:
    computed: list[tuple[int, int]] = []

    def compute(start: int, stop: int) -> Columns:
        computed.append((start, stop))
        return {"x": np.arange(start, stop), "y": np.ones((stop - start, 2))}

    tasks = [
        WriteBucket(folder=tmp_path, table="score", start=a, stop=b, compute=compute)
        for a, b in buckets_of(5, 2)
    ]
    assert [task() for task in tasks * 2] == [2, 2, 1] * 2
    assert computed == [(0, 2), (2, 4), (4, 5)]
    assert read_bucket(tmp_path, "score", 4, "y")["y"].shape == (1, 2)


def test_buckets_are_joined_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    for start in (0, 4, 2):
        write_bucket(tmp_path, "score", start, {"x": np.arange(start, start + 2)})
    assert join_buckets(tmp_path, "score", [0, 2, 4]) == 6
    assert read_columns(tmp_path / "score.parquet")["x"].tolist() == [0, 1, 2, 3, 4, 5]


def test_row_groups_are_the_same_whatever_the_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "ROW_GROUP", 4)
    files = []
    for size in (1, 3, 4, 11, 100):
        spans = list(buckets_of(11, size))
        for start, stop in spans:
            write_bucket(
                tmp_path, "score", start, {"x": np.arange(start, stop), "y": np.ones((stop - start, 2))}
            )
        assert join_buckets(tmp_path, "score", [start for start, _ in spans]) == 11
        metadata = pq.read_metadata(tmp_path / "score.parquet")
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 4, 3]
        files.append((tmp_path / "score.parquet").read_bytes())
        remove_work(tmp_path)
    assert len(set(files)) == 1


def test_joined_buckets_stay_for_a_task_that_is_begun_again(tmp_path: Path) -> None:
    write_bucket(tmp_path, "score", 0, {"x": np.arange(2)})
    assert [join_buckets(tmp_path, "score", [0]) for _ in range(2)] == [2, 2]


def test_no_bucket_is_left_behind(tmp_path: Path) -> None:
    write_bucket(tmp_path, "score", 0, {"x": np.arange(2)})
    write_bucket(tmp_path, "score", 7, {"x": np.arange(2)})
    remove_work(tmp_path)
    assert not list(tmp_path.iterdir())
    remove_work(tmp_path)


def test_a_range_of_rows_is_read_from_the_row_groups_that_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"row": np.arange(100), "other": np.zeros(100)}), path, row_group_size=7)
    for start, stop in ((0, 100), (6, 8), (7, 14), (93, 100), (99, 100), (0, 0), (50, 50), (100, 100)):
        assert read_rows(path, slice(start, stop), "row")["row"].tolist() == list(range(start, stop))
    assert len(read_rows(path, slice(None))["other"]) == table_rows(path) == 100
