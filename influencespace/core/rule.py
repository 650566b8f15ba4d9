"""The decision on a pool that nobody holds whole: passes over its ranges find a small Rule, which decides on any range.

Each pass is a mergeable statistic (`core/histogram.py`). Equal values are in the order of their rows, so that the decision is
the same for any ranges.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr

from influencespace.core.arrays import BoolArray, FloatArray, IntArray
from influencespace.core.histogram import (
    NOTHING,
    Column,
    Cut,
    Goal,
    Moments,
    Passes,
    search,
)
from influencespace.core.select import HARMFUL, KEPT, OVER_SIZE, REDUNDANT, SelectionConfig, Subset
from influencespace.errors import InputError

# What an image's each further caption is worth less, in standard deviations of predicted influence: of 0, 1/4, 1/2 and 1
# the best for 70 and 50 % of 20,455 clean pairs, by a target that the encoder knew too well: to be chosen anew.
SAME_IMAGE = 0.5
LEVELS = 1023  # edges at each pass that looks for the capped weights


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is known of a range of the pool's pairs."""

    row: IntArray  # (n,) places in the pool
    score: FloatArray  # (n,) pooled influence
    se: FloatArray  # (n,) its standard error
    predicted: FloatArray  # (n,) what sizes and weights follow
    copy: BoolArray  # (n,) of a pair that has their score
    further: IntArray  # (n,) place 0, 1, .. among the pairs of the same image
    image: IntArray  # (n,)
    group: IntArray  # (n,)

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """All that a decision takes from the pool as a whole."""

    config: SelectionConfig
    deviation: float
    """Standard deviation of single influences, in which thresholds are given."""
    sure: Cut = NOTHING
    """Of certainty: the pairs below the threshold that are more certain than this leave."""
    spread: float = 0.0
    """Standard deviation of what is predicted for the pairs that are left when harmful ones and copies are gone."""
    size: Cut = NOTHING
    """Of worth: pairs that lie before it are over the target size."""
    floors: Mapping[int, Cut] = field(default_factory=dict)
    """Of minus the score, by group: pruned pairs that lie before it are brought back."""
    level: float = 0.0
    """Weights are min(max_weight, exp(utility + level))."""

    def excess(self, pairs: Pairs) -> FloatArray:
        """Pooled influence above the threshold (n,)."""
        return pairs.score - self.config.tau_low * self.deviation

    def certainty(self, pairs: Pairs) -> FloatArray:
        """Standard errors by which pairs are above the threshold (n,)."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return self.excess(pairs) / pairs.se

    def below(self, pairs: Pairs) -> Column:
        """Certainty of the pairs below the threshold, each with the chance that it is above; copies are one piece of evidence."""
        counted = (self.excess(pairs) < 0) & ~pairs.copy
        certainty = self.certainty(pairs)[counted]
        return Column(certainty, pairs.row[counted], weight=ndtr(certainty))

    def harmful(self, pairs: Pairs) -> BoolArray:
        """Those below the threshold by the margin, and, unless the rule is `conservative`, as many of the others below it as can
        leave, the most certain first, equally certain ones together, while at most `max_false_discovery` of them are expected to
        be above it (n,) (Newton, Noueiry, Sarkar and Ahlquist 2004).
        """
        excess = self.excess(pairs)
        alone: BoolArray = excess + self.config.standard_errors * pairs.se < 0
        return alone | ((excess < 0) & self.sure.below(self.certainty(pairs), pairs.row))

    def left(self, pairs: Pairs) -> BoolArray:
        """Neither harmful nor copies (n,)."""
        return ~self.harmful(pairs) & ~pairs.copy

    def worth(self, pairs: Pairs) -> FloatArray:
        """What is predicted, each further pair of an image counted lower (n,)."""
        return pairs.predicted - SAME_IMAGE * self.spread * pairs.further

    def to_size(self, pairs: Pairs) -> Column:
        """Worth of the pairs that are left."""
        left = self.left(pairs)
        return Column(self.worth(pairs)[left], pairs.row[left])

    def sized(self, pairs: Pairs) -> BoolArray:
        """Kept by threshold and size (n,)."""
        return self.left(pairs) & ~self.size.below(self.worth(pairs), pairs.row)

    def pruned(self, pairs: Pairs) -> Column:
        """Pruned pairs by group, copies aside, the least harmful first."""
        pruned = ~self.sized(pairs) & ~pairs.copy
        return Column(-pairs.score[pruned], pairs.row[pruned], pairs.group[pruned])

    def kept(self, pairs: Pairs) -> BoolArray:
        """The pairs that are kept (n,)."""
        kept = self.sized(pairs)
        for group, cut in self.floors.items():
            kept |= (pairs.group == group) & ~pairs.copy & cut.below(-pairs.score, pairs.row)
        return kept

    def utility(self, pairs: Pairs) -> FloatArray:
        """What weights follow (n,)."""
        influence = pairs.predicted / (self.deviation or 1.0)
        if self.config.tau_high is not None:
            influence = np.maximum(influence - self.config.tau_high, 0.0)
        return influence / self.config.temperature

    def kept_utility(self, pairs: Pairs) -> FloatArray:
        """Of the kept pairs."""
        return self.utility(pairs)[self.kept(pairs)]

    def decide(self, pairs: Pairs) -> Subset:
        """What becomes of a range of the pool."""
        harmful, kept = self.harmful(pairs), self.kept(pairs)
        reason = np.where(harmful, HARMFUL, np.where(pairs.copy, REDUNDANT, OVER_SIZE)).astype("U20")
        reason[kept] = KEPT
        return Subset(kept=kept, weight=self._weights(pairs, kept), reason=reason)

    def weights(self, pairs: Pairs) -> FloatArray:
        """Of a range of the pool (n,), as `decide` gives them: all that a training asks for."""
        return self._weights(pairs, self.kept(pairs))

    def _weights(self, pairs: Pairs, kept: BoolArray) -> FloatArray:
        weight = kept.astype(np.float64)
        if self.config.weighting == "influence":
            weight *= leveled(self.utility(pairs), self.level, self.config.max_weight)
        return weight


def find_rule(config: SelectionConfig, deviation: float, rows: int) -> Passes:
    """The Rule for a pool of so many rows, whose ranges are `Pairs`.

    Harmful pairs and copies leave; a target size is met by dropping the least of what is left; each group gets back what its
    floor asks for, copies never. `influence` weights follow what is predicted; `auto` weights are uniform here, since it takes
    retraining to confirm any. Raises InputError when nothing would be kept, or pairs of one image only, from which no proxy can
    learn.
    """
    rule = Rule(config=config, deviation=deviation)
    if config.max_false_discovery and not config.conservative:
        (sure,) = yield from search(rule.below, [Goal(mean=config.max_false_discovery)], rows)
        rule = replace(rule, sure=sure)
    if config.target_size is not None:
        moments = yield Left(rule)
        rule = replace(rule, spread=moments.deviation)
        surplus = moments.count - max(1, round(config.target_size * rows))
        if surplus > 0:
            (size,) = yield from search(rule.to_size, [Goal(rank=surplus)], rows)
            rule = replace(rule, size=size)
    if config.min_group_share:
        groups = yield OfGroups(rule)
        lacking = {code: lacks(size, kept, config.min_group_share) for code, (size, kept) in groups.items()}
        goals = [Goal(rank=rank, part=code) for code, rank in sorted(lacking.items()) if rank > 0]
        cuts = yield from search(rule.pruned, goals, rows)
        rule = replace(rule, floors={goal.part: cut for goal, cut in zip(goals, cuts, strict=True)})
    kept = yield Kept(rule)
    _refuse(kept, config, rows)
    if config.weighting == "influence":
        rule = replace(rule, level=(yield from find_level(rule.kept_utility, config.max_weight)))
    return rule


def lacks(size: int, kept: int, floor: float) -> int:
    """How many pairs a group of this size needs beside the kept ones to keep the share `floor`."""
    return int(np.ceil(floor * size - 1e-9)) - kept


def _refuse(kept: tuple[int, int, int], config: SelectionConfig, rows: int) -> None:
    count, first, last = kept
    if not count:
        raise InputError(
            f"every pair scores below tau_low = {config.tau_low}; likely the target does not fit the pool, or tau_low is too high"
        )
    if rows > 1 and first == last:
        size = "" if config.target_size is None else f"raise target_size ({config.target_size}), or "
        raise InputError(
            f"only {count} of {rows} pairs would be kept, of one image: to learn from they must be of two or "
            f"more; {size}lower tau_low ({config.tau_low})"
        )


@dataclass(frozen=True)
class Left:
    """Statistic: moments of what is predicted for the pairs that are neither harmful nor copies."""

    rule: Rule

    def observe(self, pairs: Pairs) -> Moments:
        return Moments.of(pairs.predicted[self.rule.left(pairs)])

    def merge(self, left: Moments, right: Moments) -> Moments:
        return left.merge(right)


@dataclass(frozen=True)
class OfGroups:
    """Statistic: pairs of each group, copies aside, and how many of them threshold and size keep."""

    rule: Rule

    def observe(self, pairs: Pairs) -> dict[int, tuple[int, int]]:
        codes, place, counts = np.unique(pairs.group[~pairs.copy], return_inverse=True, return_counts=True)
        kept = np.bincount(place, self.rule.sized(pairs)[~pairs.copy], minlength=len(codes))
        return {int(code): (int(n), int(k)) for code, n, k in zip(codes, counts, kept, strict=True)}

    def merge(
        self, left: dict[int, tuple[int, int]], right: dict[int, tuple[int, int]]
    ) -> dict[int, tuple[int, int]]:
        both = dict(left)
        for code, (n, k) in right.items():
            before = both.get(code, (0, 0))
            both[code] = before[0] + n, before[1] + k
        return both


@dataclass(frozen=True)
class Kept:
    """Statistic: how many pairs are kept, and the least and the greatest of their images."""

    rule: Rule

    def observe(self, pairs: Pairs) -> tuple[int, int, int]:
        image = pairs.image[self.rule.kept(pairs)]
        bounds = np.iinfo(np.int64)
        return len(image), int(image.min(initial=bounds.max)), int(image.max(initial=bounds.min))

    def merge(self, left: tuple[int, int, int], right: tuple[int, int, int]) -> tuple[int, int, int]:
        return left[0] + right[0], min(left[1], right[1]), max(left[2], right[2])


def leveled(utility: FloatArray, level: float, cap: float) -> FloatArray:
    """min(cap, exp(utility + level)) for utilities (n,): (n,)."""
    with np.errstate(over="ignore"):
        return np.minimum(cap, np.exp(utility + level))


@dataclass(frozen=True)
class Utilities:
    """Statistic: count, log sum of exp(utility), least and greatest utility between edges (E,): (4, E + 1)."""

    measure: Any
    edges: FloatArray

    def observe(self, pairs: Any) -> NDArray[np.float64]:
        utility = np.sort(self.measure(pairs))
        state = _no_utilities(len(self.edges) + 1)
        if len(utility):
            starts = np.searchsorted(utility, self.edges)
            bounds = np.concatenate([[0], starts, [len(utility)]])
            filled = np.flatnonzero(np.diff(bounds) > 0)
            first, last = bounds[filled], bounds[filled + 1] - 1
            state[0, filled] = last - first + 1
            state[1, filled] = np.logaddexp.reduceat(utility, first)
            state[2, filled], state[3, filled] = utility[first], utility[last]
        return state

    def merge(self, left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = left[0] + right[0], np.logaddexp(left[1], right[1])
        return np.stack([*sums, np.minimum(left[2], right[2]), np.maximum(left[3], right[3])])


def _no_utilities(count: int) -> NDArray[np.float64]:
    return np.repeat([[0.0], [-np.inf], [np.inf], [-np.inf]], count, axis=1)


def find_level(measure: Any, cap: float) -> Passes:
    """log c of the weights min(cap, c exp(utility)) of mean 1: they maximise sum w u - sum w log w with that mean and cap.

    A utility is capped where the weights that would just cap it have a mean below 1. Each pass looks between narrower edges for
    the least capped one, until no utility lies between the capped and the free ones.
    """
    edges: FloatArray = np.empty(0)
    while True:
        state = yield Utilities(measure, edges)
        state = state[:, state[0] > 0]
        count, log_sum, least, greatest = state
        total = count.sum()
        # mean weights, times the count, that would just cap the least and the greatest of each bin
        above = np.cumsum(count[::-1])[::-1]
        until = np.logaddexp.accumulate(log_sum)
        before = np.concatenate([[-np.inf], until[:-1]])
        with np.errstate(over="ignore"):
            at_least = cap * (above + np.exp(before - least))
            at_greatest = cap * (above - count + np.exp(until - greatest))
        mixed = (at_least >= total) & (at_greatest < total) & (least < greatest)
        if mixed.any():
            place = int(np.flatnonzero(mixed)[0])
            edges = np.unique(np.linspace(least[place], greatest[place], LEVELS))
            continue
        free = at_least >= total
        room = total - cap * count[~free].sum()
        return float(np.log(room) - logsumexp(log_sum[free]))
