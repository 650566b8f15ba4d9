"""Groups: their means, how far each is worse off than the rest, and floors below which none may fall.

Group labels are of any kind that sorts. Gap measures and minimax weights are in `benchmarks/fairness`.
"""

import numpy as np

from influencespace.core.arrays import BoolArray, FloatArray, IntArray, Labels
from influencespace.core.strata import between_variance, means_by, rank_within
from influencespace.errors import InputError


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


def with_floors(kept: BoolArray, score: FloatArray, group: Labels, floor: float) -> BoolArray:
    """The kept pairs (n,) with as many brought back as each group (n,) needs to keep the share `floor`, at least, of its pairs.

    Those of highest score (n,) are brought back first, as the least harmful; ties by order. No kept pair is removed. Raises
    InputError where the floor is no share.
    """
    if not 0 <= floor <= 1:
        raise InputError(f"floor = {floor}: it is the share of each group's pairs that is kept, from 0 to 1")
    number, groups = _numbered(group)
    needed = np.ceil(floor * np.bincount(number, minlength=groups) - 1e-9)
    lacking = needed - np.bincount(number[kept], minlength=groups)
    pruned = np.flatnonzero(~kept)
    back = pruned[rank_within(number[pruned], score[pruned]) < lacking[number[pruned]]]
    result = kept.copy()
    result[back] = True
    return result
