"""The decision on arrays that are held whole, as one reads it: the slow truth; and the rule of passes over ranges."""

from functools import reduce
from typing import Any

import numpy as np
from scipy.special import ndtr

from benchmarks.fairness.floors import with_floors
from influencespace.core.arrays import BoolArray, FloatArray, IntArray
from influencespace.core.histogram import Passes, Statistic, carried_out
from influencespace.core.rule import SAME_IMAGE, Pairs, Rule, find_rule
from influencespace.core.select import (
    HARMFUL,
    KEPT,
    OVER_SIZE,
    REDUNDANT,
    SelectionConfig,
    Subset,
    capped_weights,
)
from influencespace.core.strata import rank_within
from influencespace.errors import InputError


def looped(passes: Passes, parts: list[Any]) -> Any:
    """The result of passes by a plain loop over parts of a pool."""

    def run(statistic: Statistic) -> Any:
        return reduce(statistic.merge, map(statistic.observe, parts))

    return carried_out(passes, run)


def ranges(pairs: Pairs, size: int) -> list[Pairs]:
    """The pairs cut into ranges of at most so many."""
    return [
        Pairs(**{name: values[start : start + size] for name, values in vars(pairs).items()})
        for start in range(0, len(pairs), size)
    ]


def pairs_of(
    score: FloatArray,
    se: FloatArray,
    predicted: FloatArray,
    *,
    redundant: BoolArray | None = None,
    image: IntArray | None = None,
    group: IntArray | None = None,
) -> Pairs:
    """Pairs of images of their own and of no group where none are given."""
    rows, none = np.arange(len(score)), np.zeros(len(score), np.int64)
    copy = np.zeros(len(score), bool) if redundant is None else redundant
    further = none.copy()
    if image is not None:
        further[~copy] = rank_within(image[~copy], predicted[~copy])
    return Pairs(
        row=rows,
        score=score,
        se=se,
        predicted=predicted,
        copy=copy,
        further=further,
        image=rows if image is None else image,
        group=none if group is None else group,
    )


def rule_for(pairs: Pairs, deviation: float, config: SelectionConfig, size: int) -> Rule:
    """By passes over ranges of at most so many pairs."""
    rule: Rule = looped(find_rule(config, deviation, len(pairs)), ranges(pairs, size))
    return rule


def by_ranges(pairs: Pairs, deviation: float, config: SelectionConfig, size: int = 7) -> Subset:
    """The decision by a rule that passes over ranges found, range by range."""
    rule = rule_for(pairs, deviation, config, size)
    parts = [rule.decide(one) for one in ranges(pairs, size)]
    return Subset(**{name: np.concatenate([vars(one)[name] for one in parts]) for name in vars(parts[0])})


def whole(pairs: Pairs, deviation: float, config: SelectionConfig) -> Subset:
    """The decision with every pair at hand."""
    score, se, predicted, copy, image = pairs.score, pairs.se, pairs.predicted, pairs.copy, pairs.image
    harmful = below_threshold(score - config.tau_low * deviation, se, config, ~copy)
    reason = np.where(harmful, HARMFUL, np.where(copy, REDUNDANT, KEPT)).astype("U20")
    kept = ~harmful & ~copy
    if config.target_size is not None:
        allowed = max(1, round(config.target_size * len(score)))
        surplus = int(kept.sum()) - allowed
        if surplus > 0:
            rows = np.flatnonzero(kept)
            worth = predicted[rows] - SAME_IMAGE * predicted[rows].std() * pairs.further[rows]
            dropped = rows[np.argsort(worth, kind="stable")[:surplus]]
            kept[dropped] = False
            reason[dropped] = OVER_SIZE
    if config.min_group_share:
        kept[~copy] = with_floors(kept[~copy], score[~copy], pairs.group[~copy], config.min_group_share)
        reason[kept] = KEPT
    if not kept.any():
        raise InputError(
            f"every pair scores below tau_low = {config.tau_low}; likely the target does not fit the pool, or tau_low is too high"
        )
    if len(image) > 1 and np.ptp(image[kept]) == 0:
        size = "" if config.target_size is None else f"raise target_size ({config.target_size}), or "
        raise InputError(
            f"only {int(kept.sum())} of {len(score)} pairs would be kept, of one image: to learn from they must be of two or "
            f"more; {size}lower tau_low ({config.tau_low})"
        )
    weight = np.zeros(len(score))
    followed = predicted[kept] / (deviation or 1.0)
    if config.tau_high is not None:
        followed = np.maximum(followed - config.tau_high, 0)
    weight[kept] = (
        capped_weights(followed / config.temperature, config.max_weight)
        if config.weighting == "influence"
        else 1.0
    )
    return Subset(kept=kept, weight=weight, reason=reason)


def below_threshold(
    excess: FloatArray, se: FloatArray, config: SelectionConfig, counted: BoolArray | None = None
) -> BoolArray:
    """Which pairs leave, by their pooled influence above the threshold and its standard error (n,): (n,).

    Those that are below it by the margin. Beyond, where the rule is not `conservative`, as many of those below it as can leave,
    the most certain first, while at most `max_false_discovery` of them are expected to be above it (Newton, Noueiry, Sarkar and
    Ahlquist 2004); of these only the `counted` (n,) are counted: copies are one piece of evidence.
    """
    leave: BoolArray = excess + config.standard_errors * se < 0
    if config.conservative or not config.max_false_discovery:
        return leave
    below = excess < 0
    with np.errstate(divide="ignore", over="ignore"):
        sureness = excess[below] / se[below]
    surest = np.sort(sureness if counted is None else sureness[counted[below]])
    expected = np.cumsum(ndtr(surest)) / np.arange(1, len(surest) + 1)
    whole = np.append(surest[1:] > surest[:-1], True)[
        : len(surest)
    ]  # pairs that are equally sure go together
    allowed = surest[whole & (expected <= config.max_false_discovery)]
    if len(allowed):
        leave[below] |= sureness <= allowed[-1]
    return leave
