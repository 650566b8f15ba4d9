"""Groups: their means, and how far each is worse off than the rest.

Group labels are of any kind that sorts. Gap measures and minimax weights are in `benchmarks/fairness`.
"""

import numpy as np

from influencespace.core.arrays import BoolArray, FloatArray, IntArray, Labels
from influencespace.core.strata import between_variance, means_by


def _numbered(group: Labels) -> tuple[IntArray, int]:
    """Groups as 0 .. A-1 in their sorted order (n,), and A."""
    names, number = np.unique(group, return_inverse=True)
    return number.astype(np.int64), len(names)


def group_means(values: FloatArray | BoolArray, group: Labels) -> FloatArray:
    """Mean of values (n,) in each group (n,), in sorted order of the groups: (A,)."""
    number, groups = _numbered(group)
    return means_by(number, values.astype(np.float64), groups).mean


def shrunken_group_means(values: FloatArray, group: Labels) -> FloatArray:
    """Group means (A,) of values (n,), shrunken to the mean of all by their standard errors (empirical Bayes, as strata are).

    Few samples make a group's loss look high by chance: the worst of many groups is mostly the smallest.
    """
    number, groups = _numbered(group)
    raw = means_by(number, values, groups)
    centre = np.full(groups, values.mean())
    between = between_variance(raw, centre)
    noise = np.where(raw.count > 1, raw.variance, np.inf)
    trust = between / (between + noise) if between > 0 else np.zeros(groups)
    shrunken: FloatArray = centre + trust * (raw.mean - centre)
    return shrunken


def disadvantage(loss: FloatArray, group: Labels) -> FloatArray:
    """How much each group counts for a target that serves those that are worse off: losses (n,) -> (A,), 1 in all.

    In proportion to how far a group's loss, shrunken for chance, is above the mean of all; zeros where none is. In the spirit
    of group distributionally robust optimisation (Sagawa et al. 2020), which weighs groups up by their losses step by step.
    """
    excess = np.maximum(shrunken_group_means(loss, group) - loss.mean(), 0.0)
    share: FloatArray = excess / (excess.sum() or 1.0)
    return share
