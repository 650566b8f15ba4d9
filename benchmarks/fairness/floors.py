"""A least share of every group, of pairs that fit in memory: the decision of a run does the same by ranges."""

import numpy as np

from influencespace.core.arrays import BoolArray, FloatArray, Labels
from influencespace.core.strata import rank_within


def with_floors(kept: BoolArray, score: FloatArray, group: Labels, floor: float) -> BoolArray:
    """The kept rows (n,) with as many brought back as each group (n,) needs to keep the share `floor`, at least, of its rows.

    Those of highest score (n,) are brought back first, ties by order; no kept row is removed.
    """
    _, number = np.unique(group, return_inverse=True)
    groups = int(number.max(initial=-1)) + 1
    needed = np.ceil(floor * np.bincount(number, minlength=groups) - 1e-9)
    lacking = needed - np.bincount(number[kept], minlength=groups)
    pruned = np.flatnonzero(~kept)
    back = pruned[rank_within(number[pruned], score[pruned]) < lacking[number[pruned]]]
    result = kept.copy()
    result[back] = True
    return result
