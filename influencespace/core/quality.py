"""The axes along which influence is pooled: scores of a pair without a gradient, each blind to some kind of wrong pair."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.histogram import Column, Cut, Goal, Moments, Passes, place_among, search
from influencespace.core.strata import quantile_bounds

MAX_SHARED = 0.5
"""Share of pairs with another image's caption above which captions are names of classes, not descriptions."""


@dataclass(frozen=True)
class QualityAxis:
    """Mean of two scores in units of their spread: by the proxy that trained on the pair and by one that did not.

    Either alone has a blind spot: the first has learned some of the wrong pairs, the second lacks the other captions of
    the pair's image.
    """

    in_sample: Moments
    out_of_fold: Moments

    def __call__(self, in_sample: FloatArray, out_of_fold: FloatArray) -> FloatArray:
        """Of some pairs (n,), (n,) -> (n,); mean 0 over all of which the moments are."""
        return (standardised(in_sample, self.in_sample) + standardised(out_of_fold, self.out_of_fold)) / 2


class Scores(NamedTuple):
    """The two scores of a range of the pool's pairs."""

    row: IntArray  # (n,) places in the pool
    in_sample: FloatArray  # (n,)
    out_of_fold: FloatArray  # (n,)


@dataclass(frozen=True)
class FitAxis:
    """Statistic: the quality axis of a pool's scores."""

    def observe(self, scores: Scores) -> QualityAxis:
        return QualityAxis(Moments.of(scores.in_sample), Moments.of(scores.out_of_fold))

    def merge(self, left: QualityAxis, right: QualityAxis) -> QualityAxis:
        return QualityAxis(left.in_sample.merge(right.in_sample), left.out_of_fold.merge(right.out_of_fold))


@dataclass(frozen=True)
class Quantiles:
    """The quality axis of a pool, and where its quantiles begin."""

    axis: QualityAxis
    cuts: tuple[Cut, ...]

    def __call__(self, scores: Scores) -> tuple[FloatArray, IntArray]:
        """Quality and its quantile 0 .. len(cuts) of some pairs, equal values by row: (n,), (n,)."""
        quality = self.axis(scores.in_sample, scores.out_of_fold)
        return quality, place_among(self.cuts, quality, scores.row)

    def column(self, scores: Scores) -> Column:
        return Column(self.axis(scores.in_sample, scores.out_of_fold), scores.row)


def find_quantiles(count: int, rows: int) -> Passes:
    """The Quantiles of a pool of so many rows, whose ranges are `Scores`: those of `core.strata.quantile_of`."""
    axis = yield FitAxis()
    goals = [Goal(rank=int(rank)) for rank in quantile_bounds(rows, count)[1:-1]]
    cuts = yield from search(Quantiles(axis, ()).column, goals, rows)
    return Quantiles(axis, tuple(cuts))


def standardised(values: FloatArray, moments: Moments) -> FloatArray:
    """Values (n,) in units of their spread around their mean; zeros where they are all alike."""
    return (values - moments.mean) / (moments.deviation or 1.0)


def caption_images(image: IntArray, text: IntArray) -> FloatArray:
    """Logarithm of how many images of the pool have a pair's caption: (n,), (n,) -> (n,), 0 for a caption of its own.

    Boilerplate matches no image badly enough for a quality score to find it; the number of images that share it does.
    """
    pairs = np.unique(np.stack([text, image]), axis=1)
    captions, counts = np.unique(pairs[0], return_counts=True)
    return np.log(counts[np.searchsorted(captions, text)])


def shared_captions(image: IntArray, text: IntArray) -> float:
    """The share of pairs whose caption another image has as well: (n,), (n,)."""
    return float((caption_images(image, text) > 0).mean())


def agreement(texts: FloatArray, image: IntArray) -> FloatArray:
    """Mean cosine of each caption with the other captions of its image: unit (n, D), (n,) -> (n,); nan for an only one."""
    _, owner, counts = np.unique(image, return_inverse=True, return_counts=True)
    total = np.zeros((len(counts), texts.shape[1]))
    np.add.at(total, owner, texts)
    return cosine_with_others(texts, total[owner], counts[owner])


def cosine_with_others(texts: FloatArray, total: FloatArray, count: IntArray | int) -> FloatArray:
    """Mean cosine of unit rows (n, D) with the others of a set, of its sum (n, D) or (D,) and its size; nan for an only row."""
    cosines = np.einsum("nd,nd->n", total - texts, texts.astype(np.float64))
    others = np.asarray(count) - 1
    return np.where(others > 0, cosines / np.maximum(others, 1), np.nan)
