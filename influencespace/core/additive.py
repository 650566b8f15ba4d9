"""Influence as a sum of smooth curves, one along each axis of quality, each as strong as the scored pairs support.

influence_z = mean + sum_a f_a(axis_a of z) + noise (a generalised additive model, Hastie and Tibshirani 1986). f_a is
piecewise linear between quantiles of its axis. Its slope and its bends have normal priors of their own, so that an axis
without information is shrunken to nothing (Marra and Wood 2011). The variances of the priors maximise the evidence
(MacKay 1992).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.strata import weighted_deviation

CHUNK = 65_536  # pairs whose design is in memory at once
PAIRS_PER_KNOT = 10
ROUNDS = 100  # of the evidence's fixed point; ten to forty are enough where axes are informative
SETTLED = 1e-3  # relative change of every variance
MIN_VARIANCE = 1e-6  # of the influences' variance: no prior and no noise is narrower, which keeps the solve well conditioned


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The values that one axis can take: knots at its quantiles, and a basis over them without a constant."""

    knots: FloatArray  # (Q,) rising
    basis: FloatArray  # (Q, Q - 1): the slope, then bends

    def design(self, values: FloatArray) -> FloatArray:
        """The basis at each value, linear between knots and constant beyond them; zeros for nan: (n,) -> (n, Q - 1)."""
        if len(self.knots) < 2:
            return np.zeros((len(values), 0))
        known = np.isfinite(values)
        place = np.interp(np.where(known, values, self.knots[0]), self.knots, np.arange(len(self.knots)))
        left = np.minimum(place.astype(np.int64), len(self.knots) - 2)
        share = (place - left)[:, None]
        rows: FloatArray = (1 - share) * self.basis[left] + share * self.basis[left + 1]
        return rows * known[:, None]


def curve_along(values: FloatArray, quantiles: int) -> Curve:
    """Knots at `quantiles` equally populated places of an axis (n,), nan where it is unknown; fewer where values are equal."""
    known = values[np.isfinite(values)]
    knots = (
        np.unique(np.quantile(known, np.linspace(0, 1, quantiles), method="nearest")) if len(known) else known
    )
    count = len(knots)
    if count < 2:
        return Curve(knots=knots, basis=np.zeros((count, 0)))
    slope = np.linspace(-1, 1, count)[:, None] * np.sqrt(3)
    # unit variance for every second difference: the bends that these see, and nothing of slope or constant
    bends = np.linalg.pinv(np.diff(np.eye(count), n=2, axis=0)) if count > 2 else np.zeros((count, 0))
    return Curve(knots=knots, basis=np.hstack([slope, bends]))


@dataclass(frozen=True, kw_only=True)
class Additive:
    """The fitted sum of curves."""

    curves: Sequence[Curve]
    coefficients: FloatArray  # (p,) the mean, then those of every curve
    covariance: FloatArray  # (p, p) of their errors
    freedom: FloatArray  # (A,) effective degrees of freedom of each axis: 0 for one without information

    def predict(self, axes: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean influence and its standard error for pairs by their axes (n, A): (n,), (n,)."""
        root = _root(self.covariance)
        mean, se = np.empty(len(axes)), np.empty(len(axes))
        for start in range(0, len(axes), CHUNK):
            rows = slice(start, start + CHUNK)
            X = design(self.curves, axes[rows])
            mean[rows], se[rows] = X @ self.coefficients, np.sqrt(((X @ root) ** 2).sum(1))
        return mean, se


def design(curves: Sequence[Curve], axes: FloatArray) -> FloatArray:
    """A column of ones, then the bases of all curves at the pairs' axes (n, A): (n, p)."""
    bases = [curve.design(values) for curve, values in zip(curves, axes.T, strict=True)]
    return np.hstack([np.ones((len(axes), 1)), *bases])


def fit_additive(
    axes: FloatArray, influence: FloatArray, quantiles: int, stands_for: FloatArray | None = None
) -> Additive:
    """Fit the influence (m,) of scored pairs, whose axes are (m, A).

    Each scored pair counts for the pairs of the pool that it `stands_for` (m,), one by default: otherwise strata that were
    sampled less often would count too little. Evidence is that of as many equal weights as have this spread (Kish 1965), and
    errors are those of a weighted sum of single pairs (Huber 1967), so that few pairs that stand for many do not look like many.
    Curves have at most `quantiles` knots and at least ten pairs for each, so that noise is not interpolated. An axis that is
    nan for a pair is left out for it. Raises ValueError when an influence is not finite.
    """
    if not np.isfinite(influence).all():
        wrong = int((~np.isfinite(influence)).sum())
        raise ValueError(f"{wrong} of {len(influence)} influences are not finite")
    stands_for = np.ones(len(axes)) if stands_for is None else stands_for
    weight = stands_for * stands_for.sum() / (stands_for @ stands_for)
    knots = min(quantiles, max(2, int(weight.sum()) // PAIRS_PER_KNOT))
    curves = [curve_along(values, knots) for values in axes.T]
    group = _groups(curves)
    gram, moment, square = _sums(curves, axes, influence, weight)
    precision, noise = _evidence(gram, moment, square, group, weight, weighted_deviation(influence, weight))
    covariance = np.linalg.inv(gram[1] / noise + np.diag(precision))
    # of the noise of the weighted sum, and of what the priors hold back
    errors = covariance @ (gram[2] / noise + np.diag(precision)) @ covariance
    axis_of = np.concatenate([[0], *([a + 1] * c.basis.shape[1] for a, c in enumerate(curves))]).astype(int)
    shrink = 1 - np.diag(covariance) * precision
    freedom = np.bincount(axis_of, weights=shrink, minlength=len(curves) + 1)[1:].astype(np.float64)
    return Additive(
        curves=curves, coefficients=covariance @ moment[1] / noise, covariance=errors, freedom=freedom
    )


def _sums(
    curves: Sequence[Curve], axes: FloatArray, influence: FloatArray, weight: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Sums in which each pair counts once, by its weight, and by its square: X^T X (3, p, p), X^T y (2, p), y^2 (2,)."""
    size = 1 + sum(curve.basis.shape[1] for curve in curves)
    gram, moment, square = np.zeros((3, size, size)), np.zeros((2, size)), np.zeros(2)
    for start in range(0, len(axes), CHUNK):
        some = slice(start, start + CHUNK)
        X, y, w = design(curves, axes[some]), influence[some], weight[some]
        for power in range(3):
            gram[power] += (X * w[:, None] ** power).T @ X
        for power in range(2):
            moment[power] += X.T @ (w**power * y)
            square[power] += w**power @ y**2
    return gram, moment, square


def _evidence(
    gram: FloatArray,
    moment: FloatArray,
    square: FloatArray,
    group: IntArray,
    weight: FloatArray,
    deviation: float,
) -> tuple[FloatArray, float]:
    """The priors' precisions (p,) and the variance of the noise that maximise the evidence, by MacKay's fixed point."""
    counts, groups = np.array([len(weight), float(weight.sum())]), int(group.max(initial=0)) + 1
    spread = deviation**2 or 1.0
    noise = spread
    # group 0 is the mean, which has no prior; each of the others begins as strong as the noise of a single pair
    variance = np.full(groups, noise)
    size = np.bincount(group, minlength=groups)

    def precision() -> FloatArray:
        return np.where(group == 0, 0.0, 1 / variance[group])

    for _ in range(ROUNDS):
        covariance = np.linalg.inv(gram[1] / noise + np.diag(precision()))
        coefficients = covariance @ moment[1] / noise
        used = size - np.bincount(group, weights=np.diag(covariance), minlength=groups) / variance
        used[0] = 1.0
        strength = np.bincount(group, weights=coefficients**2, minlength=groups)
        updated = np.maximum(strength / np.maximum(used, 1e-9), MIN_VARIANCE * spread)
        residual = square - 2 * moment @ coefficients + coefficients @ gram[:2] @ coefficients
        # a pair that stands for very many is fitted itself, which must not look like little noise
        residual_variance = (residual / np.maximum(counts - used.sum(), 1.0)).max()
        next_noise = max(residual_variance, MIN_VARIANCE * spread)
        change = np.abs(np.log(np.append(updated[1:] / variance[1:], next_noise / noise))).max()
        variance[1:], noise = updated[1:], float(next_noise)
        if change < SETTLED:
            break
    return precision(), noise


def _groups(curves: Sequence[Curve]) -> IntArray:
    """The prior of each coefficient: 0 the mean, then a slope and the bends of every curve: (p,)."""
    group = [0]
    for curve in curves:
        if columns := curve.basis.shape[1]:
            slope = group[-1] + 1
            group += [slope] + [slope + 1] * (columns - 1)
    return np.array(group)


def _root(covariance: FloatArray) -> FloatArray:
    """R with R R^T = covariance, which rounding may have made slightly indefinite."""
    values, vectors = np.linalg.eigh(covariance)
    root: FloatArray = vectors * np.sqrt(np.maximum(values, 0))
    return root
