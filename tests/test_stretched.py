"""Embeddings of many pairs, made of those of a few."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.imported import EmbeddingBatch, ImportOptions, read_imported_embeddings
from influencespace.data.pair_set import PairSet
from influencespace.planning.stretched import FILE_PAIRS, draw_images, near, parts, stretched, write
from tests.planted import plant


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 100), st.integers(0, 9))
def test_images_are_drawn_with_all_their_captions(image: list[int], count: int, seed: int) -> None:
    images = np.array(image)
    rows, drawn = draw_images(images, count, np.random.default_rng(seed))
    assert len(rows) == len(drawn) == count
    for draw in range(drawn[-1] + 1):
        mine = rows[drawn == draw]
        (of,) = set(images[mine])
        whole = np.flatnonzero(images == of)
        assert set(mine) == set(whole) or draw == drawn[-1]  # the last is cut
        assert len(set(mine)) == len(mine)


def test_drawn_vectors_are_near_their_own_and_no_copies_of_each_other() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 256))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    one, other = (near(vectors, rng).astype(np.float64) for _ in range(2))
    assert np.linalg.norm(one, axis=1) == pytest.approx(1, abs=2e-3)
    assert (one * vectors).sum(1) == pytest.approx(0.82, abs=0.07)
    assert (one * other).sum(1) == pytest.approx(0.67, abs=0.15)


def test_parts_are_as_many_as_workers_but_not_small() -> None:
    assert parts(10 * FILE_PAIRS, 4) == [2500] * 4
    assert parts(3 * FILE_PAIRS - 1, 4) == [1499, 1500]
    assert parts(7, 64) == [7]


def test_what_is_stretched_can_be_imported(tmp_path: Path) -> None:
    pairs = PairSet(plant(tmp_path / "pairs", 40, captions=2, groups=("day", "night")).folder)
    folder = write(tmp_path / "made", stretched(pairs, 2 * FILE_PAIRS, 2, seed=0))
    again = stretched(pairs, 2 * FILE_PAIRS, 2, seed=0)
    batches = [
        one for one in read_imported_embeddings(folder, ImportOptions()) if isinstance(one, EmbeddingBatch)
    ]
    assert [len(batch.uids) for batch in batches] == [FILE_PAIRS, FILE_PAIRS]
    assert len({uid for batch in batches for uid in batch.uids}) == 2 * FILE_PAIRS
    captions = {caption for batch in batches for caption in batch.captions or ()}
    assert len(captions) == 2 * FILE_PAIRS
    assert {group for batch in batches for group in batch.groups or ()} == {"day", "night"}
    made = np.stack(again[0]["image_embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
    np.testing.assert_allclose(batches[0].images, made, atol=1e-3)  # of unit length once more
