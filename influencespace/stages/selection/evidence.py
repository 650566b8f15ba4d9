"""What the scores say about every pair: pooled influence with its standard error, once for all decisions that are tried."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influencespace.core.additive import Additive, fit_additive
from influencespace.core.arrays import FloatArray
from influencespace.core.caption_control import CaptionControl, caption_control
from influencespace.core.redundancy import joint_mean
from influencespace.core.select import SelectionConfig, Subset, select, spread_like
from influencespace.core.strata import (
    Pooled,
    means_by,
    pairs_stood_for,
    pool,
    spread_of_repeats,
    weighted_deviation,
)
from influencespace.data.artifacts import write_json
from influencespace.data.buckets import Columns, read_columns, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.run import Run

PRUNING_AXES = ("quality", "caption_images", "caption_agreement", "sharpness")
"""What harm is looked for along: how well a pair matches by the proxies, and what shows the dirt that a match does not.

Not the given encoder's opinion, nor how near a pair is to the target: pairs of little use are not wrong ones, and to
leave them out is for the weights, which real retraining has to confirm."""
VALUE_AXES = ("in_sample", "out_of_fold", "pretrained", "caption_images", "caption_agreement", "sharpness")
"""What weights follow: the match by the proxy that trained on the pair, by one that did not and by the given encoder, and
the same."""
KNOTS = 20  # of each axis


@dataclass(frozen=True)
class Evidence:
    """The scores of a run's pairs, pooled; opened and computed where it is used."""

    folder: Path
    """The influence stage's."""
    copies: Path | None = None
    """The redundancy stage's; None where no pair is a copy of another, and no two have one image."""

    pool: PairSet | None = None

    @classmethod
    def of(cls, run: Run) -> "Evidence":
        return cls(run.at("influence"), run.at("redundancy"), run.pool)

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
        """Standard deviation of single balanced influences over the pool: what thresholds are given in."""
        return weighted_deviation(self.influence["influence"], self._stands_for)

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
    def p_values(self) -> FloatArray:
        """Of every leaf's mean influence on this target being zero, however often it was looked at (C * Q,)."""
        values: FloatArray = np.load(self.folder / "p_values.npy")
        return values

    @cached_property
    def common_variance(self) -> FloatArray:
        """Squared standard error of each quantile's mean from the target (its folds) and the bank (its batches): (Q,)."""
        target = read_columns(self.folder / "target.parquet")
        by_fold = self._means_of_repeats(target["pair"], target["by_target_fold"])
        by_batch = self._means_of_repeats(self.influence["pair"], self.influence["by_batch"])
        return spread_of_repeats(by_fold) + spread_of_repeats(by_batch)

    def _means_of_repeats(self, pairs: NDArray[np.int64], values: FloatArray) -> FloatArray:
        """Quantile means for each repeat: values (n, R) -> (R, Q); a pair that a batch cannot judge is left out of it."""
        quantile = self.strata["quantile"][pairs]
        means = []
        for column in values.T:
            known = np.isfinite(column)
            means.append(means_by(quantile[known], column[known], self.quantiles).mean)
        return np.nan_to_num(np.stack(means))

    @cached_property
    def pair_scores(self) -> tuple[FloatArray, FloatArray]:
        """Pooled influence and its standard error for every pair of the pool (n,), (n,)."""
        mean, se = self.additive(PRUNING_AXES).predict(self._axes(PRUNING_AXES))
        quality, quantile = self.strata["quality"], self.strata["quantile"]
        centres = means_by(quantile, quality, self.quantiles).mean
        return mean, np.sqrt(se**2 + np.interp(quality, centres, self.common_variance))

    def additive(self, names: Sequence[str]) -> Additive:
        """Influence as a sum of curves along these axes; copies are one piece of evidence, their mean, and count once."""
        alone, place = np.unique(self.leader[self.influence["pair"]], return_inverse=True)
        together = np.bincount(place, self._stands_for)
        influence = np.bincount(place, self._stands_for * self.influence["influence"]) / together
        stands_for = together / np.bincount(self.leader)[alone]
        return fit_additive(self._axes(names), alone, influence, KNOTS, stands_for)

    def _axes(self, names: Sequence[str]) -> FloatArray:
        return np.stack([self.strata[name] for name in names], 1)

    @cached_property
    def _copies(self) -> Columns:
        if self.copies is None:
            alone = np.arange(len(self.strata["quality"]))
            return {"leader": alone}
        return read_columns(self.copies / "copies.parquet")

    @property
    def leader(self) -> NDArray[np.int64]:
        """The pair of the pool that each pair is a copy of, itself where it is none (n,)."""
        return self._copies["leader"]

    @property
    def image(self) -> NDArray[np.int64]:
        """The image of each pair (n,)."""
        return self.leader if self.pool is None else self.pool.image

    @cached_property
    def joint_scores(self) -> tuple[FloatArray, FloatArray]:
        """Pooled influence and its standard error, copies judged together by their mean (n,), (n,)."""
        score, se = self.pair_scores
        return joint_mean(score, self.leader), joint_mean(se, self.leader)

    @cached_property
    def caption_control(self) -> CaptionControl:
        permuted = read_columns(self.folder / "caption_control.parquet")["influence_out"]
        out, rows, weight = self.influence["influence_out"], self.influence["pair"], self._stands_for
        # an estimator may score only pairs that a proxy was trained on
        out = np.where(np.isfinite(out), out, self.influence["influence"])
        # judged on a plain sample of the pool: the stratified one would count rare strata too often
        draw = np.random.default_rng(0).choice(len(rows), len(rows), p=weight / weight.sum())
        quality = self.strata["quality"][rows][draw]
        return caption_control(out[draw], quality, permuted[np.isfinite(permuted)])

    @cached_property
    def predicted(self) -> FloatArray:
        """Influence of every pair from all that is known of it (n,): what weights follow."""
        return self.additive(VALUE_AXES).predict(self._axes(VALUE_AXES))[0]

    @property
    def stratum(self) -> NDArray[np.int64]:
        """Of each pair, over all clusters (n,)."""
        return self.strata["cluster"] * self.quantiles + self.strata["quantile"]

    @cached_property
    def _stands_for(self) -> FloatArray:
        """How many pairs of the pool each scored pair stands for (m,)."""
        return pairs_stood_for(self.stratum, self.influence["pair"])

    @cached_property
    def convergence(self) -> float:
        """Mean in-sample influence in standard deviations: zero for a proxy that has converged, and where there is no spread."""
        values, weight = self.influence["influence_in"], self._stands_for
        return float(np.average(values, weights=weight)) / (weighted_deviation(values, weight) or np.inf)


EVIDENCE = ("score", "score_se", "predicted", "pretrained", "for_groups", "leader", "image", "group")
"""Columns of evidence.parquet, a row for each pair of the pool: pooled influence and its standard error, copies judged
together; influence predicted from all that is known; the given encoder's CLIP score in its spread; influence on groups that
are worse off; the pair that it is a copy of; image and group numbers."""


@dataclass(frozen=True, kw_only=True)
class PairEvidence:
    """What a decision is made of: the columns of evidence.parquet, opened where they are used."""

    folder: Path

    @cached_property
    def columns(self) -> Columns:
        return read_columns(self.folder / "evidence.parquet")

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.folder / "evidence.json").read_text(encoding="utf-8"))
        return facts

    @property
    def unit(self) -> float:
        """Standard deviation of single balanced influences over the pool: what thresholds are given in."""
        return float(self.facts["unit"])

    @property
    def worst_group(self) -> int | None:
        """Which of the target's groups the proxy of all pairs serves worst, in their order; None where none is worse off."""
        worst: int | None = self.facts["worst_group"]
        return worst

    def decide(self, config: SelectionConfig) -> Subset:
        """The subset that a configuration makes of it: cheap, for trials and sweeps."""
        columns = self.columns
        predicted = columns["predicted"]
        if config.clip_score_share:
            predicted = predicted + config.clip_score_share * columns["pretrained"]
        if config.group_share and self.worst_group is not None:
            predicted = predicted + config.group_share * columns["for_groups"]
        return select(
            columns["score"],
            columns["score_se"],
            self.unit,
            predicted,
            config,
            redundant=columns["leader"] != np.arange(len(predicted)),
            image=columns["image"],
            group=columns["group"] if config.min_group_share else None,
        )


@dataclass(frozen=True, kw_only=True)
class WriteEvidence:
    """Task: pool the evidence on every pair, once for all decisions that are tried."""

    run: Run
    folder: Path

    def __call__(self) -> None:
        evidence = Evidence.of(self.run)
        score, se = evidence.joint_scores
        predicted = evidence.predicted
        groups = self.run.at("fairness") / "groups.parquet"
        worst = None
        for_groups = np.zeros(len(score))
        if groups.exists():
            for_groups = read_columns(groups, "influence")["influence"]
            reported = self.run.manifest("fairness").details["groups"]
            worst = int(np.argmax([group["loss"] for group in reported]))
        values = (
            *(score, se, predicted, spread_like(evidence.strata["pretrained"], predicted), for_groups),
            *(evidence.leader, evidence.image, evidence.strata["group"]),
        )
        write_columns(self.folder / "evidence.parquet", dict(zip(EVIDENCE, values, strict=True)))
        write_json(self.folder / "evidence.json", {"unit": evidence.unit, "worst_group": worst})
