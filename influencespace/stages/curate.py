"""The curate stage: pooled influence, the decision on every pair, and the subsets of the baselines at the same size."""

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from influencespace.core.placebo import Placebo, placebo_check
from influencespace.core.select import SelectConfig, Subset, select, top_fraction
from influencespace.core.strata import (
    Means,
    Pooled,
    interpolate,
    means_by,
    overruled,
    pool,
    spread_of_repeats,
)
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen
from influencespace.data.blocks import Columns, read_columns, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.similarity import random_score
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.runtime import Runtime, run_once

FloatArray = NDArray[np.float64]
# clip_score is the given encoder's, as most people filter; the last two are an early student's, the strongest simple filters
BASELINES = ("everything", "random", "clip_score", "student_clip_score", "neg_clip_loss")
METHODS = ("curated", *BASELINES)
UNSETTLED = 0.1  # |mean I_in| above this many standard deviations: the student is not at rest (algorithms, 6)


@dataclass(frozen=True)
class Scores:
    """The attribute stage's results, opened where they are used."""

    folder: Path

    @cached_property
    def strata(self) -> Columns:
        return read_columns(self.folder / "strata.parquet")

    @cached_property
    def influence(self) -> Columns:
        return read_columns(self.folder / "influence.parquet")

    @property
    def clusters(self) -> int:
        return int(self.strata["cluster"].max()) + 1

    @property
    def quantiles(self) -> int:
        return int(self.strata["quantile"].max()) + 1

    @cached_property
    def unit(self) -> float:
        """Standard deviation of single balanced influences: what thresholds are given in."""
        return float(self.influence["influence"].std())

    @cached_property
    def pooled(self) -> Pooled:
        rows = self.influence["pair"]
        return pool(
            self.influence["influence"],
            self.strata["cluster"][rows],
            self.strata["quantile"][rows],
            self.clusters,
            self.quantiles,
        )

    @cached_property
    def common_variance(self) -> FloatArray:
        """Squared standard error of each quantile's mean from the target (its folds) and the bank (its contexts): (Q,)."""
        target = read_columns(self.folder / "target.parquet")
        by_fold = self._means_of_repeats(target["pair"], target["by_target_fold"])
        by_context = self._means_of_repeats(self.influence["pair"], self.influence["by_context"])
        return spread_of_repeats(by_fold) + spread_of_repeats(by_context)

    def _means_of_repeats(self, pairs: NDArray[np.int64], values: FloatArray) -> FloatArray:
        """Quantile means for each repeat: values (n, R) -> (R, Q); a pair a context cannot judge is left out of it."""
        quantile = self.strata["quantile"][pairs]
        means = []
        for column in values.T:
            known = np.isfinite(column)
            means.append(means_by(quantile[known], column[known], self.quantiles).mean)
        return np.nan_to_num(np.stack(means))

    @cached_property
    def pair_scores(self) -> tuple[FloatArray, FloatArray]:
        """Pooled influence and its standard error for every pair of the pool (n,), (n,)."""
        quality, cluster, quantile = (self.strata[key] for key in ("quality", "cluster", "quantile"))
        centres = means_by(quantile, quality, self.quantiles).mean
        mean, se = overruled(self.pooled)
        variance = se**2 + self.common_variance
        score = interpolate(mean, centres, cluster, quality)
        return score, np.sqrt(interpolate(variance, centres, cluster, quality))

    @cached_property
    def placebo(self) -> Placebo:
        placebo = read_columns(self.folder / "placebo.parquet")["influence_out"]
        # judged on a plain sample of the pool: the stratified one would count rare strata too often
        held_out, rows = self.influence["influence_out"], self.influence["pair"]
        weight = self._pairs_a_scored_pair()
        draw = np.random.default_rng(0).choice(len(rows), len(rows), p=weight / weight.sum())
        return placebo_check(held_out[draw], self.strata["quality"][rows][draw], placebo)

    def _pairs_a_scored_pair(self) -> FloatArray:
        leaf = self.strata["cluster"] * self.quantiles + self.strata["quantile"]
        leaves = self.clusters * self.quantiles
        everywhere = np.bincount(leaf, minlength=leaves)
        scored_leaf = leaf[self.influence["pair"]]
        return everywhere[scored_leaf] / np.bincount(scored_leaf, minlength=leaves)[scored_leaf]

    @cached_property
    def rest(self) -> float:
        """Mean in-training influence in standard deviations: zero for a student at rest."""
        values = self.influence["influence_in"]
        weight = self._pairs_a_scored_pair()
        return float((values * weight).sum() / weight.sum() / values.std())


def decide(scores: Scores, config: SelectConfig) -> Subset:
    """The subset that a configuration makes of cached scores: cheap, for sweeps."""
    score, se = scores.pair_scores
    return select(score, se, scores.unit, scores.strata["quality"], config)


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Task: decide, and write the subset, the strata and the baselines' weights."""

    pool: PairSet
    scores: Scores
    quality: Path
    config: SelectConfig
    folder: Path
    seed: int

    def __call__(self) -> dict[str, Any]:
        subset = decide(self.scores, self.config)
        uids = list(map(str, self.pool.column("uid")))
        self._write_subset(uids, subset)
        write_columns(self.folder / "strata.parquet", self._strata_table(subset))
        quality = read_columns(self.quality, "clip_in", "neg_clip_in")
        kept = int(subset.kept.sum())
        weights = {
            "curated": subset.weight,
            "everything": np.ones(len(uids)),
            "random": top_fraction(random_score(uids, self.seed), kept).astype(np.float64),
            "clip_score": top_fraction(self.pool.clip_score, kept).astype(np.float64),
            "student_clip_score": top_fraction(quality["clip_in"], kept).astype(np.float64),
            "neg_clip_loss": top_fraction(quality["neg_clip_in"], kept).astype(np.float64),
        }
        write_columns(self.folder / "weights.parquet", {name: weights[name] for name in METHODS})
        return self._details(subset)

    def _write_subset(self, uids: list[str], subset: Subset) -> None:
        score, se = self.scores.pair_scores
        strata = self.scores.strata
        labels = np.char.add(
            np.char.mod("c%03d/q", strata["cluster"]), np.char.mod("%02d", strata["quantile"])
        )
        table = pa.table(
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
        with atomic_path(self.folder / "curated.parquet") as aside:
            pq.write_table(table, aside)

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
            "kept": means_by(leaf, subset.kept.astype(np.float64), leaves).mean,
        }
        names = [f"c{c:03d}/q{q:02d}" for c, q in zip(table["cluster"], table["quantile"])]
        return {"stratum": np.array(names), **table}

    def _details(self, subset: Subset) -> dict[str, Any]:
        warnings = []
        if abs(self.scores.rest) > UNSETTLED:
            warnings.append(
                f"the student is not at rest: its mean in-training influence is {self.scores.rest:.2f} standard deviations "
                f"(should be below {UNSETTLED}); train it longer, or lower its learning rate"
            )
        reasons, counts = np.unique(subset.reason, return_counts=True)
        return {
            "rule": "upper bound of T < 0" if self.config.cautious else "T < 0",
            "threshold": self.config.tau_low * self.scores.unit,
            "unit": self.scores.unit,
            "kept_fraction": float(subset.kept.mean()),
            "reasons": {str(reason): int(count) for reason, count in zip(reasons, counts)},
            "clusters": self.scores.clusters,
            "quantiles": self.scores.quantiles,
            "scored": len(self.scores.influence["pair"]),
            "between_cluster_variance": self.scores.pooled.shrinkage,
            "placebo": asdict(self.scores.placebo),
            "warnings": warnings,
        }


@dataclass(frozen=True)
class KeptRows:
    """Task: the rows of the embedding artifact that a subset kept, as the pool of a next round."""

    pool: PairSet
    curated: Path
    out: Path

    def __call__(self) -> None:
        kept = read_columns(self.curated, "kept")["kept"].astype(bool)
        with atomic_path(self.out) as aside, aside.open("wb") as file:
            np.save(file, self.pool.rows[kept])


def curate(
    pool: PairSet,
    attribute_folder: Path,
    student_folder: Path,
    inputs: dict[str, str],
    config: SelectConfig,
    seed: int,
    out: Path,
    runtime: Runtime,
) -> Manifest:
    """Turn scores into curated.parquet, strata.parquet and weights.parquet."""
    mark = fingerprint({"stage": "curate", "config": config, "seed": seed, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    task = Curate(
        pool=pool,
        scores=Scores(attribute_folder),
        quality=student_folder / "quality.parquet",
        config=config,
        folder=out,
        seed=seed,
    )
    details = run_once(runtime, task)
    rows = sum(details["reasons"].values())
    manifest = Manifest(
        stage="curate", fingerprint=mark, inputs=inputs, rows_in=rows, rows_out=rows, details=details
    )
    return finish_stage(out, manifest, began)
