"""The curate stage: pooled influence, the decision on every pair, and the subsets of the baselines at the same size."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from influencespace.core.select import HARMFUL, SelectionConfig, Subset, margin_that_held, top_fraction
from influencespace.core.sequential import surely_below_zero
from influencespace.core.strata import Means, means_by
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen
from influencespace.data.buckets import Columns, read_columns, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, run_once
from influencespace.estimators.similarity import random_score
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.proxies.proxies import MIN_GROUP_IMAGES, ProxyConfig
from influencespace.stages.selection.evidence import Scores, decide
from influencespace.stages.selection.weighting import chosen, confirm

# clip_score is the given encoder's, as most people filter; the last two are by the proxy of all pairs
BASELINES = ("everything", "random", "clip_score", "proxy_clip_score", "neg_clip_loss")
METHODS = ("curated", *BASELINES)
DYNAMIC = "dynamic"  # begins as curated does, and re-weights the kept pairs while it trains
FALSE_DISCOVERIES = 0.05  # rate among the strata that are said to harm
UNSETTLED = 0.1  # |mean I_in| above this many standard deviations: the proxy is not at rest (algorithms, 6)


def weights_of(method: str) -> str:
    """The column of weights.parquet that a method begins with."""
    return "curated" if method == DYNAMIC else method


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What a later round is told: the pairs that it does not see stay dropped, with their score and reason."""

    pool: PairSet
    """All pairs."""
    quality: Path
    """Of all pairs, by the proxies of the first round."""
    curated: Path
    """The decisions until now, on all pairs."""


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Task: decide, and write the subset, the strata and the baselines' weights."""

    pool: PairSet
    scores: Scores
    quality: Path
    config: SelectionConfig
    folder: Path
    seed: int
    decided: Path | None = None
    """The decisions until now, where only the pairs that they keep have scores."""

    def __call__(self) -> dict[str, Any]:
        subset = decide(self.scores, self.config)
        uids = np.array(self.pool.column("uid"), object)
        rows = np.arange(len(uids))
        if self.decided is not None:
            rows = np.flatnonzero(read_columns(self.decided, "kept")["kept"])
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
        if self.decided is None:
            return decisions
        table = pq.read_table(self.decided)
        others = np.delete(np.arange(len(table)), rows)
        order = np.argsort(np.concatenate([rows, others]))
        return pa.concat_tables([decisions, table.take(pa.array(others))]).take(pa.array(order))

    def _write_weights(self, uids: list[str], curated: NDArray[np.float64], kept: int) -> None:
        quality = read_columns(self.quality, "clip_in", "neg_clip_in")
        weights = {
            "curated": curated,
            "everything": np.ones(len(uids)),
            "random": top_fraction(random_score(uids, self.seed), kept).astype(np.float64),
            "clip_score": top_fraction(self.pool.clip_score, kept).astype(np.float64),
            "proxy_clip_score": top_fraction(quality["clip_in"], kept).astype(np.float64),
            "neg_clip_loss": top_fraction(quality["neg_clip_in"], kept).astype(np.float64),
        }
        write_columns(self.folder / "weights.parquet", {name: weights[name] for name in METHODS})

    def _decisions(self, uids: list[str], subset: Subset) -> pa.Table:
        score, se = self.scores.joint_scores
        strata = self.scores.strata
        labels = np.char.add(
            np.char.mod("c%03d/q", strata["cluster"]), np.char.mod("%02d", strata["quantile"])
        )
        return pa.table(
            {
                "uid": pa.array(uids, pa.string()),
                "kept": pa.array(subset.kept),
                "weight": pa.array(subset.weight.astype(np.float32)),
                "score": pa.array(score.astype(np.float32)),
                "score_se": pa.array(se.astype(np.float32)),
                "stratum": pa.array(labels.tolist(), pa.string()),
                "reason": pa.array(subset.reason.tolist(), pa.string()),
            }
        )

    def _strata_table(self, subset: Subset) -> Columns:
        scores, strata = self.scores, self.scores.strata
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
            "harmful": surely_below_zero(scored("influence").mean, scores.p_values, FALSE_DISCOVERIES),
            "kept": means_by(leaf, subset.kept.astype(np.float64), leaves).mean,
        }
        names = [f"c{c:03d}/q{q:02d}" for c, q in zip(table["cluster"], table["quantile"])]
        return {"stratum": np.array(names), **table}

    def _details(self, curated: pa.Table, subset: Subset) -> dict[str, Any]:
        warnings = []
        if abs(self.scores.rest) > UNSETTLED:
            warnings.append(
                f"the proxy is not at rest: its mean in-training influence is {self.scores.rest:.2f} standard deviations "
                f"(should be below {UNSETTLED}); train it longer, or lower its learning rate"
            )
        if self.config.group_share and not self.scores.names_groups:
            warnings.append(
                f"curate.group_share = {self.config.group_share:g} has no effect: the target names no two groups of "
                f"{2 * MIN_GROUP_IMAGES} images or more, or none is worse off"
            )
        score, se = self.scores.joint_scores
        threshold = self.config.tau_low * self.scores.unit
        reasons, counts = np.unique(curated["reason"].to_pylist(), return_counts=True)
        return {
            "rule": rule_of(self.config),
            "margin": margin_that_held(score - threshold, se, subset.reason == HARMFUL, self.config),
            "threshold": threshold,
            "unit": self.scores.unit,
            "kept_fraction": float(curated["kept"].to_numpy().mean()),
            "reasons": {str(reason): int(count) for reason, count in zip(reasons, counts)},
            "clusters": self.scores.clusters,
            "quantiles": self.scores.quantiles,
            "scored": len(self.scores.influence["pair"]),
            "between_cluster_variance": self.scores.pooled.shrinkage,
            "caption_control": asdict(self.scores.caption_control),
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


def curate(
    pool: PairSet,
    target: PairSet,
    attribute_folder: Path,
    redundancy_folder: Path,
    fairness_folder: Path,
    proxy_folder: Path,
    inputs: dict[str, str],
    config: SelectionConfig,
    proxies: ProxyConfig,
    steps: int,
    seed: int,
    out: Path,
    engine: Engine,
    earlier: Earlier | None = None,
) -> Manifest:
    """Turn scores into curated.parquet, strata.parquet and weights.parquet.

    The scores are those of `pool`; with `earlier`, the files are about all pairs all the same.
    """
    mark = fingerprint({"stage": "curate", "config": config, "seed": seed, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    scores = Scores(attribute_folder, redundancy_folder, fairness_folder)
    confirmed, trials = confirm(pool, target, scores, config, proxies, steps, out, mark, engine)
    task = Curate(
        pool=earlier.pool if earlier else pool,
        scores=scores,
        quality=earlier.quality if earlier else proxy_folder / "quality.parquet",
        decided=earlier.curated if earlier else None,
        config=confirmed,
        folder=out,
        seed=seed,
    )
    details = run_once(engine, task)
    details |= chosen(confirmed) | {"trials": trials}
    rows = sum(details["reasons"].values())
    manifest = Manifest(
        stage="curate", fingerprint=mark, inputs=inputs, rows_in=rows, rows_out=rows, details=details
    )
    return finish_stage(out, manifest, began)
