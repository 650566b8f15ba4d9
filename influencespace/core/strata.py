"""Strata (semantic cluster x quality quantile) and influence pooled over them, with standard errors.

The influence of one pair is a noisy number, its mean over like pairs is not. Influence is a smooth curve along quality, the
same for all clusters, and each cluster departs from it by a random effect (Laird and Ware 1982): empirical Bayes with a normal
prior whose variance is estimated by moments (Morris 1983).
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control

from influencespace.core.arrays import BoolArray, FloatArray, IntArray


def quantile_of(quality: FloatArray, count: int) -> IntArray:
    """Quantile 0 .. count-1 of each row by rank of quality (n,) -> (n,); equal values are ordered by their position."""
    ranks = np.empty(len(quality), np.int64)
    ranks[np.argsort(quality, kind="stable")] = np.arange(len(quality))
    return ranks * count // max(len(quality), 1)


def rank_within(group: IntArray, value: FloatArray) -> IntArray:
    """Place 0, 1, .. of each row among those of its group (n,) by value (n,), the highest first, ties by order: (n,)."""
    order = np.lexsort((-value, group))
    ordered = group[order]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return rank


def quantile_bounds(rows: int, count: int) -> IntArray:
    """How many of a pool's rows lie before each of its quantiles, as `quantile_of` numbers them: (count + 1,)."""
    return -(-np.arange(count + 1) * rows // count)


def first_of_each(stratum: IntArray, budget: int) -> IntArray:
    """The first rows of each stratum (n,), at most so many, sorted: a random sample where rows lie in canonical order."""
    return np.flatnonzero(rank_within(stratum, np.zeros(len(stratum))) < budget)


def pairs_stood_for(stratum: IntArray, rows: IntArray) -> FloatArray:
    """How many pairs of its stratum (n,) each sampled row (m,) stands for: (m,). Strata without any stand for nothing."""
    sampled = stratum[rows]
    everywhere = np.bincount(stratum)
    return everywhere[sampled] / np.bincount(sampled, minlength=len(everywhere))[sampled]


def weighted_deviation(values: FloatArray, weight: FloatArray) -> float:
    """Standard deviation of values (n,) of which each counts by its weight (n,)."""
    mean = np.average(values, weights=weight)
    return float(np.sqrt(np.average((values - mean) ** 2, weights=weight)))


def balance(in_sample: FloatArray, out_of_fold: FloatArray, folds: int) -> FloatArray:
    """T = (1 - a) I_in + a I_out, a = (K - 1) / (2 K): the influence integrated from weight 1 to weight 0."""
    a = (folds - 1) / (2 * folds)
    return (1 - a) * in_sample + a * out_of_fold


@dataclass(frozen=True, kw_only=True)
class Means:
    """Means by group with their squared standard errors; nan where a group is empty."""

    count: IntArray  # (G,)
    mean: FloatArray  # (G,)
    variance: FloatArray  # (G,) squared standard error of the mean


def means_by(group: IntArray, values: FloatArray, groups: int) -> Means:
    """Mean and squared standard error of values (n,) in each of `groups` groups.

    A single row has the pooled variance, which is 0 where no group has two.
    """
    count = np.bincount(group, minlength=groups)
    safe = np.maximum(count, 1)
    mean = np.bincount(group, weights=values, minlength=groups) / safe
    squares = np.bincount(group, weights=(values - mean[group]) ** 2, minlength=groups)
    within = squares.sum() / max(len(values) - (count > 0).sum(), 1)
    spread = np.where(count > 1, squares / np.maximum(count - 1, 1), within)
    mean = np.where(count > 0, mean, np.nan)
    return Means(count=count, mean=mean, variance=np.where(count > 0, spread / safe, np.nan))


def spread_of_repeats(repeats: FloatArray) -> FloatArray:
    """Squared standard error of a mean over repeats (R, G), e.g. target folds or negative batches -> (G,); 0 for one repeat."""
    if len(repeats) < 2:
        return np.zeros(repeats.shape[1])
    spread: FloatArray = repeats.var(axis=0, ddof=1) / len(repeats)
    return spread


def between_variance(leaf: Means, parent_mean: FloatArray) -> float:
    """Variance of true leaf means around their parents, by moments: (L,) leaves -> scalar >= 0.

    Leaves are weighted by their precision, so that tiny leaves do not decide.
    """
    usable = leaf.count > 1
    if usable.sum() < 2:
        return 0.0
    residual = (leaf.mean - parent_mean)[usable]
    noise = leaf.variance[usable]
    if not noise.any():
        return float((residual**2).mean())
    weight = 1 / np.maximum(noise, 1e-12 * noise.max())
    # E[sum w r^2] = sum w (tau^2 + noise) = tau^2 sum w + L
    return float(max(0.0, ((weight * residual**2).sum() - len(residual)) / weight.sum()))


@dataclass(frozen=True, kw_only=True)
class Smoothed:
    """A curve along the quality quantiles: posterior mean and covariance."""

    mean: FloatArray  # (Q,)
    covariance: FloatArray  # (Q, Q)
    roughness: float  # prior variance of a second difference, chosen by likelihood


def smooth(mean: FloatArray, variance: FloatArray) -> Smoothed:
    """Smooth quantile means (Q,) with squared standard errors (Q,) along quality.

    A Bayesian cubic-spline-like smoother: second differences have a normal prior whose variance maximises the restricted
    likelihood (Speed and Yu 1993; Whittaker's smoother with its constant estimated). A straight line where the means
    support no more than that, the means themselves where they are sharp.
    """
    Q = len(mean)
    if Q < 4 or not np.median(variance) > 0:
        return Smoothed(mean=mean, covariance=np.diag(variance), roughness=float("inf"))
    D = np.diff(np.eye(Q), n=2, axis=0)
    precision = np.diag(1 / np.maximum(variance, 1e-12 * variance.max() + np.finfo(np.float64).tiny))
    scale = float(np.median(variance))

    def posterior(roughness: float) -> tuple[float, FloatArray, FloatArray]:
        K = precision + D.T @ D / roughness
        covariance: FloatArray = np.linalg.inv(K).astype(np.float64)
        centre: FloatArray = (covariance @ precision @ mean).astype(np.float64)
        misfit = mean @ precision @ (mean - centre)
        likelihood = -0.5 * (np.linalg.slogdet(K)[1] + (Q - 2) * np.log(roughness) + misfit)
        return float(likelihood), centre, covariance

    # from "a straight line" to "as rough as a thousand times the noise", in steps that likelihood hardly feels
    grid = [scale * 10.0 ** (power / 4) for power in range(-24, 13)]
    roughness = max(grid, key=lambda value: posterior(value)[0])
    _, centre, covariance = posterior(roughness)
    return Smoothed(mean=centre, covariance=covariance, roughness=roughness)


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Influence of every stratum: the smoothed curve over quality, moved by a random effect of its cluster."""

    quantile: Means
    parent: Smoothed
    shrinkage: float  # between-cluster variance tau^2
    effect: FloatArray  # (C,) posterior mean
    effect_variance: FloatArray  # (C,) tau^2 where nothing of the cluster was scored

    @property
    def mean(self) -> FloatArray:
        """(C, Q)"""
        return self.parent.mean + self.effect[:, None]

    @property
    def se(self) -> FloatArray:
        """(C, Q) of the curve's noise and of the cluster's unknown effect."""
        return np.sqrt(np.diag(self.parent.covariance) + self.effect_variance[:, None])


def pool(values: FloatArray, cluster: IntArray, quantile: IntArray, clusters: int, quantiles: int) -> Pooled:
    """Pool the influence (n,) of scored pairs along quality, with clusters as a random effect.

    A cluster departs from the curve by the mean residual of its pairs, shrunken by how many there are; one of which none was
    scored has the curve itself. The spread of single pairs is that of their quantile: two pairs do not know their own.
    Raises ValueError when a whole quantile is empty or a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} influences are not finite")
    by_quantile = means_by(quantile, values, quantiles)
    if (by_quantile.count == 0).any():
        empty_count = int((by_quantile.count == 0).sum())
        raise ValueError(f"{empty_count} of {quantiles} quantiles are empty; use fewer quantiles")
    parent = smooth(by_quantile.mean, by_quantile.variance)
    departure = means_by(cluster, values - parent.mean[quantile], clusters)
    single = (by_quantile.variance * by_quantile.count)[quantile]
    count = np.maximum(departure.count, 1)
    noise = np.bincount(cluster, single, minlength=clusters) / count**2
    known = Means(count=departure.count, mean=departure.mean, variance=noise)
    tau2 = between_variance(known, np.zeros(clusters)) if clusters > 1 else 0.0
    scored = departure.count > 0
    trust = np.where(scored, tau2 / (tau2 + noise), 0.0) if tau2 > 0 else np.zeros(clusters)
    return Pooled(
        quantile=by_quantile,
        parent=parent,
        shrinkage=tau2,
        effect=trust * np.where(scored, departure.mean, 0.0),
        effect_variance=tau2 * (1 - trust),
    )


def cluster_means(
    pooled: Pooled, count: IntArray, common_variance: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Mean influence of each cluster's pairs and its standard error, by how many pairs its strata have (C, Q): two (C,).

    `common_variance` (Q,) is what all pairs of a quantile have in common beside the curve's own noise. A cluster without pairs
    has nan.
    """
    with np.errstate(invalid="ignore"):
        mixture = count / count.sum(1, keepdims=True)
    of_curve = np.einsum("cq,qp,cp->c", mixture, pooled.parent.covariance, mixture)
    variance = of_curve + mixture @ common_variance + pooled.effect_variance
    return mixture @ pooled.parent.mean + pooled.effect, np.sqrt(variance)


def significantly_below_zero(mean: FloatArray, p: FloatArray, rate: float) -> BoolArray:
    """Which means (S,) are below zero at a false discovery rate over all of them: (S,) (Benjamini and Hochberg 1995).

    A stratum without a p-value is not among them. Means above zero are no evidence, however small their p: strata that
    significantly help would otherwise make it easier for others to seem harmful.
    """
    known = np.isfinite(p)
    below = np.zeros(len(p), bool)
    if known.any():
        below[known] = false_discovery_control(np.where(mean[known] < 0, p[known], 1.0)) < rate
    return below
