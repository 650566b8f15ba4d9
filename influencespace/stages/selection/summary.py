"""What a selection reports: its strata with their pooled influence, its rule in words, and what the user should know."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from influencespace.core.arrays import FloatArray
from influencespace.core.rule import Pairs, Rule
from influencespace.core.select import HARMFUL, SelectionConfig, margin_that_held
from influencespace.core.strata import Means, means_by, significantly_below_zero
from influencespace.data.buckets import Columns, read_rows, write_columns
from influencespace.run import Run
from influencespace.stages.proxies.target import MIN_GROUP_IMAGES
from influencespace.stages.scoring.curvature import directional
from influencespace.stages.selection.evidence import Evidence
from influencespace.stages.selection.pair_evidence import Decision

FALSE_DISCOVERIES = 0.05  # rate among the strata that are reported as harmful
NOT_CONVERGED = 0.1  # |mean I_in| above this many standard deviations (algorithms, 6)


@dataclass(frozen=True)
class StrataCounts:
    """Statistic: of each stratum how many pairs it has, their sum of quality, and how many are kept (3, C * Q); and the least
    certain of the harmful pairs, in standard errors above the threshold.
    """

    rule: Rule
    clusters: int
    quantiles: int

    def observe(self, known: tuple[Pairs, Columns]) -> tuple[FloatArray, float]:
        pairs, strata = known
        subset, size = self.rule.decide(pairs), self.clusters * self.quantiles
        stratum = strata["cluster"] * self.quantiles + strata["quantile"]
        weights = None, strata["quality"], subset.kept.astype(np.float64)
        counts = np.stack([np.bincount(stratum, weight, size).astype(np.float64) for weight in weights])
        harmful = subset.reason == HARMFUL
        return counts, float(self.rule.certainty(pairs)[harmful].max(initial=-np.inf))

    def merge(
        self, left: tuple[FloatArray, float], right: tuple[FloatArray, float]
    ) -> tuple[FloatArray, float]:
        return left[0] + right[0], max(left[1], right[1])


@dataclass(frozen=True)
class ReadDecided:
    """What `StrataCounts` observes."""

    decision: Decision
    strata: Path

    def __call__(self, start: int, stop: int) -> tuple[Pairs, Columns]:
        names = ("cluster", "quantile", "quality")
        return self.decision.pairs(start, stop), read_rows(self.strata, slice(start, stop), *names)


def strata_table(evidence: Evidence, counts: FloatArray) -> Columns:
    """Columns of the selection's strata.parquet, a row for each cluster at each quantile; means of nothing are nan."""
    clusters, quantiles, pooled = evidence.clusters, evidence.quantiles, evidence.pooled
    stratum = evidence.sample["cluster"] * quantiles + evidence.sample["quantile"]

    def scored(name: str) -> Means:
        return means_by(stratum, evidence.influence[name], clusters * quantiles)

    mean, se = pooled.mean.reshape(-1), np.sqrt(pooled.se**2 + evidence.common_variance).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = 2 * ndtr(-np.abs(mean / se))
        quality, kept = counts[1:] / counts[0]
    p_value = np.where(counts[0] > 0, p_value, np.nan)
    table: Columns = {
        "cluster": np.repeat(np.arange(clusters), quantiles),
        "quantile": np.tile(np.arange(quantiles), clusters),
        "pairs": counts[0].astype(np.int64),
        "scored": scored("influence").count,
        "quality": quality,
        "influence_in": scored("influence_in").mean,
        "influence_out": scored("influence_out").mean,
        "influence": scored("influence").mean,
        "influence_se": np.sqrt(scored("influence").variance),
        "pooled": mean,
        "pooled_se": se,
        "p_value": p_value,
        "harmful": significantly_below_zero(mean, p_value, FALSE_DISCOVERIES),
        "kept": kept,
    }
    names = [f"c{c:03d}/q{q:02d}" for c, q in zip(table["cluster"], table["quantile"])]
    return {"stratum": np.array(names), **table}


@dataclass(frozen=True, kw_only=True)
class Summarise:
    """Task: write strata.parquet; what the manifest reports."""

    run: Run
    decision: Decision
    counts: FloatArray
    nearest: float
    folder: Path

    def __call__(self) -> dict[str, Any]:
        evidence, rule = Evidence.of(self.run), self.decision.rule
        table = strata_table(evidence, self.counts)
        write_columns(self.folder / "strata.parquet", table)
        return {
            "rule": rule_of(rule.config),
            "margin": margin_that_held(self.nearest, rule.config),
            "threshold": rule.config.tau_low * rule.deviation,
            "deviation": rule.deviation,
            "clusters": evidence.clusters,
            "quantiles": evidence.quantiles,
            "scored": len(evidence.influence["pair"]),
            "between_cluster_variance": evidence.pooled.shrinkage,
            "caption_control": asdict(evidence.caption_control),
            "warnings": self._warnings(evidence),
            "harmful_strata": int(table["harmful"].sum()),
        }

    def _warnings(self, evidence: Evidence) -> list[str]:
        warnings, config = [], self.decision.rule.config
        if directional(self.run.config) is not None and abs(evidence.convergence) > NOT_CONVERGED:
            warnings.append(
                f"the proxy has not converged: its mean in-sample influence is {evidence.convergence:.2f} standard "
                f"deviations (should be below {NOT_CONVERGED}); train it longer, or lower its learning rate"
            )
        if config.unit == "cluster" and evidence.clusters < 2:
            warnings.append(
                "selection.unit = cluster judges clusters, but there is one only: give cluster.k, or set selection.unit to pair"
            )
        if config.tau_high is not None and config.weighting == "uniform":
            warnings.append(
                f"selection.tau_high = {config.tau_high:g} has no effect: weights are uniform (selection.weighting)"
            )
        if config.group_share and self.decision.evidence.worst_group is None:
            warnings.append(
                f"selection.group_share = {config.group_share:g} has no effect: the target has no two groups of "
                f"{2 * MIN_GROUP_IMAGES} images or more, none is worse off, or the estimator scores along no direction"
            )
        return warnings


def rule_of(config: SelectionConfig) -> str:
    """What makes a pair harmful, for the report."""
    threshold = f"{config.tau_low:g} SD" if config.tau_low else "0"
    T = "T" if config.unit == "pair" else "T of the cluster"
    if config.conservative:
        return f"upper bound of {T} < {threshold}"
    expected = (
        f"at most {100 * config.max_false_discovery:g} % of such pairs are expected to be above {threshold}"
    )
    more = f", or {T} < {threshold} as long as {expected}"
    return f"{T} + {config.margin_se:g} SE < {threshold}" + (
        more if config.max_false_discovery and config.margin_se else ""
    )
