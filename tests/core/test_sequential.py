"""Interim analyses cost nothing: a null mean is ever excluded in at most a share alpha of the cases, a real one soon."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core.sequential import anytime_p, next_sample_size, significantly_below_zero, tightest_at

ALPHA = 0.05


def half_width(count: np.ndarray, spread: np.ndarray, alpha: float, rho: float) -> np.ndarray:
    """Of the sequence, as it is printed."""
    grown = count * rho**2 + 1
    return spread * np.sqrt(2 * grown / (count**2 * rho**2) * np.log(np.sqrt(grown) / alpha))


def test_a_null_mean_is_excluded_at_any_time_in_at_most_a_share_alpha() -> None:
    values = np.random.default_rng(0).normal(size=(2000, 1000))
    count = np.arange(1.0, 1001.0)
    means = values.cumsum(1) / count
    rho = tightest_at(64, ALPHA)
    late = slice(31, None)  # of known variance here, so the sequence holds from the start as well
    excluded = (anytime_p(means, np.ones(1000), count, rho) < ALPHA)[:, late].any(1).mean()
    naive = (np.abs(means) > 1.96 / np.sqrt(count))[:, late].any(1).mean()
    assert excluded <= ALPHA
    assert naive > 0.2


def test_a_real_mean_is_excluded_soon() -> None:
    values = 0.5 + np.random.default_rng(1).normal(size=(500, 400))
    count = np.arange(1.0, 401.0)
    p = anytime_p(values.cumsum(1) / count, np.ones(400), count, tightest_at(64, ALPHA))
    assert np.median((p < ALPHA).argmax(1)) < 60


@given(
    count=st.integers(1, 10_000),
    spread=st.floats(0.01, 100),
    mean=st.floats(-10, 10),
    first=st.integers(2, 500),
)
def test_the_p_value_is_the_alpha_at_which_the_sequence_touches_zero(
    count: int, spread: float, mean: float, first: int
) -> None:
    rho = tightest_at(first, ALPHA)
    t, sd = np.array([float(count)]), np.array([spread])
    p = anytime_p(np.array([mean]), sd, t, rho)
    assert 0 <= p[0] <= 1
    if 1e-200 < p[0] < 1:
        np.testing.assert_allclose(half_width(t, sd, float(p[0]), rho), abs(mean), rtol=1e-6)


def test_the_sequence_is_narrowest_at_the_sample_size_it_was_made_for() -> None:
    t, sd = np.array([64.0]), np.array([1.0])
    widths = [half_width(t, sd, ALPHA, tightest_at(first, ALPHA))[0] for first in (4, 16, 64, 256, 1024)]
    assert min(widths) == widths[2]


def test_only_undecided_strata_get_more_pairs() -> None:
    p = np.array([0.001, 0.5, 0.5, 0.5, np.nan])
    scored, size = np.array([8, 8, 8, 8, 0]), np.array([100, 100, 10, 100, 0])
    np.testing.assert_array_equal(next_sample_size(scored, size, p, ALPHA, 12), [8, 12, 10, 12, 0])


def test_a_stratum_without_pairs_has_no_p_value() -> None:
    p = anytime_p(np.array([np.nan, -9.0]), np.ones(2), np.array([0.0, 9.0]), 0.3)
    assert np.isnan(p[0])
    assert p[1] < 1e-9
    np.testing.assert_array_equal(significantly_below_zero(np.array([np.nan, -9.0]), p, 0.05), [False, True])


def test_few_of_many_null_strata_seem_harmful() -> None:
    generator = np.random.default_rng(2)
    count, harmful = np.full(1000, 64.0), np.arange(1000) < 100
    means = np.where(harmful, -0.8, 0.0) + generator.normal(size=1000) / 8
    found = significantly_below_zero(
        means, anytime_p(means, np.ones(1000), count, tightest_at(64, ALPHA)), 0.05
    )
    assert found[harmful].mean() > 0.8
    assert found[~harmful].sum() <= 0.05 * found.sum()
    assert not significantly_below_zero(-means, anytime_p(means, np.ones(1000), count, 0.3), 0.05)[
        harmful
    ].any()


def test_strata_that_significantly_help_make_no_others_seem_harmful() -> None:
    generator = np.random.default_rng(3)
    count, helpful = np.full(300, 64.0), np.arange(300) < 270
    rho = tightest_at(64, ALPHA)
    some = []
    for _ in range(200):
        means = np.where(helpful, 1.0, 0.0) + generator.normal(size=300) / 8
        some.append(significantly_below_zero(means, anytime_p(means, np.ones(300), count, rho), ALPHA).any())
    assert np.mean(some) <= ALPHA


def test_a_smaller_alpha_needs_more_pairs() -> None:
    assert tightest_at(64, 0.01) > tightest_at(64, 0.05) > tightest_at(640, 0.05)
    assert tightest_at(64, 0.05) == pytest.approx(np.sqrt((5.991 + np.log(5.991) + 1) / 64), rel=1e-3)
