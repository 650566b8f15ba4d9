"""Blocks of a stage's results: found again by their mark, joined in order, and gone afterwards."""

from pathlib import Path

import numpy as np

from influencespace.data.blocks import has_block, join_blocks, read_columns, write_block


def test_a_block_counts_only_for_what_it_was_computed_from(tmp_path: Path) -> None:
    write_block(tmp_path, "score", 0, "one", {"x": np.arange(3)})
    assert has_block(tmp_path, "score", 0, "one")
    assert not has_block(tmp_path, "score", 0, "another")
    assert not has_block(tmp_path, "score", 3, "one")


def test_blocks_are_joined_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    for start in (0, 4, 2):
        write_block(tmp_path, "score", start, "one", {"x": np.arange(start, start + 2)})
    assert join_blocks(tmp_path, "score", [0, 2, 4]) == 6
    assert read_columns(tmp_path / "score.parquet")["x"].tolist() == [0, 1, 2, 3, 4, 5]


def test_joining_leaves_no_block_of_the_name_behind_and_touches_no_other(tmp_path: Path) -> None:
    write_block(tmp_path, "score", 0, "one", {"x": np.arange(2)})
    write_block(tmp_path, "score", 7, "of a killed run with larger blocks", {"x": np.arange(2)})
    write_block(tmp_path, "score-out", 0, "one", {"x": np.arange(2)})
    join_blocks(tmp_path, "score", [0])
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["score-out-000000000000.arrow"]
