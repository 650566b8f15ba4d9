"""Laws of strata: balanced quantiles, means by group, a smoother between line and data, shrinkage between its limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_no_rows_have_no_quantiles() -> None:
    assert len(strata.quantile_of(np.empty(0), 4)) == 0


@given(stratum=st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array), budget=st.integers(1, 12))
def test_a_stratified_sample_is_the_beginning_of_every_stratum(stratum: np.ndarray, budget: int) -> None:
    rows = strata.stratified_sample(stratum, budget)
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


def test_a_shared_spread_is_that_of_all_leaves_of_a_quantile() -> None:
    cluster, quantile = np.array([0, 0, 0, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 0, 1, 1])
    values = np.array([1.0, 2.0, 6.0, 4.0, 4.0, 3.0, 9.0])
    leaf = strata.shared_spread(strata.means_by(cluster * 2 + quantile, values, 4), 2)
    spread = 14 / 3  # squares 14 and 0, over 2 + 1 degrees of freedom
    # the second quantile has single pairs alone, and takes the spread of all
    np.testing.assert_allclose(leaf.variance, [spread / 3, spread, spread / 2, spread])


def planted(
    departure: float, noise: float, each: int, seed: int = 0, clusters: int = 3, quantiles: int = 6
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values with true leaf means: a line in the quantile, plus a departure of each leaf."""
    generator = np.random.default_rng(seed)
    truth = np.linspace(-1, 1, quantiles) + departure * generator.normal(size=(clusters, quantiles))
    cluster, quantile = (x.reshape(-1).repeat(each) for x in np.indices(truth.shape))
    values = truth[cluster, quantile] + noise * generator.normal(size=len(cluster))
    return values, cluster, quantile, truth


def test_without_differences_between_clusters_leaves_take_their_parent() -> None:
    values, cluster, quantile, _ = planted(departure=0.0, noise=0.0, each=4)
    values += np.tile([-1.0, 1.0], len(values) // 2)  # alike in every leaf
    pooled = strata.pool(values, cluster, quantile, 3, 6)
    assert pooled.shrinkage == 0
    for row in pooled.mean:
        np.testing.assert_allclose(row, pooled.parent.mean)
    for row in pooled.se:
        np.testing.assert_allclose(row**2, np.diag(pooled.parent.covariance))


def test_sharp_and_different_leaves_keep_their_means() -> None:
    values, cluster, quantile, truth = planted(departure=5.0, noise=0.01, each=50)
    pooled = strata.pool(values, cluster, quantile, 3, 6)
    np.testing.assert_allclose(pooled.mean, truth, atol=0.01)
    np.testing.assert_allclose(pooled.se, 0.01 / np.sqrt(50), rtol=0.5)


def test_shrinkage_errs_less_than_leaf_and_parent() -> None:
    errors = np.zeros(3)
    for seed in range(30):
        values, cluster, quantile, truth = planted(departure=0.3, noise=2.0, each=40, seed=seed)
        pooled = strata.pool(values, cluster, quantile, 3, 6)
        candidates = pooled.mean, pooled.leaf.mean.reshape(3, 6), np.tile(pooled.parent.mean, (3, 1))
        errors += [((candidate - truth) ** 2).mean() for candidate in candidates]
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]


def test_tiny_leaves_do_not_decide() -> None:
    """With two to five pairs a leaf, the means are far from the truth, and some look sharp by chance."""
    generator = np.random.default_rng(0)
    truth = np.tile(np.linspace(-1, 1, 10), (20, 1))
    count = generator.integers(2, 6, truth.shape)
    cluster, quantile = (index.reshape(-1).repeat(count.reshape(-1)) for index in np.indices(truth.shape))
    shrinkage, errors, surprise = [], [], []
    for _ in range(10):
        values = truth[cluster, quantile] + 2 * generator.normal(size=len(cluster))
        pooled = strata.pool(values, cluster, quantile, 20, 10)
        shrinkage.append(pooled.shrinkage)
        errors.append(((pooled.mean - truth) ** 2).mean())
        surprise.append((((pooled.mean - truth) / pooled.se) ** 2).mean())
    assert np.mean(shrinkage) < 0.3  # of a noise of 4; the truth is none
    assert np.mean(errors) < 0.06  # leaf means err by 1.3
    assert np.mean(surprise) < 1.5


def test_copies_of_one_pair_are_not_certain() -> None:
    values, cluster, quantile, truth = planted(departure=0.0, noise=1.0, each=30)
    copies = (cluster == 1) & (quantile == 2)
    values[copies] = 25.0
    count = np.cumsum(copies)
    few = ~copies | (count <= 2)
    pooled = strata.pool(values[few], cluster[few], quantile[few], 3, 6)
    assert pooled.se[1, 2] > 0.5
    others = np.abs(pooled.mean - truth)[0]
    assert others[[0, 1, 3, 4, 5]].max() < 1


def test_an_empty_leaf_takes_its_parent_with_the_uncertainty_of_both() -> None:
    values, cluster, quantile, _ = planted(departure=1.0, noise=0.1, each=20)
    present = ~((cluster == 1) & (quantile == 2))
    pooled = strata.pool(values[present], cluster[present], quantile[present], 3, 6)
    assert pooled.mean[1, 2] == pytest.approx(pooled.parent.mean[2])
    assert pooled.se[1, 2] ** 2 == pytest.approx(pooled.shrinkage + pooled.parent.covariance[2, 2])


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
