"""The linear datamodeling score (Park et al. 2023): how well sums of scores foretell losses after training on random halves."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy.stats import rankdata

from influencespace.core.arrays import FloatArray

DRAWS = 500


def half_subsets(pairs: int, count: int) -> FloatArray:
    """Random halves (count, N) of 0 and 1."""
    generator = np.random.default_rng(2024)
    return np.stack([generator.permutation(pairs) < pairs // 2 for _ in range(count)]).astype(np.float64)


def mean_spearman(a: FloatArray, b: FloatArray) -> float:
    """Spearman over subsets, mean over outputs; 0 where all are alike: two (S, G)."""
    a, b = (rankdata(x, axis=0) - (len(x) + 1) / 2 for x in (a, b))
    lengths = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return float(((a * b).sum(0) / np.where(lengths > 0, lengths, 1)).mean())


@dataclass(frozen=True)
class Foretold:
    """What proxies trained on subsets came to, and how well scores foretell it."""

    REPEATED: ClassVar[str] = "(one seed's proxies against the others')"
    subsets: FloatArray  # (S, N)
    losses: FloatArray  # (seeds, S, G)

    @cached_property
    def truth(self) -> FloatArray:
        truth: FloatArray = -self.losses.mean(0)
        return truth

    @property
    def ceiling(self) -> float:
        """How well one seed's proxies foretell those of the others."""
        rest = [-np.delete(self.losses, seed, 0).mean(0) for seed in range(len(self.losses))]
        return float(np.mean([mean_spearman(-one, other) for one, other in zip(self.losses, rest)]))

    def lds(self, scores: FloatArray) -> float:
        """Of sums of scores (G, N) over the subsets."""
        return mean_spearman(self.subsets @ np.nan_to_num(scores).T, self.truth)

    def lds_of(self, scores: Mapping[str, FloatArray]) -> tuple[dict[str, float], dict[str, FloatArray]]:
        """Of ensembles of scores (seeds, G, N) by name, and over resampled subsets, the same for all."""
        count = len(self.truth)
        drawn = [np.random.default_rng(draw).integers(0, count, count) for draw in range(DRAWS)]
        sums = {name: self.subsets @ np.nan_to_num(each.mean(0)).T for name, each in scores.items()}
        values = {name: mean_spearman(each, self.truth) for name, each in sums.items()}
        draws = {
            name: np.array([mean_spearman(each[rows], self.truth[rows]) for rows in drawn])
            for name, each in sums.items()
        }
        return values, draws
