"""The evidence table: what a decision is made of, for every pair, written and read by range."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.histogram import Moments, Passes, carried_out
from influencespace.core.redundancy import joint_mean
from influencespace.core.rule import Pairs, Rule, find_rule
from influencespace.core.select import SelectionConfig, Subset, spread_by
from influencespace.core.strata import rank_within, weighted_deviation
from influencespace.data.artifacts import write_json
from influencespace.data.buckets import Columns, buckets_of, read_rows, table_rows
from influencespace.data.mirror import here, is_file
from influencespace.run import Run, Workers
from influencespace.stages.passes import RANGE, RangePasses, Read, looped
from influencespace.stages.selection.evidence import CarriedOver, Evidence

EVIDENCE = (
    *("score", "score_se", "predicted", "pretrained", "for_groups", "copy", "further", "image", "group"),
    "cluster",
)
"""Columns of evidence.parquet, a row for each pair of the pool: pooled influence and its standard error, copies judged
together; influence predicted from all that is known; the given encoder's CLIP score; influence on groups that are worse off;
whether it is a copy of another pair; its place 0, 1, .. by predicted influence among the pairs of its image, copies aside;
numbers of image, group and cluster."""
FILE = "evidence.parquet"
ALONE, JOINT, FURTHER = ".alone", ".copies", ".images"  # tables that only serve this one


@dataclass(frozen=True, kw_only=True)
class PairEvidence:
    """The evidence table of a run's selection, read where it is used."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(here(self.folder / "evidence.json").read_text(encoding="utf-8"))
        return facts

    @cached_property
    def rows(self) -> int:
        return table_rows(self.folder / FILE)

    @property
    def deviation(self) -> float:
        """Standard deviation of single balanced influences over the pool: what thresholds are given in."""
        return float(self.facts["deviation"])

    def deviation_of(self, config: SelectionConfig) -> float:
        """Standard deviation over the pool of what a configuration judges: of single influences, or of clusters' means."""
        return float(self.facts["clusters"]["deviation"]) if config.unit == "cluster" else self.deviation

    @property
    def worst_group(self) -> int | None:
        """Which of the target's groups the proxy of all pairs serves worst, in their order; None where none is worse off."""
        worst: int | None = self.facts["worst_group"]
        return worst

    def read(self, start: int, stop: int, config: SelectionConfig) -> Pairs:
        """What a configuration decides a range of pairs by."""
        columns = read_rows(self.folder / FILE, slice(start, stop))
        if config.unit == "cluster":
            columns |= self._of_clusters(columns["cluster"])
        predicted = columns["predicted"]
        if config.clip_score_share:
            spread = self.facts["predicted"], self.facts["pretrained"]
            of, own = (Moments(**one) for one in spread)
            predicted = predicted + config.clip_score_share * spread_by(columns["pretrained"], own, of)
        if config.group_share and self.worst_group is not None:
            predicted = predicted + config.group_share * columns["for_groups"]
        return Pairs(
            row=np.arange(start, stop),
            score=columns["score"],
            se=columns["score_se"],
            predicted=predicted,
            copy=columns["copy"],
            further=columns["further"],
            image=columns["image"],
            group=columns["group"],
        )

    def _of_clusters(self, cluster: IntArray) -> Columns:
        """What pairs are judged by where whole clusters are: their clusters' figures (n,)."""
        of_clusters = self.facts["clusters"]
        mean, se = (np.array(of_clusters[name], np.float64)[cluster] for name in ("influence", "se"))
        return {"score": mean, "score_se": se, "predicted": mean, "further": np.zeros_like(cluster)}

    def reader(self, config: SelectionConfig) -> Read:
        return partial(self.read, config=config)

    def passes(self, config: SelectionConfig) -> Passes:
        """Give the rule of a configuration."""
        return find_rule(config, self.deviation_of(config), self.rows)

    def decision(self, config: SelectionConfig) -> "Decision":
        """What a configuration makes of it, by passes in one process: for trials."""
        run = looped(self.reader(config), self.rows)
        return Decision(evidence=self, rule=carried_out(self.passes(config), run))

    def decide(self, config: SelectionConfig) -> Subset:
        """The subset that a configuration makes of a small pool."""
        decision = self.decision(config)
        parts = [decision.rule.decide(decision.pairs(*span)) for span in buckets_of(self.rows, RANGE)]
        return Subset(
            kept=np.concatenate([one.kept for one in parts]),
            weight=np.concatenate([one.weight for one in parts]),
            reason=np.concatenate([one.reason for one in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A rule with what it decides on: weights of the pool's pairs."""

    evidence: PairEvidence
    rule: Rule

    def pairs(self, start: int, stop: int) -> Pairs:
        """A range of them."""
        return self.evidence.read(start, stop, self.rule.config)

    def read(self, start: int, stop: int) -> FloatArray:
        """Weights of a range (n,)."""
        if stop == start:
            return np.empty(0)
        return self.rule.weights(self.pairs(start, stop))

    @property
    def kept_fraction(self) -> float:
        """Of all pairs."""
        spans = buckets_of(self.evidence.rows, RANGE)
        return sum(int(self.rule.kept(self.pairs(*span)).sum()) for span in spans) / self.evidence.rows


@dataclass(frozen=True)
class Alone:
    """Columns: what the sample says of each pair of a range."""

    influence: Path
    carried_over: CarriedOver

    def __call__(self, start: int, stop: int) -> Columns:
        return self.carried_over(read_rows(self.influence / "strata.parquet", slice(start, stop)))


@dataclass(frozen=True)
class OfCopies:
    """Columns: scores by the pair that each is a copy of."""

    folder: Path
    copies: Path

    def __call__(self, start: int, stop: int) -> Columns:
        rows = slice(start, stop)
        scores = read_rows(self.folder / f"{ALONE}.parquet", rows, "score", "score_se")
        return scores | read_rows(self.copies, rows, "leader")


def judged_together(columns: Columns) -> Columns:
    """The mean score and standard error of all copies, for each."""
    _, group = np.unique(columns["leader"], return_inverse=True)
    return {name: joint_mean(columns[name], group) for name in ("score", "score_se")}


@dataclass(frozen=True)
class OfImages:
    """Columns: what is predicted, by image."""

    run: Run
    folder: Path
    copies: Path

    def __call__(self, start: int, stop: int) -> Columns:
        rows = slice(start, stop)
        columns = read_rows(self.folder / f"{ALONE}.parquet", rows, "predicted")
        image = self.run.pool.read(rows, "image")["image"].astype(np.int64)
        return columns | {"image": image, "copy": copy_of(self.copies, start, stop)}


def places(columns: Columns) -> Columns:
    """The place of each pair among those of its image, copies aside."""
    alone = ~columns["copy"]
    further = np.zeros(len(alone), np.int64)
    further[alone] = rank_within(columns["image"][alone], columns["predicted"][alone])
    return {"further": further}


def copy_of(copies: Path, start: int, stop: int) -> Any:
    """Which pairs of a range are copies of others (n,)."""
    return read_rows(copies, slice(start, stop), "leader")["leader"] != np.arange(start, stop)


@dataclass(frozen=True)
class EvidenceOfRange:
    """Columns of evidence.parquet."""

    run: Run
    folder: Path
    copies: Path
    joint: str
    """The table that has the scores."""

    def __call__(self, start: int, stop: int) -> Columns:
        rows = slice(start, stop)
        scores = read_rows(self.folder / f"{self.joint}.parquet", rows, "score", "score_se")
        groups = self.run.at("fairness") / "groups.parquet"
        for_groups = (
            read_rows(groups, rows, "influence")["influence"] if is_file(groups) else np.zeros(stop - start)
        )
        strata = read_rows(
            self.run.at("influence") / "strata.parquet", rows, "pretrained", "group", "cluster"
        )
        values = (
            *(scores["score"], scores["score_se"]),
            read_rows(self.folder / f"{ALONE}.parquet", rows, "predicted")["predicted"],
            *(strata["pretrained"], for_groups, copy_of(self.copies, start, stop)),
            read_rows(self.folder / f"{FURTHER}.parquet", rows)["further"],
            self.run.pool.read(rows, "image")["image"].astype(np.int64),
            strata["group"],
            strata["cluster"],
        )
        return dict(zip(EVIDENCE, values, strict=True))


@dataclass(frozen=True)
class Spreads:
    """Statistic: moments of `predicted` and `pretrained`."""

    def observe(self, columns: Columns) -> tuple[Moments, Moments]:
        return Moments.of(columns["predicted"]), Moments.of(columns["pretrained"])

    def merge(self, left: tuple[Moments, Moments], right: tuple[Moments, Moments]) -> tuple[Moments, Moments]:
        return left[0].merge(right[0]), left[1].merge(right[1])


@dataclass(frozen=True)
class ReadTable:
    """Columns of a range of a table."""

    path: Path
    names: tuple[str, ...] = ()

    def __call__(self, start: int, stop: int) -> Columns:
        return read_rows(self.path, slice(start, stop), *self.names)


def write_evidence(run: Run, workers: Workers) -> PairEvidence:
    """Pool the evidence and carry it over to every pair, once for all decisions that are tried; writes evidence.parquet."""
    folder, evidence = workers.folder, Evidence.of(run)
    copies = run.at("redundancy") / "copies.parquet"
    facts, passes = run.manifest("influence").details, RangePasses(workers)
    rows, strata = run.manifest("influence").rows_out, evidence.folder / "strata.parquet"
    counting = CountStrata(facts["clusters"], facts["quantiles"])
    count = passes.fold(counting, ReadTable(strata, ("cluster", "quantile")), rows)
    fitted = workers.once(partial(Fitted.of, evidence, count))
    workers.table(ALONE, Alone(evidence.folder, fitted.carried_over), rows, RANGE, label="score")
    counts, joint = run.manifest("redundancy").details, ALONE
    if counts["exact_copies"] + counts["near_copies"]:
        joint = JOINT
        workers.group_by(JOINT, OfCopies(folder, copies), "leader", judged_together, rows, RANGE)
    workers.group_by(FURTHER, OfImages(run, folder, copies), "image", places, rows, RANGE)
    workers.table("evidence", EvidenceOfRange(run, folder, copies, joint), rows, RANGE, label="evidence")
    read = ReadTable(folder / FILE, ("predicted", "pretrained"))
    spreads = passes.fold(Spreads(), read, rows)
    workers.once(partial(_write_facts, run, folder, fitted, spreads))
    return PairEvidence(folder=folder)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What the scored sample says of all pairs."""

    carried_over: CarriedOver
    deviation: float
    clusters: Mapping[str, Any]
    """Influence of each cluster and its standard error, None where it has no pairs; the deviation of the former over the pool."""

    @classmethod
    def of(cls, evidence: Evidence, count: IntArray) -> "Fitted":
        """By the pairs of each stratum (C, Q)."""
        influence, se = evidence.of_clusters(count)
        pairs = count.sum(1)
        has = pairs > 0
        clusters = {
            "influence": [value if known else None for value, known in zip(influence.tolist(), has)],
            "se": [value if known else None for value, known in zip(se.tolist(), has)],
            "deviation": weighted_deviation(influence[has], pairs[has].astype(np.float64)),
        }
        return cls(carried_over=evidence.carried_over, deviation=evidence.deviation, clusters=clusters)


@dataclass(frozen=True)
class CountStrata:
    """Statistic: how many pairs each stratum has (C, Q)."""

    clusters: int
    quantiles: int

    def observe(self, columns: Columns) -> IntArray:
        stratum = columns["cluster"] * self.quantiles + columns["quantile"]
        size = self.clusters * self.quantiles
        return np.bincount(stratum, minlength=size).reshape(self.clusters, self.quantiles)

    def merge(self, left: IntArray, right: IntArray) -> IntArray:
        return left + right


def _write_facts(run: Run, folder: Path, fitted: Fitted, spreads: tuple[Moments, Moments]) -> None:
    worst = None
    if is_file(run.at("fairness") / "groups.parquet"):
        losses = [group["loss"] for group in run.manifest("fairness").details["groups"]]
        worst = int(np.argmax(losses))
    predicted, pretrained = map(vars, spreads)
    facts = {
        "deviation": fitted.deviation,
        "worst_group": worst,
        "predicted": predicted,
        "pretrained": pretrained,
        "clusters": fitted.clusters,
    }
    write_json(folder / "evidence.json", facts)
