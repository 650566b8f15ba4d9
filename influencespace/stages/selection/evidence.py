"""What the scores say about every pair: influence pooled over the scored sample, and carried over to all pairs by their axes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from influencespace.core.additive import Additive, fit_additive
from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.caption_control import CaptionControl, caption_control
from influencespace.core.strata import (
    Pooled,
    cluster_means,
    means_by,
    pool,
    quantile_bounds,
    spread_of_repeats,
    weighted_deviation,
)
from influencespace.data.buckets import Columns, read_columns, read_rows
from influencespace.data.mirror import here
from influencespace.run import Run
from influencespace.stages.scoring.sampling import FACTS

PRUNING_AXES = ("quality", "caption_images", "caption_agreement", "sharpness")
"""What harm is looked for along: how well a pair matches by the proxies, and what shows the dirt that a match does not.

Not the given encoder's opinion, nor how near a pair is to the target: pairs of little use are not wrong ones, and to
leave them out is for the weights, which real retraining has to confirm."""
VALUE_AXES = ("in_sample", "out_of_fold", "pretrained", "caption_images", "caption_agreement", "sharpness")
"""What weights follow: the match by the proxy that trained on the pair, by one that did not and by the given encoder, and
the same."""
KNOTS = 20  # of each axis


def gathered(path: Path, rows: NDArray[np.int64], *names: str) -> Columns:
    """Columns of some rows of a table of the pool; all before the last one are read: samples are of its beginning."""
    columns = read_rows(path, slice(0, int(rows.max(initial=-1)) + 1), *names)
    return {name: values[rows] for name, values in columns.items()}


@dataclass(frozen=True)
class Evidence:
    """The scored sample of a run; opened and computed where it is used."""

    folder: Path
    """The influence stage's."""
    copies: Path | None = None
    """The redundancy stage's; None where no pair is a copy of another."""

    @classmethod
    def of(cls, run: Run) -> "Evidence":
        return cls(run.at("influence"), run.at("redundancy"))

    @cached_property
    def facts(self) -> dict[str, int]:
        facts: dict[str, int] = json.loads(here(self.folder / FACTS).read_text(encoding="utf-8"))
        return facts

    @property
    def pairs(self) -> int:
        """Of the pool."""
        return self.facts["pairs"]

    @property
    def clusters(self) -> int:
        return self.facts["clusters"]

    @property
    def quantiles(self) -> int:
        return self.facts["quantiles"]

    @cached_property
    def influence(self) -> Columns:
        """Of the scored pairs (m,)."""
        return read_columns(self.folder / "influence.parquet")

    @cached_property
    def sample(self) -> Columns:
        """Strata of the scored pairs (m,)."""
        return gathered(self.folder / "strata.parquet", self.influence["pair"])

    @cached_property
    def stands_for(self) -> FloatArray:
        """How many pairs of the pool, of the same quantile, each scored pair stands for (m,)."""
        size = np.diff(quantile_bounds(self.pairs, self.quantiles))
        quantile = self.sample["quantile"]
        scored: FloatArray = size[quantile] / np.bincount(quantile, minlength=self.quantiles)[quantile]
        return scored

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of single balanced influences over the pool: what thresholds are given in."""
        return weighted_deviation(self.influence["influence"], self.stands_for)

    @cached_property
    def pooled(self) -> Pooled:
        strata = self.sample
        return pool(
            self.influence["influence"], strata["cluster"], strata["quantile"], self.clusters, self.quantiles
        )

    def of_clusters(self, count: IntArray) -> tuple[FloatArray, FloatArray]:
        """Mean influence of each cluster's pairs and its standard error, by the pairs of each stratum (C, Q): two (C,)."""
        return cluster_means(self.pooled, count, self.common_variance)

    @cached_property
    def common_variance(self) -> FloatArray:
        """Squared standard error of each quantile's mean from the target (its folds) and the bank (its batches): (Q,)."""
        target = read_columns(self.folder / "target.parquet")
        quantile = gathered(self.folder / "strata.parquet", target["pair"], "quantile")["quantile"]
        by_fold = self._means_of_repeats(quantile, target["by_target_fold"])
        by_batch = self._means_of_repeats(self.sample["quantile"], self.influence["by_batch"])
        return spread_of_repeats(by_fold) + spread_of_repeats(by_batch)

    def _means_of_repeats(self, quantile: NDArray[np.int64], values: FloatArray) -> FloatArray:
        """Quantile means for each repeat: values (m, R) -> (R, Q); a pair that a batch cannot judge is left out of it."""
        means = []
        for column in values.T:
            known = np.isfinite(column)
            means.append(means_by(quantile[known], column[known], self.quantiles).mean)
        return np.nan_to_num(np.stack(means))

    def additive(self, names: Sequence[str]) -> Additive:
        """Influence as a sum of curves along these axes; copies are one piece of evidence, their mean, and count once."""
        copies = self._copies
        _, first, place = np.unique(copies["leader"], return_index=True, return_inverse=True)
        together = np.bincount(place, self.stands_for)
        influence = np.bincount(place, self.stands_for * self.influence["influence"]) / together
        return fit_additive(
            self._axes(self.sample, names)[first], influence, KNOTS, together / copies["copies"][first]
        )

    @staticmethod
    def _axes(strata: Columns, names: Sequence[str]) -> FloatArray:
        return np.stack([strata[name] for name in names], 1)

    @cached_property
    def _copies(self) -> Columns:
        """Of the scored pairs: the pair that each is a copy of, and how many such copies the pool has (m,)."""
        rows = self.influence["pair"]
        if self.copies is None:
            return {"leader": rows, "copies": np.ones(len(rows))}
        return gathered(self.copies / "copies.parquet", rows, "leader", "copies")

    @cached_property
    def carried_over(self) -> "CarriedOver":
        """What the sample says of any pair."""
        strata = self.sample
        return CarriedOver(
            pruning=self.additive(PRUNING_AXES),
            value=self.additive(VALUE_AXES),
            centres=means_by(strata["quantile"], strata["quality"], self.quantiles).mean,
            common_variance=self.common_variance,
        )

    @cached_property
    def caption_control(self) -> CaptionControl:
        permuted = read_columns(self.folder / "caption_control.parquet")["influence_out"]
        out, weight = self.influence["influence_out"], self.stands_for
        # an estimator may score only pairs that a proxy was trained on
        out = np.where(np.isfinite(out), out, self.influence["influence"])
        # judged on a plain sample of the pool: the stratified one would count some quantiles too often
        draw = np.random.default_rng(0).choice(len(out), len(out), p=weight / weight.sum())
        return caption_control(out[draw], self.sample["quality"][draw], permuted[np.isfinite(permuted)])

    @cached_property
    def convergence(self) -> float:
        """Mean in-sample influence in standard deviations: zero for a proxy that has converged, and where there is no spread."""
        values, weight = self.influence["influence_in"], self.stands_for
        return float(np.average(values, weights=weight)) / (weighted_deviation(values, weight) or np.inf)


@dataclass(frozen=True, kw_only=True)
class CarriedOver:
    """Influence of any pair by its axes; cheap to pickle."""

    pruning: Additive
    value: Additive
    centres: FloatArray  # (Q,) mean quality of each quantile
    common_variance: FloatArray  # (Q,)

    def __call__(self, strata: Columns) -> Columns:
        """Of pairs by their columns of strata.parquet: pooled influence `score`, its standard error `score_se`, and `predicted`,
        the influence predicted from all that is known of them, which weights follow (n,).
        """
        score, se = self.pruning.predict(Evidence._axes(strata, PRUNING_AXES))
        shared = np.interp(strata["quality"], self.centres, self.common_variance)
        predicted, _ = self.value.predict(Evidence._axes(strata, VALUE_AXES))
        return {"score": score, "score_se": np.sqrt(se**2 + shared), "predicted": predicted}
