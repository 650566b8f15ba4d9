"""Laws of group means shrunken for chance, and of disadvantage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core.fairness import disadvantage, group_means, shrunken_group_means

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
