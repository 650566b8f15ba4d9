"""When enough pairs of a stratum have been scored: anytime-valid p-values of its mean, however often one looks.

A confidence interval that is looked at until it excludes zero excludes it sooner or later by chance (naive looks at 95 %
decide a third of null strata wrongly). A confidence sequence holds at all sample sizes at once: Robbins' normal mixture,
asymptotic in the sense of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024), equation 9,

    mean_t +- sd sqrt( 2 (t rho^2 + 1) / (t^2 rho^2) log( sqrt(t rho^2 + 1) / alpha ) ).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def tightest_at(count: float, level: float) -> float:
    """The rho whose sequence is narrowest at `count` pairs (the same, equation 10, to first order)."""
    wanted = -2 * np.log(level)
    return float(np.sqrt((wanted + np.log(wanted) + 1) / count))


def anytime_p(mean: FloatArray, spread: FloatArray, count: FloatArray, rho: float) -> FloatArray:
    """The smallest level whose sequence excludes zero: means (S,) of `count` (S,) values, nan without any -> (S,) at most 1."""
    grown = count * rho**2 + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        z = mean / spread
        p = np.sqrt(grown) * np.exp(-((z * count * rho) ** 2) / (2 * grown))
    found: FloatArray = np.where(np.isfinite(mean), np.minimum(np.nan_to_num(p, nan=1.0), 1.0), np.nan)
    return found


def surely_below_zero(mean: FloatArray, p: FloatArray, rate: float) -> NDArray[np.bool_]:
    """Which means (S,) are below zero at a false discovery rate over all of them: (S,) (Benjamini and Hochberg 1995).

    A stratum without a p-value is not among them. Means above zero say nothing of this, however small their p: those that
    surely help would else make it easier for the rest to seem harmful.
    """
    known = np.isfinite(p)
    found = np.zeros(len(p), bool)
    if known.any():
        found[known] = false_discovery_control(np.where(mean[known] < 0, p[known], 1.0)) < rate
    return found


def next_look(looked: IntArray, size: IntArray, p: FloatArray, level: float, budget: int) -> IntArray:
    """How many pairs of each stratum are to be scored after another look (S,): twice as many while zero is not excluded.

    Never more than `budget`, nor than its `size` (S,); a stratum that is decided stays as it is.
    """
    undecided = ~(p < level)  # nan is undecided
    return np.where(undecided, np.minimum(np.minimum(2 * looked, budget), size), looked)
