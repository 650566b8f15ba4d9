"""Laws of batches and negative batches: one pair an image, nothing lost, weights respected."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core import batches

image_lists = st.lists(st.integers(0, 12), min_size=2, max_size=60).map(lambda x: np.array(x, np.int64))


@given(images=image_lists, size=st.integers(1, 20))
def test_batches_cut_an_order_without_loss_and_without_repeated_images(images: np.ndarray, size: int) -> None:
    order = np.random.default_rng(0).permutation(len(images))
    cut = list(batches.one_pair_an_image(order, images, size))
    assert sorted(np.concatenate(cut)) == list(range(len(images)))
    for batch in cut:
        assert 0 < len(batch) <= size
        assert len(set(images[batch])) == len(batch)


def test_weights_are_met_on_average_and_their_whole_part_always() -> None:
    weights = np.array([0.0, 0.25, 1.0, 2.5])
    counts = np.array(
        [
            np.bincount(batches.weighted_order(weights, np.random.default_rng(s)), minlength=4)
            for s in range(2000)
        ]
    )
    assert (counts[:, 0] == 0).all()
    assert (counts[:, 2] == 1).all()
    assert set(counts[:, 3]) == {2, 3}
    np.testing.assert_allclose(counts.mean(0), weights, atol=0.05)


@given(images=image_lists, size=st.integers(2, 8), steps=st.integers(1, 9), seed=st.integers(0, 99))
def test_training_batches_are_full_distinct_and_seeded(
    images: np.ndarray, size: int, steps: int, seed: int
) -> None:
    weights = np.random.default_rng(seed).uniform(0, 3, len(images))
    if len(np.unique(images)) < 2:
        return
    first = list(batches.training_batches(weights, images, size, steps, seed))
    again = list(batches.training_batches(weights, images, size, steps, seed))
    assert len(first) == steps
    by_image = np.bincount(images, weights=weights)
    full = min(size, max(2, int(np.minimum(by_image[np.unique(images)], 1).sum())))
    for batch, same in zip(first, again):
        np.testing.assert_array_equal(batch, same)
        assert len(batch) == full
        assert len(set(images[batch])) == len(batch)


@given(every=st.integers(1, 12), steps=st.integers(1, 9))
def test_reweighted_batches_are_those_of_the_weights_at_the_time(every: int, steps: int) -> None:
    images, weights = np.arange(40), np.random.default_rng(0).uniform(0.5, 3, 40)
    drawn: list[np.ndarray] = []
    asked: list[int] = []

    def reweigh() -> np.ndarray:
        """From now on the first twenty pairs only."""
        asked.append(len(drawn))
        return np.where(images < 20, weights, 0.0)

    for batch in batches.reweighted_batches(weights, images, 5, steps, 3, every=every, reweigh=reweigh):
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
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_a_small_weighted_set_has_batches_of_which_some_pairs_are_left_out(spread: float) -> None:
    """Fewer images than a batch: an epoch never holds all of them."""
    weights = np.exp(spread * np.random.default_rng(0).normal(size=300))
    weights /= weights.mean()
    drawn = list(batches.training_batches(weights, np.arange(300), 512, 50, 0))
    assert len(drawn) == 50
    counts = np.bincount(np.concatenate(drawn), minlength=300)
    assert counts[weights < np.quantile(weights, 0.2)].mean() < counts[weights > 1].mean()


@given(images=image_lists, size=st.integers(2, 30), count=st.integers(1, 5))
def test_negative_batches_are_disjoint_with_distinct_images_and_skip_weightless_pairs(
    images: np.ndarray, size: int, count: int
) -> None:
    weights = (np.arange(len(images)) % 3 > 0).astype(float)
    if len(np.unique(images[weights > 0])) < 4:
        with pytest.raises(ValueError, match="four or more"):
            batches.disjoint_batches(images, size, count, 0, weights)
        return
    recorded_batches = batches.disjoint_batches(images, size, count, 0, weights)
    together = np.concatenate(recorded_batches)
    assert len(recorded_batches) >= 2
    assert len(set(images[together])) == len(together)
    assert (weights[together] > 0).all()
    assert max(map(len, recorded_batches)) <= size


def test_a_set_without_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="two or more"):
        next(batches.training_batches(np.zeros(5), np.arange(5), 2, 1, 0))
