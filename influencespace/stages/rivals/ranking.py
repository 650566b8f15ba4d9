"""What each order ranks the pairs by, where it is cut, and the weights of the pairs before the cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from influencespace.core.arrays import BoolArray, FloatArray
from influencespace.core.hashing import uniform
from influencespace.core.histogram import Column, Cut, Goal, Moments, Passes, search
from influencespace.core.select import spread_by
from influencespace.data.buckets import Columns, read_rows
from influencespace.data.pair_set import PairSet
from influencespace.stages.passes import RangePasses
from influencespace.stages.rivals.names import LIKENESS, POINTWISE, RANDOM

TABLES = dict.fromkeys(POINTWISE, "scores") | dict.fromkeys(LIKENESS, "likeness")
"""The table of each column; others have one of their own."""
FILTER, WIDER = "neg_clip_loss", 1.5
"""NormSim chooses among the best pairs by negCLIPLoss, half as many again as are kept: 30 % for 20 % (Wang et al. 2024)."""
FILTERED = ("norm_sim", "norm_sim_2")
STANDARD = Moments(count=1, mean=0.0, squares=1.0)


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """The scores of all pairs by each order, higher is better; cheap to pickle."""

    folder: Path
    """Of the tables."""
    pool: PairSet
    seed: int
    moments: Mapping[str, Moments] = field(default_factory=dict)
    """Of the scores that are mixed, or softened."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """What `m_flyt` counts each standardised score."""

    def read(self, name: str, start: int, stop: int) -> FloatArray:
        """Of a range of pairs (n,)."""
        rows = slice(start, stop)
        if name == RANDOM:
            return -uniform(np.arange(start, stop), self.seed)
        if name == "clip_score":
            return self.pool.read(rows, name)[name].astype(np.float64)
        if name == "m_flyt":
            parts = [factor * self.standard(given, start, stop) for given, factor in self.mix.items()]
            return np.sum(parts, 0)
        table, column = (TABLES[name], name) if name in TABLES else (name, "score")
        return read_rows(self.folder / f"{table}.parquet", rows, column)[column]

    def standard(self, name: str, start: int, stop: int) -> FloatArray:
        """In standard deviations from the mean of all pairs, zero where it is not known (n,)."""
        return spread_by(self.read(name, start, stop), self.moments[name], STANDARD)

    def standardised(self, names: Sequence[str], passes: RangePasses, rows: int) -> "Rankings":
        """With the moments of some scores, over so many pairs."""
        new = tuple(name for name in dict.fromkeys(names) if name not in self.moments)
        if not new:
            return self
        found = passes.fold(Spreads(), ReadScores(self, new), rows)
        return replace(self, moments={**self.moments, **found})


@dataclass(frozen=True)
class Spreads:
    """Statistic: the moments of each column."""

    def observe(self, columns: Columns) -> dict[str, Moments]:
        return {name: Moments.of(values) for name, values in columns.items()}

    def merge(self, left: dict[str, Moments], right: dict[str, Moments]) -> dict[str, Moments]:
        return {name: moments.merge(right[name]) for name, moments in left.items()}


@dataclass(frozen=True)
class ReadScores:
    """Columns: some scores of a range of pairs."""

    rankings: Rankings
    names: tuple[str, ...]

    def __call__(self, start: int, stop: int) -> Columns:
        return {name: self.rankings.read(name, start, stop) for name in self.names}


@dataclass(frozen=True)
class First:
    """The first `size` pairs of an order."""

    name: str
    size: int

    def within(self, rows: int) -> "First | None":
        """The pairs among which they are, of so many: all where it is None."""
        if self.name not in FILTERED:
            return None
        return First(FILTER, min(rows, round(WIDER * self.size)))


Cuts = Mapping[First, Cut]


@dataclass(frozen=True)
class ReadOrders:
    """What each of some orders ranks a range of pairs by, the best lowest, those aside that their filter leaves out: a part
    each."""

    rankings: Rankings
    orders: tuple[First, ...]
    cuts: Cuts
    rows: int

    def __call__(self, start: int, stop: int) -> Column:
        rows = np.arange(start, stop)
        values = [_to_cut(self.rankings, first, self.cuts, self.rows, start, stop) for first in self.orders]
        count = len(self.orders)
        return Column(np.concatenate(values), np.tile(rows, count), np.repeat(np.arange(count), len(rows)))


def _to_cut(rankings: Rankings, first: First, cuts: Cuts, rows: int, start: int, stop: int) -> FloatArray:
    values = -rankings.read(first.name, start, stop)
    within = first.within(rows)
    if within is None:
        return values
    filtered = -rankings.read(within.name, start, stop)
    return np.where(cuts[within].below(filtered, np.arange(start, stop)), values, np.nan)


def _itself(column: Column) -> Column:
    return column


def find(orders: Sequence[First], rows: int) -> Passes:
    """Give where each of some orders is cut, over columns of `ReadOrders`."""
    goals = [Goal(rank=first.size, part=part) for part, first in enumerate(orders)]
    found = yield from search(_itself, goals, len(orders) * rows)
    return dict(zip(orders, found, strict=True))


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Weights of the pairs before a cut: alike, or by a softmax of their scores."""

    rankings: Rankings
    first: First
    cuts: Cuts
    rows: int
    temperature: float | None = None
    """Of the softmax, in standard deviations of the score; None: all alike."""
    factor: float = 1.0
    """Of the softmax, so that weights have mean 1."""
    cap: float = 5.0

    def before(self, start: int, stop: int) -> BoolArray:
        """Which pairs of a range are before the cut (n,)."""
        values = _to_cut(self.rankings, self.first, self.cuts, self.rows, start, stop)
        return self.cuts[self.first].below(values, np.arange(start, stop))

    def read(self, start: int, stop: int) -> FloatArray:
        """Weights of a range (n,)."""
        chosen = self.before(start, stop)
        if self.temperature is None:
            return chosen.astype(np.float64)
        return np.minimum(self.factor * self.exponentials(start, stop), self.cap)

    def exponentials(self, start: int, stop: int) -> FloatArray:
        """What weights are proportional to, below the cap (n,)."""
        assert self.temperature is not None
        score = self.rankings.standard(self.first.name, start, stop)
        values: FloatArray = np.where(self.before(start, stop), np.exp(score / self.temperature), 0.0)
        return values


@dataclass(frozen=True)
class Sums:
    """Statistic: the sum of each of some columns."""

    def observe(self, columns: Sequence[FloatArray]) -> FloatArray:
        return np.array([values.sum() for values in columns])

    def merge(self, left: FloatArray, right: FloatArray) -> FloatArray:
        return left + right


@dataclass(frozen=True)
class ReadExponentials:
    """Columns: those of some softmaxes."""

    weights: tuple[Weighted, ...]

    def __call__(self, start: int, stop: int) -> list[FloatArray]:
        return [one.exponentials(start, stop) for one in self.weights]
