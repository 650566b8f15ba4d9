"""Means, spreads and quantiles of columns that nobody holds whole: small states of ranges of rows that merge.

`Moments` merge by Chan, Golub and LeVeque (1983). `Search` finds quantiles, and other places where a sorted column is cut, by
mergeable histograms of ever finer bins: each pass counts the next bits of the values that are still in question, or collects
these values once they are few. What it finds is exact, and the same for any ranges.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from influencespace.core.arrays import BoolArray, FloatArray, IntArray

Keys = NDArray[np.uint64]
ROW_BITS = 48
# of the value's 64 bits, the highest first, then of the row's: (of the row, shift, bits)
DIGITS = [(False, shift, 12) for shift in (52, 40, 28, 16, 4)] + [(False, 0, 4)]
DIGITS += [(True, shift, 12) for shift in (36, 24, 12, 0)]
COLLECTED = 65_536
"""Rows in question that are few enough to be held."""
UNIT = 2.0**30
"""Weights are counted in integers of 1 / UNIT, so that sums are the same in any order: an error of at most 1e-9 each."""


@dataclass(frozen=True)
class Moments:
    """Mean and spread of some values, those aside that are nan."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    @classmethod
    def of(cls, values: FloatArray) -> "Moments":
        known = values[np.isfinite(values)]
        if not len(known):
            return cls()
        mean = float(known.mean())
        return cls(len(known), mean, float(((known - mean) ** 2).sum()))

    def merge(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * other.count / count,
            self.squares + other.squares + apart**2 * self.count * other.count / count,
        )

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 for no values."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def order_keys(values: FloatArray) -> Keys:
    """Integers in the order of the values (n,), nan last: (n,)."""
    values = np.asarray(values, np.float64) + 0.0  # -0 is 0
    bits = values.view(np.uint64)
    negative = bits >> np.uint64(63) == 1
    keys = np.where(negative, ~bits, bits | np.uint64(1 << 63))
    return np.where(np.isnan(values), np.uint64(2**64 - 1), keys)


@dataclass(frozen=True)
class Cut:
    """A place in a column that is sorted by value, equal values by row."""

    key: int
    row: int = 0

    def below(self, values: FloatArray, row: IntArray) -> BoolArray:
        """Which values (n,) of the rows (n,) lie before it (n,)."""
        keys, key = order_keys(values), np.uint64(self.key)
        before: BoolArray = (keys < key) | ((keys == key) & (row < self.row))
        return before


def place_among(cuts: Sequence["Cut"], values: FloatArray, row: IntArray) -> IntArray:
    """How many of some cuts, which rise, lie before each value (n,) of the rows (n,): (n,)."""
    bounds = np.array([cut.key for cut in cuts], np.uint64)
    keys = order_keys(values)
    place = np.searchsorted(bounds, keys)
    (tied,) = np.nonzero(np.searchsorted(bounds, keys, side="right") > place)
    if len(tied):
        rows = np.array([cut.row for cut in cuts])
        place[tied] += ((bounds == keys[tied, None]) & (rows <= row[tied, None])).sum(1)
    return place


NOTHING = Cut(0)
"""Before all values."""
EVERYTHING = Cut(2**64 - 1, 2**ROW_BITS)
"""After all values."""


class Statistic(Protocol):
    """One pass over a pool: a state of each range of rows, merged in their order."""

    def observe(self, pairs: Any) -> Any:
        """The state of some rows."""

    def merge(self, left: Any, right: Any) -> Any:
        """The state of both."""


Passes = Generator[Statistic, Any, Any]
"""Asks for passes: each `yield` gives the merged state of one, and what is returned is the result."""


def carried_out(passes: Passes, run: Callable[[Statistic], Any]) -> Any:
    """The result of passes, each of which `run` makes."""
    try:
        statistic = next(passes)
        while True:
            statistic = passes.send(run(statistic))
    except StopIteration as end:
        return end.value


@dataclass(frozen=True)
class Column:
    """What a search looks at: a value of each of some rows, which of several columns it belongs to, and its weight."""

    value: FloatArray  # (n,)
    row: IntArray  # (n,) its place in the pool
    part: IntArray | None = None  # (n,) 0 where there is one column
    weight: FloatArray | None = None  # (n,) in [0, 1], of a search by a mean


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Where a column is cut: before so many values, or where the mean weight of all before would exceed a bound."""

    rank: int | None = None
    mean: float = 0.0
    part: int = 0

    def holds(self, count: Any, total: Any) -> Any:
        """Whether the cut may lie after so many values of this total weight, which rise."""
        return count <= self.rank if self.rank is not None else total <= self.mean * UNIT * count


@dataclass(frozen=True)
class Bin:
    """The values that share their highest bits."""

    part: int
    key: int = 0  # these bits
    row: int = 0
    depth: int = 0  # digits that they are

    def member(self, column: "_Keyed") -> BoolArray:
        inside = np.ones(len(column.key), bool) if column.part is None else column.part == self.part
        if self.depth:
            of_row, shift, _ = DIGITS[self.depth - 1]
            inside &= column.key >> np.uint64(0 if of_row else shift) == np.uint64(self.key)
            if of_row:
                inside &= column.row >> shift == self.row
        return inside

    def digit(self, column: "_Keyed", inside: BoolArray) -> IntArray:
        """The next digit of its members."""
        of_row, shift, bits = DIGITS[self.depth]
        value = column.row[inside] if of_row else column.key[inside]
        return ((value.astype(np.uint64) >> np.uint64(shift)) & np.uint64(2**bits - 1)).astype(np.int64)

    def child(self, digit: int) -> "Bin":
        of_row, _, bits = DIGITS[self.depth]
        if of_row:
            return replace(self, row=self.row << bits | digit, depth=self.depth + 1)
        return replace(self, key=self.key << bits | digit, depth=self.depth + 1)

    @property
    def of_one_value(self) -> bool:
        return self.depth > 0 and DIGITS[self.depth - 1][1] == 0


@dataclass(frozen=True)
class _Keyed:
    key: Keys
    row: IntArray
    part: IntArray | None
    weight: IntArray

    @classmethod
    def of(cls, column: Column) -> "_Keyed":
        none = np.zeros(len(column.value))
        weight = np.rint((none if column.weight is None else column.weight) * UNIT).astype(np.int64)
        return cls(order_keys(column.value), np.asarray(column.row, np.int64), column.part, weight)


@dataclass(frozen=True)
class _Open:
    """A goal that is not reached yet: its bin, and what lies before the bin."""

    goal: Goal
    bin: Bin
    count: int = 0
    total: int = 0


@dataclass(frozen=True)
class Count:
    """Statistic: how many values of each bin have each next digit, and their weight: (bins, 2, 4096)."""

    measure: Callable[[Any], Column]
    bins: tuple[Bin, ...]

    def observe(self, pairs: Any) -> NDArray[np.int64]:
        column = _Keyed.of(self.measure(pairs))
        state = np.zeros((len(self.bins), 2, 4096), np.int64)
        for place, one in enumerate(self.bins):
            inside = one.member(column)
            digit, weight = one.digit(column, inside), column.weight[inside]
            state[place, 0] = np.bincount(digit, minlength=4096)
            # exact: below 2^53 in any range of 2^23 rows
            state[place, 1] = np.bincount(digit, weight, minlength=4096).astype(np.int64)
        return state

    def merge(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        return left + right


@dataclass(frozen=True)
class Collect:
    """Statistic: key, row and weight of the values of each bin."""

    measure: Callable[[Any], Column]
    bins: tuple[Bin, ...]

    def observe(self, pairs: Any) -> list[tuple[Keys, IntArray, IntArray]]:
        column = _Keyed.of(self.measure(pairs))
        members = (one.member(column) for one in self.bins)
        return [(column.key[inside], column.row[inside], column.weight[inside]) for inside in members]

    def merge(self, left: Any, right: Any) -> Any:
        return [
            tuple(np.concatenate(parts) for parts in zip(mine, others, strict=True))
            for mine, others in zip(left, right, strict=True)
        ]


def search(measure: Callable[[Any], Column], goals: Sequence[Goal], rows: int) -> Passes:
    """The Cut of each goal in the column that `measure` gives of a pool's ranges, of at most `rows` values.

    Exact but for weights, which are rounded to 1e-9. A state has at most 64 kB a goal, or holds COLLECTED rows; a pool of no
    more takes one pass, one of millions three.
    """
    cuts: dict[int, Cut] = {}
    opened = {place: _Open(goal, Bin(goal.part)) for place, goal in enumerate(goals)}
    left = rows
    while opened:
        bins = tuple(dict.fromkeys(one.bin for one in opened.values()))
        if left <= COLLECTED:
            found = yield Collect(measure, bins)
            cuts |= {place: _cut(one, found[bins.index(one.bin)]) for place, one in opened.items()}
            break
        counts = yield Count(measure, bins)
        narrowed: dict[int, _Open] = {}
        inside: dict[Bin, int] = {}
        for place, one in opened.items():
            count, total = counts[bins.index(one.bin)]
            result = _narrowed(one, count, total, inside)
            if isinstance(result, Cut):
                cuts[place] = result
            else:
                narrowed[place] = result
        opened, left = narrowed, sum(inside.values())
    return [cuts[place] for place in range(len(goals))]


def _narrowed(one: _Open, count: IntArray, total: IntArray, inside: dict[Bin, int]) -> "_Open | Cut":
    """The goal in a smaller bin, of which the size is noted, or where it is reached."""
    counts, totals = one.count + np.cumsum(count), one.total + np.cumsum(total)
    over = np.flatnonzero(~one.goal.holds(counts, totals) & (count > 0))
    if not len(over):  # of the whole column: no bin was chosen that has no value beyond
        return EVERYTHING
    digit = int(over[0])
    smaller = one.bin.child(digit)
    before = int(counts[digit] - count[digit]), int(totals[digit] - total[digit])
    if smaller.of_one_value and (one.goal.rank is None or count[digit] == 1):
        whole = DIGITS[smaller.depth - 1][0]
        return Cut(smaller.key, smaller.row if whole else 0)
    inside[smaller] = int(count[digit])
    return _Open(one.goal, smaller, *before)


def _cut(one: _Open, found: tuple[Keys, IntArray, IntArray]) -> Cut:
    """Where a goal is reached among the values of its bin."""
    key, row, weight = found
    order = np.lexsort((row, key))
    key, row = key[order], row[order]
    count = one.count + np.arange(1, len(key) + 1)
    total = one.total + np.cumsum(weight[order])
    if one.goal.rank is None:  # equal values lie on one side
        last = np.append(key[1:] != key[:-1], True)[: len(key)]
        over = np.flatnonzero(last & ~one.goal.holds(count, total))
        return Cut(int(key[over[0]])) if len(over) else EVERYTHING
    over = np.flatnonzero(~one.goal.holds(count, total))
    return Cut(int(key[over[0]]), int(row[over[0]])) if len(over) else EVERYTHING
