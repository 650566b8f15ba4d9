"""Gaps between groups, as fairlearn defines them (Weerts et al. 2023): the largest difference between two groups, 0 is none.

Not by fairlearn itself: its frames take 9 ms for 1,500 rows, of which an interval needs thousands, and its odds refuse decisions
by lot; a test compares both. What is decided (the k highest scores, or all above a cut-off) is for the caller to define: the
same scores have other gaps by another rule.
"""

import numpy as np

from influencespace.core.arrays import BoolArray, FloatArray, Labels
from influencespace.core.fairness import group_means
from influencespace.errors import InputError


def demographic_parity(values: FloatArray | BoolArray, group: Labels) -> float:
    """Largest difference between group means of predictions, or between selection rates of decisions (n,): >= 0."""
    return float(np.ptp(group_means(values, group)))


def equalised_odds(decided: FloatArray | BoolArray, positive: BoolArray, group: Labels) -> float:
    """The larger of the gaps of true and of false positive rates (Hardt, Price and Srebro 2016): decisions, truth (n,).

    A decision by lot is the chance of a good one. nan where a group has no positives, or only positives: it has no such rate.
    """
    names = len(np.unique(group))
    if any(len(np.unique(group[truth])) < names for truth in (positive, ~positive)):
        return float("nan")
    return max(demographic_parity(decided[truth], group[truth]) for truth in (positive, ~positive))


def worst_group(loss: FloatArray, group: Labels) -> float:
    """Mean loss of the group that has the highest: losses or misses (n,)."""
    return float(group_means(loss, group).max())


def squared_gap(predictions: FloatArray, group: Labels) -> tuple[float, FloatArray]:
    """Squared difference of group means, averaged over pairs of groups, and its derivative by the predictions (n,).

    A smooth stand-in for `demographic_parity`: influence on the gap is influence on a target with this gradient. Raises
    InputError where there is one group.
    """
    names, number = np.unique(group, return_inverse=True)
    if (groups := len(names)) < 2:
        raise InputError(f"a gap needs two groups and all {len(group)} rows are of one")
    means = group_means(predictions, group)
    differences = means[:, None] - means
    pairs = groups * (groups - 1) / 2
    slope = 2 * differences.sum(1) / pairs / np.bincount(number)
    return float((differences**2).sum() / 2 / pairs), slope[number]
