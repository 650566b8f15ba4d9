"""The linear datamodeling score (Park et al. 2023): how well sums of scores foretell losses after training on random halves."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from benchmarks.arrays import FloatArray

DRAWS = 500


def half_subsets(pairs: int, count: int) -> FloatArray:
    """Random halves (count, N) of 0 and 1."""
    generator = np.random.default_rng(2024)
    return np.stack([generator.permutation(pairs) < pairs // 2 for _ in range(count)]).astype(np.float64)


def lds(predicted: FloatArray, truth: FloatArray) -> float:
    """Spearman over subsets, mean over outputs: two (S, G)."""
    a, b = (rankdata(x, axis=0) - (len(x) + 1) / 2 for x in (predicted, truth))
    lengths = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return float(((a * b).sum(0) / np.where(lengths > 0, lengths, 1)).mean())


def foretold(subsets: FloatArray, scores: FloatArray) -> FloatArray:
    """Sums of scores (G, N) over subsets (S, N): (S, G)."""
    sums: FloatArray = subsets @ np.nan_to_num(scores).T
    return sums


def lds_draws(predicted: FloatArray, truth: FloatArray) -> FloatArray:
    """The score over resampled subsets, the same for every estimator: (DRAWS,)."""
    count = len(truth)
    rows = [np.random.default_rng(draw).integers(0, count, count) for draw in range(DRAWS)]
    return np.array([lds(predicted[drawn], truth[drawn]) for drawn in rows])


def ceiling(losses: FloatArray) -> float:
    """How well one seed's proxies foretell those of the others: losses (R, S, G)."""
    others: Sequence[FloatArray] = [-np.delete(losses, seed, 0).mean(0) for seed in range(len(losses))]
    return float(np.mean([lds(-one, other) for one, other in zip(losses, others)]))
