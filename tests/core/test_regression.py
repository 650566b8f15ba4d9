"""Regression of influence on quality axes: exact for what it can express, blind to units, fair to the sampling."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core.regression import single_index, standardised


def pool(seed: int, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    axes = np.stack([standardised(column) for column in generator.normal(size=(3, n))], 1)
    return axes, np.sort(generator.choice(n, n // 2, replace=False))


@given(seed=st.integers(0, 2**31))
def test_a_linear_law_is_found_from_some_of_the_pairs(seed: int) -> None:
    axes, rows = pool(seed)
    truth = axes @ np.array([1.0, -0.5, 0.0]) + 0.2
    fitted = single_index(axes, rows, truth[rows], np.ones(len(rows)), 40)
    assert np.corrcoef(fitted, truth)[0, 1] > 0.97
    inner = np.abs(truth - truth.mean()) < 2 * truth.std()  # beyond the outermost centres it is constant
    assert np.abs(fitted - truth)[inner].max() < 0.4


def test_a_bent_law_is_followed() -> None:
    axes, rows = pool(0, 4000)
    index = axes @ np.array([1.0, 1.0, 0.0])
    truth = np.minimum(index, 0.5)
    noise = np.random.default_rng(1).normal(size=len(rows))
    fitted = single_index(axes, rows, truth[rows] + noise, np.ones(len(rows)), 40)
    line = np.polyval(np.polyfit(index, truth, 1), index)
    assert ((fitted - truth) ** 2).mean() < 0.5 * ((line - truth) ** 2).mean()


def test_pairs_that_were_sampled_more_often_do_not_count_more() -> None:
    """Two lines: whoever stands for many pairs decides on the direction."""
    axes, _ = pool(0, 1000)
    many = np.arange(1000) < 900
    truth = np.where(many, axes[:, 0], axes[:, 1])
    rows = np.concatenate([np.flatnonzero(many)[:100], np.flatnonzero(~many)])
    weight = np.where(many[rows], 9.0, 1.0)
    fitted = single_index(axes, rows, truth[rows], weight, 10)
    misled = single_index(axes, rows, truth[rows], np.ones(len(rows)), 10)
    assert np.corrcoef(fitted, axes[:, 0])[0, 1] > 0.9 > np.corrcoef(misled, axes[:, 0])[0, 1]


def test_an_axis_without_spread_says_nothing() -> None:
    axes, rows = pool(0)
    truth = axes[:, 0]
    blind = np.column_stack([axes, np.zeros(len(axes))])
    np.testing.assert_allclose(
        single_index(blind, rows, truth[rows], np.ones(len(rows)), 20),
        single_index(axes, rows, truth[rows], np.ones(len(rows)), 20),
        atol=1e-9,
    )
    np.testing.assert_array_equal(standardised(np.full(5, 3.0)), np.zeros(5))


def test_an_influence_that_is_not_finite_is_refused() -> None:
    axes, rows = pool(0)
    with pytest.raises(ValueError, match="1 of 200 influences are not finite"):
        single_index(axes, rows, np.where(np.arange(200) == 3, np.nan, 1.0), np.ones(200), 20)
