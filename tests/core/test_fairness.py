"""Laws of group means shrunken for chance, of disadvantage and of floors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core.fairness import disadvantage, group_means, shrunken_group_means, with_floors
from influencespace.errors import InputError

seeds = st.integers(0, 10_000)


def grouped(seed: int, n: int = 60, groups: int = 3) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng, np.concatenate([np.arange(groups), rng.integers(0, groups, n - groups)])


@given(seed=seeds)
def test_shrunken_means_lie_between_the_groups_and_the_whole(seed: int) -> None:
    rng, group = grouped(seed)
    values = rng.normal(size=60) + group * rng.normal()
    own, found = group_means(values, group), shrunken_group_means(values, group)
    low, high = np.minimum(own, values.mean()), np.maximum(own, values.mean())
    assert ((found >= low - 1e-12) & (found <= high + 1e-12)).all()


def test_sharp_means_are_hardly_shrunken_and_noise_is() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 200)
    apart = group + 0.01 * rng.normal(size=600)
    np.testing.assert_allclose(shrunken_group_means(apart, group), [0, 1, 2], atol=1e-2)
    noise = rng.normal(size=600)
    spread = [np.ptp(f(noise, group)) for f in (shrunken_group_means, group_means)]
    assert spread[0] < 0.5 * spread[1]


@given(seed=seeds, floor=st.floats(0, 1))
def test_each_group_keeps_its_floor_and_no_more_is_brought_back(seed: int, floor: float) -> None:
    rng, group = grouped(seed)
    kept, score = rng.random(60) < 0.3, rng.normal(size=60).round(1)
    found = with_floors(kept, score, group, floor)
    assert (found >= kept).all()
    for g in range(3):
        rows = group == g
        n, before, after = rows.sum(), kept[rows].sum(), found[rows].sum()
        assert after >= floor * n - 1e-6
        assert after == before or after - 1 < floor * n
        back, pruned = found & ~kept & rows, ~found & rows
        if back.any() and pruned.any():
            assert score[back].min() >= score[pruned].max()


@given(seed=seeds)
def test_no_floor_changes_nothing_and_a_whole_one_keeps_all(seed: int) -> None:
    rng, group = grouped(seed)
    kept, score = rng.random(60) < 0.3, rng.normal(size=60)
    np.testing.assert_array_equal(with_floors(kept, score, group, 0.0), kept)
    assert with_floors(kept, score, group, 1.0).all()


@pytest.mark.parametrize("floor", [-0.1, 1.5, float("nan")])
def test_a_floor_that_is_no_share_says_so(floor: float) -> None:
    with pytest.raises(InputError, match="from 0 to 1"):
        with_floors(np.ones(2, bool), np.zeros(2), np.zeros(2), floor)


def test_disadvantage_counts_groups_above_the_mean_by_how_far_they_are():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 1000)
    loss = np.array([1.0, 2.0, 4.5])[group] + 0.1 * rng.normal(size=3000)
    share = disadvantage(loss, group)
    np.testing.assert_allclose(share, [0, 0, 1], atol=1e-12)
    loss = np.array([1.0, 4.0, 7.0])[group] + 0.1 * rng.normal(size=3000)
    loss[group == 1] += 0.5
    share = disadvantage(loss, group)
    assert share.sum() == pytest.approx(1)
    assert share[0] == 0
    assert share[2] / share[1] == pytest.approx((7 - loss.mean()) / (4.5 - loss.mean()), rel=0.1)


def test_a_difference_by_chance_disadvantages_hardly_anybody():
    rng = np.random.default_rng(0)
    group = np.arange(100) % 2
    blamed = [disadvantage(rng.normal(size=100), group).any() for _ in range(300)]
    raw = [np.ptp(group_means(rng.normal(size=100), group)) > 0 for _ in range(300)]
    assert np.mean(blamed) < 0.25 < np.mean(raw)
