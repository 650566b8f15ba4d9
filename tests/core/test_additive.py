"""A sum of curves: exact where there is no noise, silent where there is nothing, honest about its errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core.additive import curve_along, design, fit_additive

seeds = st.integers(0, 2**31)


def pool(seed: int, n: int = 600, axes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, axes)), np.sort(generator.choice(n, n // 2, replace=False))


def fitted(axes: np.ndarray, rows: np.ndarray, influence: np.ndarray, quantiles: int = 12) -> np.ndarray:
    return fit_additive(axes[rows], influence, quantiles).predict(axes)[0]


@given(seed=seeds)
def test_lines_are_found_from_some_of_the_pairs(seed: int) -> None:
    axes, rows = pool(seed)
    truth = axes @ np.array([1.0, -0.5, 0.0]) + 0.2
    inner = (np.abs(axes) < 1.5).all(1)  # beyond the outermost knots a curve is constant
    # knots lie at quantiles, between which a line along the axis is no line along the knots: small bends are left
    assert np.abs(fitted(axes, rows, truth[rows]) - truth)[inner].max() < 0.3


def test_a_bend_along_one_axis_and_a_slope_along_another_are_kept_apart() -> None:
    axes, rows = pool(0, 8000)
    truth = np.minimum(axes[:, 0], 0) + 0.3 * axes[:, 1]
    noise = np.random.default_rng(1).normal(size=len(rows))
    model = fit_additive(axes[rows], truth[rows] + noise, 20)
    found = model.predict(axes)[0]
    assert ((found - truth) ** 2).mean() < 0.02 * truth.var()
    assert model.freedom[2] < 1.0 < model.freedom[0]


def test_noise_alone_moves_no_pair_far() -> None:
    axes, rows = pool(3, 8000)
    influence = np.random.default_rng(2).normal(size=len(rows))
    model = fit_additive(axes[rows], influence, 20)
    mean, se = model.predict(axes)
    assert np.abs(mean - influence.mean()).max() < 0.15
    assert model.freedom.sum() < 4
    assert (se >= 1 / np.sqrt(len(rows)) * 0.95).all()  # the mean is known no better than that


def test_standard_errors_are_those_of_repeated_samples() -> None:
    axes, rows = pool(4, 2000, 2)
    truth = np.sin(axes[:, 0])
    hits = []
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(size=len(rows))
        mean, se = fit_additive(axes[rows], truth[rows] + noise, 15).predict(axes)
        hits.append((np.abs(mean - truth) < 1.96 * se).mean())
    assert 0.88 < np.mean(hits) < 0.995


@given(seed=seeds)
def test_units_and_order_do_not_matter(seed: int) -> None:
    axes, rows = pool(seed, 300)
    influence = axes[rows] @ np.array([1.0, 0.5, 0.0]) + np.random.default_rng(seed).normal(size=len(rows))
    first = fitted(axes, rows, influence)
    np.testing.assert_allclose(fitted(axes, rows, 1e-3 * influence), 1e-3 * first, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(fitted(1e3 * axes - 5, rows, influence), first, rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(seed).permutation(len(rows))
    np.testing.assert_allclose(fitted(axes, rows[order], influence[order]), first, rtol=1e-4, atol=1e-5)


def test_what_is_unknown_says_nothing() -> None:
    axes, rows = pool(0, 2000)
    truth = axes[:, 0]
    unknown = np.column_stack([axes, np.full(len(axes), np.nan)])
    np.testing.assert_array_equal(fitted(unknown, rows, truth[rows]), fitted(axes, rows, truth[rows]))
    partly = axes.copy()
    partly[::3, 1] = np.nan
    assert np.corrcoef(fitted(partly, rows, truth[rows]), truth)[0, 1] > 0.98


@pytest.mark.parametrize("values", [np.full(9, 4.0), np.full(9, np.nan), np.repeat([0.0, 1.0], 5)])
def test_an_axis_of_few_values_has_as_few_knots(values: np.ndarray) -> None:
    curve = curve_along(values, 20)
    known = len(np.unique(values[np.isfinite(values)]))
    assert len(curve.knots) == known
    assert design([curve], values[:, None]).shape == (len(values), max(known, 1))


def test_two_kinds_of_pairs_are_two_levels() -> None:
    """An axis of two values is a step between them, as caption frequency is where boilerplate has been put in."""
    generator = np.random.default_rng(0)
    kind = (generator.random(4000) < 0.3).astype(float)
    influence = np.where(kind > 0, -0.2, 0.1) + generator.normal(size=4000)
    mean, se = fit_additive(kind[:, None], influence, 20).predict(kind[:, None])
    assert mean[kind > 0].mean() == pytest.approx(influence[kind > 0].mean(), abs=0.03)
    assert (mean + 2 * se < 0)[kind > 0].all()
    assert (mean - 2 * se > 0)[kind == 0].all()


@pytest.mark.parametrize("pairs", [8, 12, 20])
def test_few_pairs_are_not_interpolated(pairs: int) -> None:
    found = []
    for seed in range(30):
        generator = np.random.default_rng(seed)
        axes, noise = generator.normal(size=(pairs, 4)), generator.normal(size=pairs)
        mean, se = fit_additive(axes, noise, 20).predict(axes)
        found.append((np.corrcoef(mean, noise)[0, 1] if np.ptp(mean) > 0 else 0.0, np.median(se)))
    correlation, error = np.median(found, 0)
    assert error > 0.1
    if pairs > 8:
        assert correlation < 0.8


@pytest.mark.parametrize("counted", [False, True])
def test_standard_errors_hold_where_some_strata_were_sampled_eight_times_as_often(counted: bool) -> None:
    generator = np.random.default_rng(0)
    axes = generator.normal(size=(20_000, 2))
    share = np.where(axes[:, 0] > 0, 0.16, 0.02)
    hits = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        rows = np.flatnonzero(draw.random(20_000) < share)
        stands_for = 1 / share[rows] if counted else None
        mean, se = fit_additive(axes[rows], draw.normal(size=len(rows)), 20, stands_for).predict(axes)
        hits.append((np.abs(mean) < 1.96 * se).mean())
    assert np.mean(hits) > 0.88


def test_pairs_that_stand_for_many_count_for_many() -> None:
    """A harmful half of the pool, of which few pairs are scored and which no axis tells apart."""
    generator = np.random.default_rng(0)
    harmful = np.arange(20_000) < 10_000
    axes, share = generator.normal(size=(20_000, 1)), np.where(harmful, 0.02, 0.4)
    found = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        rows = np.flatnonzero(draw.random(20_000) < share)
        influence = np.where(harmful[rows], -0.4, 0.2) + draw.normal(size=len(rows))
        mean, se = fit_additive(axes[rows], influence, 20, 1 / share[rows]).predict(axes)
        found.append((mean.mean(), se.mean()))
    mean, se = np.array(found).T
    assert mean.mean() == pytest.approx(-0.1, abs=0.03)
    assert 0.6 < se.mean() / mean.std() < 2
    assert (
        fitted(axes, rows, influence).mean() > 0.1
    )  # uncounted, the half that was scored more often decides


def test_a_pair_that_stands_for_nearly_all_makes_nothing_sure() -> None:
    hits = []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        axes, stands_for = draw.normal(size=(50, 1)), np.where(np.arange(50) == 7, 1000.0, 1.0)
        mean, se = fit_additive(axes, draw.normal(size=50), 20, stands_for).predict(axes)
        hits.append(abs(mean.mean()) < 1.96 * se.mean())
    assert np.mean(hits) > 0.9


@pytest.mark.parametrize("pairs", [5, 20])
def test_without_an_axis_the_error_is_that_of_a_mean(pairs: int) -> None:
    draws = [np.random.default_rng(seed).normal(size=pairs) for seed in range(200)]
    found = [fit_additive(np.ones((pairs, 1)), y, 20).predict(np.ones((1, 1))) for y in draws]
    assert np.mean([se[0] ** 2 for _, se in found]) == pytest.approx(1 / pairs, rel=0.15)


@given(seed=seeds)
def test_only_ratios_of_what_pairs_stand_for_matter(seed: int) -> None:
    axes, rows = pool(seed)
    influence = axes[rows, 0] + np.random.default_rng(seed).normal(size=len(rows))
    mean, se = fit_additive(axes[rows], influence, 12).predict(axes)
    for many in (1.0, 7.0):
        again = fit_additive(axes[rows], influence, 12, np.full(len(rows), many)).predict(axes)
        np.testing.assert_allclose(again, (mean, se), rtol=1e-6, atol=1e-9)


def test_an_influence_that_is_not_finite_is_refused() -> None:
    axes, rows = pool(0)
    with pytest.raises(ValueError, match="1 of 300 influences are not finite"):
        fitted(axes, rows, np.where(np.arange(300) == 3, np.nan, 1.0))
