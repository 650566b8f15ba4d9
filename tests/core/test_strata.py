"""Laws of strata: balanced quantiles, means by group, a smoother between line and data, shrinkage between its limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from influencespace.core import strata
from influencespace.core.strata import Means

seeds = st.integers(0, 2**31)


@given(
    quality=st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=80).map(np.array),
    count=st.integers(1, 10),
)
def test_quantiles_are_balanced_and_ordered(quality: np.ndarray, count: int) -> None:
    quantile = strata.quantile_of(quality, count)
    sizes = np.bincount(quantile, minlength=count)
    assert len(sizes) == count
    assert sizes.max() - sizes.min() <= 1
    for low in range(count - 1):
        if sizes[low] and sizes[low + 1]:
            assert quality[quantile == low].max() <= quality[quantile == low + 1].min()


@given(rows=st.integers(0, 90), count=st.integers(1, 12), seed=seeds)
def test_bounds_are_where_quantiles_begin(rows: int, count: int, seed: int) -> None:
    quantile = strata.quantile_of(np.random.default_rng(seed).normal(size=rows), count)
    sizes = np.diff(strata.quantile_bounds(rows, count))
    np.testing.assert_array_equal(sizes, np.bincount(quantile, minlength=count))


def test_no_rows_have_no_quantiles() -> None:
    assert len(strata.quantile_of(np.empty(0), 4)) == 0


@given(stratum=st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array), budget=st.integers(1, 12))
def test_a_sample_is_the_beginning_of_every_stratum(stratum: np.ndarray, budget: int) -> None:
    rows = strata.first_of_each(stratum, budget)
    expected = [row for k in np.unique(stratum) for row in np.flatnonzero(stratum == k)[:budget]]
    assert rows.tolist() == sorted(expected)


@given(group=st.lists(st.integers(0, 5), min_size=2, max_size=50).map(np.array), seed=seeds)
def test_means_by_group_are_numpys(group: np.ndarray, seed: int) -> None:
    values = np.random.default_rng(seed).normal(3, 2, len(group))
    means = strata.means_by(group, values, 7)
    for g in range(7):
        mine = values[group == g]
        assert means.count[g] == len(mine)
        if len(mine) == 0:
            assert np.isnan(means.mean[g])
            assert np.isnan(means.variance[g])
        else:
            assert means.mean[g] == pytest.approx(mine.mean())
        if len(mine) > 1:
            assert means.variance[g] == pytest.approx(mine.var(ddof=1) / len(mine))


def test_a_single_row_has_the_pooled_variance() -> None:
    values = np.array([0.0, 2.0, 5.0, 9.0, 7.0])
    means = strata.means_by(np.array([0, 0, 1, 1, 2]), values, 3)
    within = (2.0 + 8.0) / 2  # sums of squares over the rows less the groups
    assert means.variance[2] == pytest.approx(within)


def test_the_spread_of_repeats_is_the_squared_error_of_their_mean() -> None:
    repeats = np.random.default_rng(0).normal(size=(9, 4))
    np.testing.assert_allclose(strata.spread_of_repeats(repeats), repeats.var(0, ddof=1) / 9)
    np.testing.assert_array_equal(strata.spread_of_repeats(repeats[:1]), np.zeros(4))


@given(slope=st.floats(-3, 3), level=st.floats(-3, 3), count=st.integers(4, 40), noise=st.floats(1e-4, 1))
def test_a_line_stays_a_line(slope: float, level: float, count: int, noise: float) -> None:
    line = level + slope * np.arange(count)
    smoothed = strata.smooth(line, np.full(count, noise))
    np.testing.assert_allclose(smoothed.mean, line, atol=1e-4 * (1 + np.abs(line).max()))


def test_noise_around_a_line_becomes_a_line() -> None:
    generator = np.random.default_rng(0)
    line = np.linspace(-1, 1, 40)
    errors, rough = [], []
    for _ in range(20):
        smoothed = strata.smooth(line + 0.3 * generator.normal(size=40), np.full(40, 0.09))
        errors.append(np.abs(smoothed.mean - line).mean())
        rough.append(smoothed.roughness)
    assert np.mean(errors) < 0.3 / 3  # raw means err by 0.24
    assert np.median(rough) < 0.09 * 1e-2


def test_sharp_means_stay() -> None:
    rough = np.random.default_rng(1).normal(size=20)
    smoothed = strata.smooth(rough, np.full(20, 1e-6))
    np.testing.assert_allclose(smoothed.mean, rough, atol=0.02)


@given(seed=seeds, count=st.integers(4, 30))
def test_smoothing_never_loses_certainty(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    variance = generator.uniform(0.01, 2, count)
    smoothed = strata.smooth(generator.normal(size=count), variance)
    posterior = np.diag(smoothed.covariance)
    assert (posterior > 0).all()
    assert (posterior <= variance * (1 + 1e-6)).all()
    np.testing.assert_allclose(smoothed.covariance, smoothed.covariance.T, atol=1e-8)


def test_three_means_are_too_few_to_smooth() -> None:
    mean, variance = np.array([1.0, -2.0, 3.0]), np.array([0.1, 0.2, 0.3])
    smoothed = strata.smooth(mean, variance)
    np.testing.assert_array_equal(smoothed.mean, mean)
    np.testing.assert_array_equal(np.diag(smoothed.covariance), variance)


@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0])
def test_between_variance_is_recovered(tau: float) -> None:
    generator = np.random.default_rng(0)
    noise = generator.uniform(0.1, 0.4, 4000)
    parent = generator.normal(size=4000)
    mean = parent + tau * generator.normal(size=4000) + np.sqrt(noise) * generator.normal(size=4000)
    leaf = Means(count=np.full(4000, 9), mean=mean, variance=noise)
    assert strata.between_variance(leaf, parent) == pytest.approx(tau**2, rel=0.1, abs=0.02)


def test_leaves_without_any_noise_differ_by_what_they_differ() -> None:
    leaf = Means(count=np.full(3, 4), mean=np.array([1.0, -1.0, 2.0]), variance=np.zeros(3))
    assert strata.between_variance(leaf, np.zeros(3)) == pytest.approx(2.0)


def planted(
    departure: float, noise: float, each: int, seed: int = 0, clusters: int = 3, quantiles: int = 6
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values with true means of strata: a line in the quantile, plus a departure of each cluster."""
    generator = np.random.default_rng(seed)
    truth = np.linspace(-1, 1, quantiles) + departure * generator.normal(size=(clusters, 1))
    cluster, quantile = (x.reshape(-1).repeat(each) for x in np.indices(truth.shape))
    values = truth[cluster, quantile] + noise * generator.normal(size=len(cluster))
    return values, cluster, quantile, truth


def test_without_differences_between_clusters_all_have_the_curve() -> None:
    values, cluster, quantile, _ = planted(departure=0.0, noise=0.0, each=4)
    values += np.tile([-1.0, 1.0], len(values) // 2)  # alike in every stratum
    pooled = strata.pool(values, cluster, quantile, 3, 6)
    assert pooled.shrinkage == 0
    for row in pooled.mean:
        np.testing.assert_allclose(row, pooled.parent.mean)
    for row in pooled.se:
        np.testing.assert_allclose(row**2, np.diag(pooled.parent.covariance))


def test_clusters_that_differ_sharply_keep_their_difference() -> None:
    values, cluster, quantile, truth = planted(departure=5.0, noise=0.01, each=50)
    pooled = strata.pool(values, cluster, quantile, 3, 6)
    np.testing.assert_allclose(pooled.mean, truth, atol=0.05)


def test_shrinkage_errs_less_than_cluster_means_and_the_curve() -> None:
    errors = np.zeros(3)
    for seed in range(30):
        values, cluster, quantile, truth = planted(departure=0.3, noise=2.0, each=8, seed=seed, clusters=12)
        pooled = strata.pool(values, cluster, quantile, 12, 6)
        raw = strata.means_by(cluster, values - pooled.parent.mean[quantile], 12).mean
        candidates = pooled.mean, pooled.parent.mean + raw[:, None], np.tile(pooled.parent.mean, (12, 1))
        errors += [((candidate - truth) ** 2).mean() for candidate in candidates]
    assert errors[0] < 0.97 * errors[1]
    assert errors[0] < 0.97 * errors[2]


@pytest.mark.parametrize("departure", [0.0, 0.5])
def test_a_thousand_clusters_of_a_few_scored_pairs(departure: float) -> None:
    """The variance between clusters is recovered, and standard errors are those of the truth."""
    generator = np.random.default_rng(0)
    effect = departure * generator.normal(size=1000)
    cluster, quantile = generator.integers(0, 900, 5000), generator.integers(0, 20, 5000)
    curve = np.linspace(-1, 1, 20)
    values = curve[quantile] + effect[cluster] + 2 * generator.normal(size=5000)
    pooled = strata.pool(values, cluster, quantile, 1000, 20)
    assert pooled.shrinkage == pytest.approx(departure**2, abs=0.1)
    truth = curve + effect[:, None]
    surprise = (((pooled.mean - truth) / pooled.se) ** 2).mean()
    assert surprise < 1.5
    if departure:
        assert surprise > 0.5
        scored = np.bincount(cluster, minlength=1000) > 3
        assert np.corrcoef(pooled.effect[scored], effect[scored])[0, 1] > 0.4


def test_a_cluster_without_scored_pairs_has_the_curve_with_the_uncertainty_of_both() -> None:
    values, cluster, quantile, _ = planted(departure=1.0, noise=0.1, each=20)
    present = cluster != 1
    pooled = strata.pool(values[present], cluster[present], quantile[present], 3, 6)
    np.testing.assert_allclose(pooled.mean[1], pooled.parent.mean)
    np.testing.assert_allclose(pooled.se[1] ** 2, pooled.shrinkage + np.diag(pooled.parent.covariance))


def test_a_clusters_influence_is_the_mean_of_its_pairs() -> None:
    """Of its pairs' strata, by whatever of it each quantile has; so is what all pairs of a quantile have in common."""
    values, cluster, quantile, truth = planted(departure=2.0, noise=0.05, each=50)
    pooled = strata.pool(values, cluster, quantile, 3, 6)
    count = np.random.default_rng(0).integers(1, 9, (3, 6))
    mean, se = strata.cluster_means(pooled, count, np.zeros(6))
    np.testing.assert_allclose(mean, np.average(pooled.mean, weights=count, axis=1))
    np.testing.assert_allclose(mean, np.average(truth, weights=count, axis=1), atol=0.05)
    common = np.arange(6.0)
    _, wider = strata.cluster_means(pooled, count, common)
    np.testing.assert_allclose(wider**2 - se**2, np.average(np.tile(common, (3, 1)), weights=count, axis=1))


def test_a_cluster_without_scored_pairs_is_less_certain_and_one_without_pairs_has_nothing() -> None:
    values, cluster, quantile, _ = planted(departure=1.0, noise=0.1, each=20)
    pooled = strata.pool(values, cluster, quantile, 5, 6)
    count = np.vstack([np.ones((4, 6), int), np.zeros(6, int)])
    mean, se = strata.cluster_means(pooled, count, np.zeros(6))
    assert mean[3] == pytest.approx(pooled.parent.mean.mean())
    assert se[3] > se[:3].max()
    assert np.isnan(mean[4])


def test_one_cluster_is_the_smoothed_curve() -> None:
    values, _, quantile, _ = planted(departure=1.0, noise=1.0, each=20)
    pooled = strata.pool(values, np.zeros(len(values), np.int64), quantile, 1, 6)
    np.testing.assert_allclose(pooled.mean[0], pooled.parent.mean)


@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_influence_without_any_variance_pools_to_itself(constant: float) -> None:
    _, cluster, quantile, _ = planted(departure=0.0, noise=0.0, each=5)
    pooled = strata.pool(np.full(len(cluster), constant), cluster, quantile, 3, 6)
    np.testing.assert_allclose(pooled.mean, constant, atol=1e-9)
    np.testing.assert_allclose(pooled.se, 0, atol=1e-6)


def test_what_cannot_be_pooled_is_reported() -> None:
    values, cluster, quantile, _ = planted(departure=0.0, noise=1.0, each=5)
    with pytest.raises(ValueError, match="1 of 7 quantiles are empty"):
        strata.pool(values, cluster, quantile, 3, 7)
    values[3] = np.nan
    with pytest.raises(ValueError, match="1 of 90 influences are not finite"):
        strata.pool(values, cluster, quantile, 3, 6)


@given(seed=st.integers(0, 99))
def test_a_sample_stands_for_its_strata(seed: int) -> None:
    generator = np.random.default_rng(seed)
    stratum = generator.integers(0, 4, 60)
    rows = np.flatnonzero(generator.random(60) < 0.2 + 0.2 * stratum)
    values = generator.normal(size=60)
    weight = strata.pairs_stood_for(stratum, rows)
    for one in np.unique(stratum[rows]):
        assert weight[stratum[rows] == one].sum() == pytest.approx((stratum == one).sum())
    np.testing.assert_allclose(strata.pairs_stood_for(stratum, np.arange(60)), 1.0)
    deviation = strata.weighted_deviation(values[rows], weight)
    assert deviation == pytest.approx(np.sqrt(np.cov(values[rows], aweights=weight, bias=True)))
    repeated = np.repeat(values[rows[:5]], [1, 2, 3, 4, 5][: len(rows[:5])])
    assert strata.weighted_deviation(values[rows[:5]], np.arange(1.0, 1 + len(rows[:5]))) == pytest.approx(
        repeated.std()
    )


def test_few_of_many_null_strata_seem_harmful() -> None:
    generator = np.random.default_rng(2)
    harmful = np.arange(1000) < 100
    means = np.where(harmful, -0.8, 0.0) + generator.normal(size=1000) / 8
    found = strata.significantly_below_zero(means, 2 * norm.sf(np.abs(8 * means)), 0.05)
    assert found[harmful].mean() > 0.8
    assert found[~harmful].sum() <= 0.1 * found.sum()
    assert not strata.significantly_below_zero(-means, 2 * norm.sf(np.abs(8 * means)), 0.05)[harmful].any()


def test_strata_that_significantly_help_make_no_others_seem_harmful() -> None:
    generator = np.random.default_rng(3)
    helpful = np.arange(300) < 270
    some = []
    for _ in range(200):
        means = np.where(helpful, 1.0, 0.0) + generator.normal(size=300) / 8
        some.append(strata.significantly_below_zero(means, 2 * norm.sf(np.abs(8 * means)), 0.05).any())
    assert np.mean(some) <= 0.05


def test_a_stratum_without_a_p_value_is_not_harmful() -> None:
    mean, p = np.array([np.nan, -9.0]), np.array([np.nan, 1e-9])
    np.testing.assert_array_equal(strata.significantly_below_zero(mean, p, 0.05), [False, True])
