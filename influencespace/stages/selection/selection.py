"""The selection stage: pooled evidence, the weighting, and the decision on every pair."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influencespace.core.arrays import BoolArray
from influencespace.core.select import KEPT, SelectionConfig
from influencespace.data.buckets import Columns, buckets_of, read_rows, table_rows
from influencespace.data.npy import write_npy
from influencespace.data.pair_set import PairSet
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.passes import RANGE, RangePasses
from influencespace.stages.selection.exchangeability import warning
from influencespace.stages.selection.pair_evidence import Decision, ReadTable, write_evidence
from influencespace.stages.selection.summary import ReadDecided, StrataCounts, Summarise
from influencespace.stages.selection.weighting import choose_weighting, chosen

CURATED = ("uid", "kept", "weight", "score", "score_se", "stratum", "reason")
"""Columns of curated.parquet."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """The pairs that a round sees among those of the first: all of them, or those that the round before kept."""

    run: Run
    starts: tuple[int, ...] = ()
    """How many of them lie before each range of all pairs; none for the first round, where each pair is at its place."""

    @property
    def before(self) -> Path:
        """Decisions of the round before."""
        assert self.run.previous is not None
        return self.run.previous.at("selection") / "curated.parquet"

    def seen(self, start: int, stop: int) -> tuple[BoolArray, tuple[int, int]]:
        """Which of a range of all pairs the round sees (n,), and the range of the round's pairs that they are."""
        if not self.starts:
            return np.ones(stop - start, bool), (start, stop)
        kept = read_rows(self.before, slice(start, stop), "kept")["kept"].astype(bool)
        first = self.starts[start // RANGE]
        return kept, (first, first + int(kept.sum()))


@dataclass(frozen=True, kw_only=True)
class CuratedRange:
    """Columns of curated.parquet.

    Of a later round the file is about all pairs all the same: those that it did not see stay as they were decided.
    """

    round: Round
    decision: Decision

    def __call__(self, start: int, stop: int) -> Columns:
        seen, (first, last) = self.round.seen(start, stop)
        columns = self._decided(first, last) if last > first else {}
        if not seen.all():
            whole = read_rows(self.round.before, slice(start, stop))
            for name, values in columns.items():
                whole[name] = whole[name].copy()
                whole[name][seen] = values
            columns = whole
        columns["uid"] = self.round.run.everything.read(slice(start, stop), "uid")["uid"]
        return {name: columns[name] for name in CURATED}

    def _decided(self, start: int, stop: int) -> Columns:
        pairs, rows = self.decision.pairs(start, stop), slice(start, stop)
        subset = self.decision.rule.decide(pairs)
        strata = read_rows(self.round.run.at("influence") / "strata.parquet", rows, "cluster", "quantile")
        labels = np.char.add(
            np.char.mod("c%03d/q", strata["cluster"]), np.char.mod("%02d", strata["quantile"])
        )
        return {
            "kept": subset.kept,
            "weight": subset.weight.astype(np.float32),
            "score": pairs.score.astype(np.float32),
            "score_se": pairs.se.astype(np.float32),
            "stratum": labels.astype(object),
            "reason": subset.reason.astype(object),
        }


@dataclass(frozen=True)
class CountReasons:
    """Statistic: how many pairs have each reason."""

    def observe(self, columns: Columns) -> Counter[str]:
        return Counter(columns["reason"].tolist())

    def merge(self, left: Counter[str], right: Counter[str]) -> Counter[str]:
        return left + right


@dataclass(frozen=True)
class CountKept:
    """Statistic: how many pairs are kept, range by range."""

    def observe(self, columns: Columns) -> list[int]:
        return [int(columns["kept"].sum())]

    def merge(self, left: list[int], right: list[int]) -> list[int]:
        return left + right


@dataclass(frozen=True)
class KeptRows:
    """Task: the rows of the embedding artifact that a subset kept, as the pool of a next round; how many they are."""

    pool: PairSet
    curated: Path
    out: Path

    def __call__(self) -> int:
        count = sum(int(self._kept(*span).sum()) for span in self._spans)
        parts = (self.pool.rows_of_range(*span)[self._kept(*span)] for span in self._spans)
        write_npy(self.out, parts, count, np.int64)
        return count

    @property
    def _spans(self) -> Iterator[tuple[int, int]]:
        return buckets_of(table_rows(self.curated), RANGE)

    def _kept(self, start: int, stop: int) -> BoolArray:
        """Which pairs of a range are kept (n,)."""
        kept: BoolArray = read_rows(self.curated, slice(start, stop), "kept")["kept"].astype(bool)
        return kept


class Selection(Stage):
    """Turns scores into curated.parquet, strata.parquet and evidence.parquet."""

    name = "selection"
    version = 6
    needs = ("proxies", "redundancy", "influence", "fairness")

    def settings(self, config: Any) -> tuple[SelectionConfig, int]:
        return config.selection, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        evidence, folder = write_evidence(run, workers), workers.folder
        choice = choose_weighting(run, evidence, workers)
        decision, found = choice.decision, choice.exchangeability
        seen, everything = run.manifest("influence").rows_out, run.first.manifest("proxies").rows_out
        passes = RangePasses(workers)
        strata = ReadDecided(decision, run.at("influence") / "strata.parquet")
        facts = run.manifest("influence").details
        counting = StrataCounts(decision.rule, facts["clusters"], facts["quantiles"])
        counts, nearest = passes.fold(counting, strata, seen)
        this = Round(run=run)
        if run.previous is not None:
            by_range = passes.fold(CountKept(), ReadTable(this.before, ("kept",)), everything)
            this = Round(run=run, starts=tuple(np.cumsum([0, *by_range]).tolist()))
        summary = Summarise(run=run, decision=decision, counts=counts, nearest=nearest, folder=folder)
        details = workers.once(summary)
        workers.table("curated", CuratedRange(round=this, decision=decision), everything, RANGE)
        reasons = passes.fold(CountReasons(), ReadTable(folder / "curated.parquet", ("reason",)), everything)
        details |= {"reasons": dict(sorted(reasons.items())), "kept_fraction": reasons[KEPT] / everything}
        details |= chosen(decision.rule.config) | {"trials": choice.trials}
        details["exchangeability"] = asdict(found) | {"known_better": found.known_better}
        details["warnings"] += [warning(found)] if found.known_better else []
        return Details(rows_in=everything, rows_out=everything, details=details)
