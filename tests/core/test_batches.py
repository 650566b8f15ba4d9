"""Laws of batches and negative batches: one pair an image, nothing lost, weights respected, whatever the blocks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core import batches
from influencespace.core.batches import InMemory

image_lists = st.lists(st.integers(0, 12), min_size=2, max_size=60).map(lambda x: np.array(x, np.int64))


def as_pieces(rows: np.ndarray, cuts: int) -> list[np.ndarray]:
    return np.array_split(rows, cuts)


@given(images=image_lists, size=st.integers(1, 20), cuts=st.integers(1, 7))
def test_batches_cut_an_order_without_loss_and_without_repeated_images(
    images: np.ndarray, size: int, cuts: int
) -> None:
    order = np.random.default_rng(0).permutation(len(images))
    cutter = batches.OnePairAnImage(size)
    cut = [batch for piece in as_pieces(order, cuts) for batch in cutter.cut(piece, images[piece])]
    assert sorted(np.concatenate([*cut, cutter.rows])) == list(range(len(images)))
    assert (cutter.images == images[cutter.rows]).all()
    assert len(set(cutter.images)) < size or len(cutter.rows) < size
    for batch in cut:
        assert len(batch) == len(set(images[batch])) == size


def test_what_waits_is_bounded_and_loses_what_is_repeated_most() -> None:
    """One image has most of the pairs: every batch takes one of them, the others cannot all wait."""
    images = np.where(np.arange(4000) % 4 > 0, 0, np.arange(4000))
    cutter = batches.OnePairAnImage(10, most=50)
    met = []
    for start in range(0, 4000, 100):
        piece = np.arange(start, start + 100)
        met += list(cutter.cut(piece, images[piece]))
        assert len(cutter.rows) <= 50
    assert (images[cutter.rows] > 0).sum() < 10
    rare = np.count_nonzero(images)
    assert np.count_nonzero(images[np.concatenate(met)]) > rare - 10


def counts_of(weights: np.ndarray, seed: int, block: int) -> np.ndarray:
    """How often an epoch has each row."""
    pieces = batches.epoch(InMemory(weights, np.arange(len(weights))), seed, block)
    return np.bincount(np.concatenate([rows for rows, _ in pieces]), minlength=len(weights))


@given(block=st.integers(1, 9))
def test_weights_are_met_on_average_and_their_whole_part_always(block: int) -> None:
    weights = np.array([0.0, 0.25, 1.0, 2.5])
    counts = np.array([counts_of(weights, seed, block) for seed in range(1500)])
    assert (counts[:, 0] == 0).all()
    assert (counts[:, 2] == 1).all()
    assert set(counts[:, 3]) == {2, 3}
    np.testing.assert_allclose(counts.mean(0), weights, atol=0.06)


@given(block=st.integers(1, 100), seed=st.integers(0, 50))
def test_an_epoch_has_the_same_pairs_whatever_its_blocks(block: int, seed: int) -> None:
    weights = np.random.default_rng(1).uniform(0, 3, 60)
    np.testing.assert_array_equal(counts_of(weights, seed, block), counts_of(weights, seed, 60))


def test_blocks_come_in_another_order_in_every_epoch_and_are_shuffled() -> None:
    pairs = InMemory(np.ones(80), np.arange(80))
    orders = [np.concatenate([rows for rows, _ in batches.epoch(pairs, seed, 10)]) for seed in range(5)]
    assert len({tuple(order // 10) for order in orders}) == 5
    for order in orders:
        assert sorted(order) == list(range(80))
        assert all(len(set(order[i : i + 10] // 10)) == 1 for i in range(0, 80, 10))
        assert not (np.diff(order) == 1).mean() > 0.5


class Recorded(InMemory):
    """Remembers the ranges that are read."""

    def __init__(self, weights: np.ndarray, images: np.ndarray) -> None:
        super().__init__(weights, images)
        object.__setattr__(self, "ranges", [])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self.ranges.append((start, stop))  # type: ignore[attr-defined]
        return super().read(start, stop)


def test_no_more_than_a_block_is_read_at_once_and_no_more_than_is_needed() -> None:
    pairs = Recorded(np.ones(1000), np.arange(1000))
    drawn = list(batches.stream_batches(pairs, 20, 3, 0, block=100))
    assert len(drawn) == 3
    assert {stop - start for start, stop in pairs.ranges} == {100}  # type: ignore[attr-defined]
    assert len(pairs.ranges) == 2  # type: ignore[attr-defined]
    pairs = Recorded(np.ones(1000), np.arange(1000))
    batches.disjoint_batches(pairs, 30, 4, 0, block=100)
    assert pairs.ranges == [(0, 100), (100, 200)]  # type: ignore[attr-defined]


@given(images=image_lists, size=st.integers(2, 8), steps=st.integers(1, 9), seed=st.integers(0, 99))
def test_training_batches_are_full_distinct_and_seeded(
    images: np.ndarray, size: int, steps: int, seed: int
) -> None:
    weights = np.random.default_rng(seed).uniform(0, 3, len(images))
    if len(np.unique(images)) < 2:
        return
    first = list(batches.training_batches(weights, images, size, steps, seed))
    assert len(first) == steps
    by_image = np.bincount(images, weights=weights)
    full = min(size, max(2, int(np.minimum(by_image[np.unique(images)], 1).sum())))
    for block in (len(images), 2 * len(images)):
        again = list(batches.stream_batches(InMemory(weights, images), size, steps, seed, block))
        np.testing.assert_array_equal(first, again)
    for block in (1, 7, 25):
        for batch in batches.stream_batches(InMemory(weights, images), size, steps, seed, block):
            assert len(batch) == full
            assert len(set(images[batch])) == len(batch)
            assert (weights[batch] > 0).all()


def test_an_epoch_of_batches_leaves_out_less_than_a_batch() -> None:
    """Blocks end where they end: what is left of one goes into a batch with the next."""
    pairs, size = InMemory(np.ones(1000), np.arange(1000) // 2), 32
    drawn = Counter(np.concatenate(list(batches.stream_batches(pairs, size, 1000 // size, 0, block=70))))
    assert set(drawn.values()) == {1}
    assert len(drawn) == 1000 // size * size


@given(every=st.integers(1, 12), steps=st.integers(1, 9))
def test_reweighted_batches_are_those_of_the_weights_at_the_time(every: int, steps: int) -> None:
    images, weights = np.arange(40), np.random.default_rng(0).uniform(0.5, 3, 40)
    drawn: list[np.ndarray] = []
    asked: list[int] = []

    def reweigh() -> InMemory:
        """From now on the first twenty pairs only."""
        asked.append(len(drawn))
        return InMemory(np.where(images < 20, weights, 0.0), images)

    pairs = InMemory(weights, images)
    for batch in batches.reweighted_batches(pairs, 5, steps, 3, every=every, reweigh=reweigh):
        drawn.append(batch)
    assert len(drawn) == steps
    assert asked == list(range(every, steps, every))
    plain = list(batches.training_batches(weights, images, 5, steps, 3))
    for before, same in zip(drawn[:every], plain):
        np.testing.assert_array_equal(before, same)
    for after in drawn[every:]:
        assert (after < 20).all()
    if len(asked) > 1:
        assert not np.array_equal(drawn[every], drawn[2 * every])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("block", [64, 1000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_a_small_weighted_set_has_batches_of_which_some_pairs_are_left_out(spread: float, block: int) -> None:
    """Fewer images than a batch: an epoch never holds all of them."""
    weights = np.exp(spread * np.random.default_rng(0).normal(size=300))
    weights /= weights.mean()
    pairs = InMemory(weights, np.arange(300))
    drawn = list(batches.stream_batches(pairs, 512, 50, 0, block))
    assert len(drawn) == 50
    counts = np.bincount(np.concatenate(drawn), minlength=300)
    assert counts[weights < np.quantile(weights, 0.2)].mean() < counts[weights > 1].mean()


@given(images=image_lists, size=st.integers(2, 30), count=st.integers(1, 5), block=st.integers(1, 70))
def test_negative_batches_are_disjoint_with_distinct_images_and_skip_weightless_pairs(
    images: np.ndarray, size: int, count: int, block: int
) -> None:
    weights = (np.arange(len(images)) % 3 > 0).astype(float)
    pairs = InMemory(weights, images)
    if len(np.unique(images[weights > 0])) < 4:
        with pytest.raises(ValueError, match="four or more"):
            batches.disjoint_batches(pairs, size, count, 0, block)
        return
    recorded_batches = batches.disjoint_batches(pairs, size, count, 0, block)
    together = np.concatenate(recorded_batches)
    assert len(recorded_batches) >= 2
    assert len(set(images[together])) == len(together)
    assert (weights[together] > 0).all()
    assert max(map(len, recorded_batches)) <= size
    available = len(np.unique(images[weights > 0]))
    assert len(together) >= min(size * max(2, count), available) - len(recorded_batches) * (size - 1)


def test_negative_batches_are_drawn_by_weight() -> None:
    weights = np.where(np.arange(4000) < 2000, 3.0, 1.0)
    drawn = np.concatenate(batches.disjoint_batches(InMemory(weights, np.arange(4000)), 50, 4, 0))
    assert (drawn < 2000).mean() == pytest.approx(0.75, abs=0.1)


def test_a_set_without_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="two or more"):
        next(batches.training_batches(np.zeros(5), np.arange(5), 2, 1, 0))


def test_images_are_counted_no_further_than_is_needed() -> None:
    pairs = Recorded(np.full(100, 0.5), np.arange(100) // 2)
    assert batches.expected_images(pairs, 1000, 10) == (50, 50)
    pairs = Recorded(np.full(100, 0.5), np.arange(100) // 2)
    assert batches.expected_images(pairs, 12, 10) == (15, 15)
