"""When enough pairs of a stratum have been scored: anytime-valid p-values of its mean, for any number of interim analyses.

A confidence interval that is checked until it excludes zero excludes it sooner or later by chance (unadjusted interim analyses
at 95 % decide a third of null strata wrongly). A confidence sequence holds at all sample sizes at once: Robbins' normal
mixture, asymptotic in the sense of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024), equation 9,

    mean_t +- sd sqrt( 2 (t rho^2 + 1) / (t^2 rho^2) log( sqrt(t rho^2 + 1) / alpha ) ).
"""

import numpy as np
from scipy.stats import false_discovery_control

from influencespace.core.arrays import BoolArray, FloatArray, IntArray


def tightest_at(count: float, alpha: float) -> float:
    """The rho whose sequence is narrowest at `count` pairs (the same, equation 10, to first order)."""
    bound = -2 * np.log(alpha)
    return float(np.sqrt((bound + np.log(bound) + 1) / count))


def anytime_p(mean: FloatArray, spread: FloatArray, count: FloatArray, rho: float) -> FloatArray:
    """The smallest alpha whose sequence excludes zero: means (S,) of `count` (S,) values, nan without any -> (S,) at most 1."""
    grown = count * rho**2 + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        z = mean / spread
        p = np.sqrt(grown) * np.exp(-((z * count * rho) ** 2) / (2 * grown))
    return np.where(np.isfinite(mean), np.minimum(np.nan_to_num(p, nan=1.0), 1.0), np.nan)


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


def next_sample_size(scored: IntArray, size: IntArray, p: FloatArray, alpha: float, limit: int) -> IntArray:
    """Pairs of each stratum to score before the next interim analysis (S,): twice as many while zero is not excluded.

    Never more than `limit`, nor than its `size` (S,); a decided stratum stays as it is.
    """
    undecided = ~(p < alpha)  # nan is undecided
    return np.where(undecided, np.minimum(np.minimum(2 * scored, limit), size), scored)
