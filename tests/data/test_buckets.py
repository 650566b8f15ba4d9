"""Blocks of a stage's results: found again by their mark, joined in order, and gone afterwards."""

from pathlib import Path

import numpy as np

from influencespace.data.buckets import has_bucket, join_buckets, read_columns, remove_buckets, write_bucket


def test_a_block_counts_only_for_what_it_was_computed_from(tmp_path: Path) -> None:
    write_bucket(tmp_path, "score", 0, "one", {"x": np.arange(3)})
    assert has_bucket(tmp_path, "score", 0, "one")
    assert not has_bucket(tmp_path, "score", 0, "another")
    assert not has_bucket(tmp_path, "score", 3, "one")


def test_blocks_are_joined_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    for start in (0, 4, 2):
        write_bucket(tmp_path, "score", start, "one", {"x": np.arange(start, start + 2)})
    assert join_buckets(tmp_path, "score", [0, 2, 4]) == 6
    assert read_columns(tmp_path / "score.parquet")["x"].tolist() == [0, 1, 2, 3, 4, 5]


def test_joined_blocks_stay_for_a_task_that_is_begun_again(tmp_path: Path) -> None:
    write_bucket(tmp_path, "score", 0, "one", {"x": np.arange(2)})
    assert [join_buckets(tmp_path, "score", [0]) for _ in range(2)] == [2, 2]


def test_no_block_is_left_behind_whoever_wrote_it(tmp_path: Path) -> None:
    write_bucket(tmp_path, "score", 0, "one", {"x": np.arange(2)})
    write_bucket(tmp_path, "score", 7, "of a killed run with larger blocks", {"x": np.arange(2)})
    remove_buckets(tmp_path)
    assert not list(tmp_path.iterdir())
    remove_buckets(tmp_path)
