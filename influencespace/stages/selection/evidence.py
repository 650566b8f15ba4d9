"""What the scores say about every pair: pooled influence with its standard error, and the decision that a config makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from influencespace.core.additive import Additive, fit_additive
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
from influencespace.data.artifacts import read_manifest
from influencespace.data.buckets import Columns, read_columns

FloatArray = NDArray[np.float64]
PRUNING_AXES = ("quality", "caption_images", "caption_agreement", "sharpness")
"""What harm is looked for along: how well a pair matches by the proxies, and what tells the dirt that a match does not.

Not the given encoder's opinion, nor how near a pair is to the target: pairs of little use are not wrong ones, and to
leave them out is for the weights, which real retraining has to confirm."""
VALUE_AXES = ("seen", "held_out", "given", "caption_images", "caption_agreement", "sharpness")
"""What weights follow: the match by the proxy that trained on the pair, by one that did not and by the given encoder, and
the same."""
KNOTS = 20  # of each axis


@dataclass(frozen=True)
class Scores:
    """The attribute stage's results, opened where they are used."""

    folder: Path
    copies: Path | None = None
    """The redundancy stage's; None where no pair is a copy of another, and no two have one image."""
    groups: Path | None = None
    """The fairness stage's, which may have found none that is worse off; None is the same."""

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
        found: FloatArray = np.load(self.folder / "p_values.npy")
        return found

    @cached_property
    def common_variance(self) -> FloatArray:
        """Squared standard error of each quantile's mean from the target (its folds) and the bank (its contexts): (Q,)."""
        target = read_columns(self.folder / "target.parquet")
        by_fold = self._means_of_repeats(target["pair"], target["by_target_fold"])
        by_batch = self._means_of_repeats(self.influence["pair"], self.influence["by_batch"])
        return spread_of_repeats(by_fold) + spread_of_repeats(by_batch)

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
            return {"leader": alone, "image": alone}
        return read_columns(self.copies / "copies.parquet")

    @property
    def leader(self) -> NDArray[np.int64]:
        """The pair of the pool that each pair is a copy of, itself where it is none (n,)."""
        return self._copies["leader"]

    @property
    def image(self) -> NDArray[np.int64]:
        """The image of each pair (n,)."""
        return self._copies["image"]

    @cached_property
    def joint_scores(self) -> tuple[FloatArray, FloatArray]:
        """Pooled influence and its standard error, copies judged together by their mean (n,), (n,)."""
        score, se = self.pair_scores
        return joint_mean(score, self.leader), joint_mean(se, self.leader)

    @cached_property
    def caption_control(self) -> CaptionControl:
        permuted = read_columns(self.folder / "caption_control.parquet")["influence_out"]
        # judged on a plain sample of the pool: the stratified one would count rare strata too often
        held_out, rows = self.influence["influence_out"], self.influence["pair"]
        weight = self._stands_for
        draw = np.random.default_rng(0).choice(len(rows), len(rows), p=weight / weight.sum())
        return caption_control(held_out[draw], self.strata["quality"][rows][draw], permuted)

    @cached_property
    def predicted(self) -> FloatArray:
        """Influence of every pair from all that is known of it (n,): what weights follow."""
        return self.additive(VALUE_AXES).predict(self._axes(VALUE_AXES))[0]

    @cached_property
    def clip_score(self) -> FloatArray:
        """The given encoder's, in the spread of what is predicted (n,)."""
        return spread_like(self.strata["given"], self.predicted)

    @property
    def names_groups(self) -> bool:
        """Whether some group of the target is worse off than others."""
        return self.groups is not None and (self.groups / "groups.parquet").exists()

    @cached_property
    def worst_off(self) -> int:
        """Which of the target's groups the proxy of all pairs serves worst, in their order, on the gradient's half."""
        manifest = None if self.groups is None else read_manifest(self.groups)
        assert manifest is not None, "asked of scores without groups"
        return int(np.argmax([group["loss"] for group in manifest.details["groups"]]))

    @cached_property
    def for_groups(self) -> FloatArray:
        """Influence of every pair on the groups of the target that are worse off (n,); zeros where there are none."""
        if self.groups is None or not self.names_groups:
            return np.zeros(len(self.strata["quality"]))
        return read_columns(self.groups / "groups.parquet")["influence"]

    @property
    def stratum(self) -> NDArray[np.int64]:
        """Of each pair, over all clusters (n,)."""
        return self.strata["cluster"] * self.quantiles + self.strata["quantile"]

    @cached_property
    def _stands_for(self) -> FloatArray:
        """How many pairs of the pool each scored pair stands for (m,)."""
        return pairs_stood_for(self.stratum, self.influence["pair"])

    @cached_property
    def rest(self) -> float:
        """Mean in-training influence in standard deviations: zero for a proxy at rest, and where there is no spread to tell."""
        values, weight = self.influence["influence_in"], self._stands_for
        return float(np.average(values, weights=weight)) / (weighted_deviation(values, weight) or np.inf)


def decide(scores: Scores, config: SelectionConfig) -> Subset:
    """The subset that a configuration makes of cached scores: cheap, for sweeps."""
    score, se = scores.joint_scores
    redundant = scores.leader != np.arange(len(score))
    predicted = scores.predicted
    if config.clip_score_share:
        predicted = predicted + config.clip_score_share * scores.clip_score
    if config.group_share and scores.names_groups:
        predicted = predicted + config.group_share * scores.for_groups
    return select(
        score,
        se,
        scores.unit,
        predicted,
        config,
        redundant,
        scores.image,
        scores.strata["group"] if config.min_group_share else None,
    )
