"""Hashes as random numbers: alike everywhere, and spread as chance would."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core.hashing import fold_of, hashed, uniform

NUMBERS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=50)


@given(NUMBERS, st.integers(0, 2**32))
def test_any_partition_and_order_gives_the_same_numbers(values: list[int], seed: int) -> None:
    array = np.array(values, np.int64)
    whole = hashed(array, seed)
    np.testing.assert_array_equal(whole[::-1], hashed(array[::-1], seed))
    np.testing.assert_array_equal(whole, [hashed(array[i : i + 1], seed)[0] for i in range(len(array))])


def test_numbers_are_those_of_the_published_generator() -> None:
    """The first three outputs of SplitMix64 from state 1234567."""
    from influencespace.core.hashing import _mix

    step = np.uint64(0x9E3779B97F4A7C15)
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * step
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_folds_are_of_like_size_and_independent_of_other_seeds() -> None:
    images = np.arange(50_000)
    first, second = fold_of(images, 5, 0), fold_of(images, 5, 1)
    table = np.zeros((5, 5))
    np.add.at(table, (first, second), 1)
    assert abs(table / 2000 - 1).max() < 0.15  # standard deviation 2.2 %


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    values = uniform(np.arange(100_000), 7)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(np.histogram(values, 10, (0, 1))[0] / 10_000 - 1).max() < 0.05
