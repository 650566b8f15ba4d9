"""The selection stage: pooled evidence, the weighting, the decision on every pair, and the baselines at the same size."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from influencespace.core.select import HARMFUL, SelectionConfig, Subset, margin_that_held, top_fraction
from influencespace.core.sequential import significantly_below_zero
from influencespace.core.strata import Means, means_by
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns, read_columns, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.filters import random_score
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.target import MIN_GROUP_IMAGES
from influencespace.stages.scoring.curvature import directional
from influencespace.stages.selection.evidence import Evidence, PairEvidence, WriteEvidence
from influencespace.stages.selection.weighting import choose_weighting, chosen

# clip_score is the given encoder's, as most people filter; the last two are by the proxy of all pairs
BASELINES = ("everything", "random", "clip_score", "proxy_clip_score", "neg_clip_loss")
METHODS = ("curated", *BASELINES)
DYNAMIC = "dynamic"  # begins as curated does, and re-weights the kept pairs while it trains
FALSE_DISCOVERIES = 0.05  # rate among the strata that are reported as harmful
NOT_CONVERGED = 0.1  # |mean I_in| above this many standard deviations (algorithms, 6)
CURATED = ("uid", "kept", "weight", "score", "score_se", "stratum", "reason")
"""Columns of curated.parquet."""


def weights_of(method: str) -> str:
    """The column of weights.parquet that a method begins with."""
    return "curated" if method == DYNAMIC else method


@dataclass(frozen=True, kw_only=True)
class WriteSelection:
    """Task: decide, and write the subset, the strata and the baselines' weights.

    Of a later round the files are about all pairs all the same: those that it did not see stay as they were decided.
    """

    run: Run
    config: SelectionConfig
    folder: Path

    @cached_property
    def evidence(self) -> Evidence:
        return Evidence.of(self.run)

    @cached_property
    def pairs(self) -> PairEvidence:
        return PairEvidence(folder=self.folder)

    def __call__(self) -> dict[str, Any]:
        subset = self.pairs.decide(self.config)
        uids = np.array(self.run.everything.column("uid"), object)
        rows = np.arange(len(uids))
        if self.run.previous is not None:
            before = self.run.previous.at("selection") / "curated.parquet"
            rows = np.flatnonzero(read_columns(before, "kept")["kept"])
        curated = self._with_others(rows, self._decisions(uids[rows].tolist(), subset))
        with atomic_path(self.folder / "curated.parquet") as aside:
            pq.write_table(curated, aside)
        table = self._strata_table(subset)
        write_columns(self.folder / "strata.parquet", table)
        weight = np.zeros(len(uids))
        weight[rows] = subset.weight
        self._write_weights(uids.tolist(), weight, int(subset.kept.sum()))
        return self._details(curated, subset) | {"harmful_strata": int(table["harmful"].sum())}

    def _with_others(self, rows: NDArray[np.int64], decisions: pa.Table) -> pa.Table:
        """The decisions on these rows of the pool amid those that were made before."""
        if self.run.previous is None:
            return decisions
        table = pq.read_table(self.run.previous.at("selection") / "curated.parquet")
        others = np.delete(np.arange(len(table)), rows)
        order = np.argsort(np.concatenate([rows, others]))
        return pa.concat_tables([decisions, table.take(pa.array(others))]).take(pa.array(order))

    def _write_weights(self, uids: list[str], curated: NDArray[np.float64], kept: int) -> None:
        quality = read_columns(self.run.first.at("proxies") / "quality.parquet", "clip_in", "neg_clip_in")
        weights = {
            "curated": curated,
            "everything": np.ones(len(uids)),
            "random": top_fraction(random_score(uids, self.run.seed), kept).astype(np.float64),
            "clip_score": top_fraction(self.run.everything.clip_score, kept).astype(np.float64),
            "proxy_clip_score": top_fraction(quality["clip_in"], kept).astype(np.float64),
            "neg_clip_loss": top_fraction(quality["neg_clip_in"], kept).astype(np.float64),
        }
        write_columns(self.folder / "weights.parquet", {name: weights[name] for name in METHODS})

    def _decisions(self, uids: list[str], subset: Subset) -> pa.Table:
        score, se = self.pairs.columns["score"], self.pairs.columns["score_se"]
        strata = self.evidence.strata
        labels = np.char.add(
            np.char.mod("c%03d/q", strata["cluster"]), np.char.mod("%02d", strata["quantile"])
        )
        values = (
            pa.array(uids, pa.string()),
            pa.array(subset.kept),
            *(pa.array(one.astype(np.float32)) for one in (subset.weight, score, se)),
            pa.array(labels.tolist(), pa.string()),
            pa.array(subset.reason.tolist(), pa.string()),
        )
        return pa.table(dict(zip(CURATED, values, strict=True)))

    def _strata_table(self, subset: Subset) -> Columns:
        scores, strata = self.evidence, self.evidence.strata
        leaves = scores.clusters * scores.quantiles
        leaf = strata["cluster"] * scores.quantiles + strata["quantile"]
        scored_leaf = leaf[scores.influence["pair"]]

        def scored(name: str) -> Means:
            return means_by(scored_leaf, scores.influence[name], leaves)

        variance = scores.pooled.se**2 + scores.common_variance
        table: Columns = {
            "cluster": np.repeat(np.arange(scores.clusters), scores.quantiles),
            "quantile": np.tile(np.arange(scores.quantiles), scores.clusters),
            "pairs": np.bincount(leaf, minlength=leaves),
            "scored": scored("influence").count,
            "quality": means_by(leaf, strata["quality"], leaves).mean,
            "influence_in": scored("influence_in").mean,
            "influence_out": scored("influence_out").mean,
            "influence": scored("influence").mean,
            "influence_se": np.sqrt(scored("influence").variance),
            "pooled": scores.pooled.mean.reshape(-1),
            "pooled_se": np.sqrt(variance).reshape(-1),
            "p_value": scores.p_values,
            "harmful": significantly_below_zero(scored("influence").mean, scores.p_values, FALSE_DISCOVERIES),
            "kept": means_by(leaf, subset.kept.astype(np.float64), leaves).mean,
        }
        names = [f"c{c:03d}/q{q:02d}" for c, q in zip(table["cluster"], table["quantile"])]
        return {"stratum": np.array(names), **table}

    def _details(self, curated: pa.Table, subset: Subset) -> dict[str, Any]:
        warnings = []
        along = directional(self.run.config) is not None
        if along and abs(self.evidence.convergence) > NOT_CONVERGED:
            warnings.append(
                f"the proxy has not converged: its mean in-sample influence is {self.evidence.convergence:.2f} standard "
                f"deviations (should be below {NOT_CONVERGED}); train it longer, or lower its learning rate"
            )
        if self.config.group_share and self.pairs.worst_group is None:
            warnings.append(
                f"selection.group_share = {self.config.group_share:g} has no effect: the target has no two groups of "
                f"{2 * MIN_GROUP_IMAGES} images or more, none is worse off, or the estimator scores along no direction"
            )
        score, se = self.pairs.columns["score"], self.pairs.columns["score_se"]
        threshold = self.config.tau_low * self.evidence.unit
        reasons, counts = np.unique(curated["reason"].to_pylist(), return_counts=True)
        return {
            "rule": rule_of(self.config),
            "margin": margin_that_held(score - threshold, se, subset.reason == HARMFUL, self.config),
            "threshold": threshold,
            "unit": self.evidence.unit,
            "kept_fraction": float(curated["kept"].to_numpy().mean()),
            "reasons": {str(reason): int(count) for reason, count in zip(reasons, counts)},
            "clusters": self.evidence.clusters,
            "quantiles": self.evidence.quantiles,
            "scored": len(self.evidence.influence["pair"]),
            "between_cluster_variance": self.evidence.pooled.shrinkage,
            "caption_control": asdict(self.evidence.caption_control),
            "warnings": warnings,
        }


def rule_of(config: SelectionConfig) -> str:
    """What makes a pair harmful, for the report."""
    threshold = f"{config.tau_low:g} SD" if config.tau_low else "0"
    if config.conservative:
        return f"upper bound of T < {threshold}"
    expected = (
        f"at most {100 * config.max_false_discovery:g} % of such pairs are expected to be above {threshold}"
    )
    more = f", or T < {threshold} as long as {expected}"
    return f"T + {config.margin_se:g} SE < {threshold}" + (
        more if config.max_false_discovery and config.margin_se else ""
    )


@dataclass(frozen=True)
class KeptRows:
    """Task: the rows of the embedding artifact that a subset kept, as the pool of a next round; how many they are."""

    pool: PairSet
    curated: Path
    out: Path

    def __call__(self) -> int:
        kept = read_columns(self.curated, "kept")["kept"].astype(bool)
        with atomic_path(self.out) as aside, aside.open("wb") as file:
            np.save(file, self.pool.rows[kept])
        return int(kept.sum())


class Selection(Stage):
    """Turns scores into curated.parquet, strata.parquet, weights.parquet and evidence.parquet."""

    name = "selection"
    needs = ("proxies", "redundancy", "influence", "fairness")

    def settings(self, config: Any) -> tuple[SelectionConfig, int]:
        return config.selection, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        workers.once(WriteEvidence(run=run, folder=workers.folder))
        config, trials = choose_weighting(run, PairEvidence(folder=workers.folder), workers)
        details = workers.once(WriteSelection(run=run, config=config, folder=workers.folder))
        details |= chosen(config) | {"trials": trials}
        rows = sum(details["reasons"].values())
        return Details(rows_in=rows, rows_out=rows, details=details)
