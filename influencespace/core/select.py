"""Settings of the decision, its weights, and the choice among candidates; `core/rule.py` decides."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass as options
from scipy.special import stdtrit

from influencespace.core.additive import Additive, fit_additive
from influencespace.core.histogram import Moments
from influencespace.core.strata import weighted_deviation
from influencespace.errors import STRICT

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

CHOSEN = ("weighting", "temperature", "group_share", "clip_score_share", "steps_factor")
"""Settings that retraining may choose in place of the config."""
KEPT, HARMFUL, OVER_SIZE, REDUNDANT = "kept", "harmful", "over target size", "redundant"


@options(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """How scores become a subset. Scores are proportional to the fall of the target loss: higher is more worth keeping."""

    unit: Literal["pair", "cluster"] = "pair"
    """What is judged: each pair by what its axes say of its influence, or each cluster by the mean influence of its pairs, which
    then leave or stay together. Of clusters, neither the CLIP score, nor groups, nor how many captions an image has, have a say.
    Multiples of a standard deviation are then of that of the clusters' means."""
    tau_low: float = Field(default=0.0, allow_inf_nan=False)
    """Prune pooled influence below this, as a multiple of the standard deviation of single influences."""
    tau_high: float | None = Field(default=None, allow_inf_nan=False)
    """`influence` weights follow only the part of influence that is above this, by the same standard deviation: what lies below
    counts alike. None: they follow all of it."""
    margin_se: float = Field(default=0.75, ge=0)
    """Standard errors by which pooled influence is below `tau_low` where a pair is pruned for itself: without any, pools with few
    wrong pairs lose too many right ones (docs/benchmarks.md)."""
    max_false_discovery: float = Field(default=0.05, ge=0, lt=1)
    """Where many pairs are surely harmful, others below `tau_low` go along, however large the margin, while no more than this
    share of those is expected to be above it. 0: none."""
    conservative: bool = False
    """Prune only where the upper 95 % bound of the pooled influence is below `tau_low`, whatever margin and false share."""
    target_size: float | None = Field(default=None, gt=0, le=1)
    """At most this fraction of the pool is kept: what helps least goes first, and further captions of an image before others."""
    min_group_share: float = Field(default=0.0, ge=0, le=1)
    """At least this share of every group's pairs, copies left out, is kept, the least harmful ones, whatever the rule and the
    size say. A group is what the data's `group` says; pairs without any are one group."""
    weighting: Literal["uniform", "influence", "auto"] = "uniform"
    """`uniform`: kept pairs count alike. `influence`: entropy-regularised weights of mean 1. `auto`: what real retraining
    likes best on the choosing half of the target, such weights at one of some temperatures or uniform ones, and then the
    steps. Not the default: weights that were confirmed on a target whose pictures the encoder knows were worth
    nothing on other pictures."""
    fairness: Literal["auto", "off"] = "auto"
    """`auto`: where the target names groups, weights are chosen that surely help the one that is worst off and leave the
    target as a whole no worse than uniform weights, if there are such; `off`: by the whole. Needs `weighting: auto`."""
    group_share: float = Field(default=0.0, ge=0)
    """How much influence on the groups that are worse off counts in what `influence` weights follow, and in what leaves first for
    a target size, beside influence on the whole target, which counts 1; `auto` finds its own."""
    clip_score_share: float = Field(default=0.0, ge=0)
    """How much the given encoder's CLIP score counts there, beside predicted influence, which counts 1, both by their standard
    deviation over the pool; `auto` finds its own."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of `influence` weights in standard deviations: larger is nearer to uniform. `auto` finds its own."""
    max_weight: float = Field(default=5.0, ge=1)
    """Cap of a weight."""
    steps_factor: float = Field(default=1.0, gt=0)
    """Steps that `curated` and `dynamic` train for, as a multiple of the proxies'; `auto` finds its own."""

    @field_validator("fairness", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # as YAML reads it

    def __post_init__(self) -> None:
        for name in ("clip_score_share", "group_share", "min_group_share"):
            if self.unit == "cluster" and getattr(self, name):
                raise ValueError(
                    f"{name} = {getattr(self, name):g} is for pairs: set it to 0, or unit to pair"
                )

    @property
    def serves_groups(self) -> bool:
        """Whether the decision may serve groups that are worse off."""
        if self.unit == "cluster":
            return False
        asked = self.weighting == "influence" and self.group_share > 0
        return asked or self.weighting == self.fairness == "auto"

    def steps(self, of_proxies: int) -> int:
        """That `curated` trains for, where the proxies train for so many."""
        return max(1, round(self.steps_factor * of_proxies))

    @property
    def standard_errors(self) -> float:
        """How many must be added to a score that is still below the threshold, for a pair that is pruned for itself."""
        return 1.96 if self.conservative else self.margin_se


@dataclass(frozen=True, kw_only=True)
class Subset:
    """What becomes of each pair of the pool."""

    kept: BoolArray  # (n,)
    weight: FloatArray  # (n,) 0 where dropped, mean 1 over the kept
    reason: NDArray[np.str_]  # (n,)


def margin_that_held(nearest: float, config: SelectionConfig) -> float:
    """Standard errors that part harmful pairs from the others: the rule's, or fewer where less certain ones went along.

    `nearest` is the least certain of them, in standard errors above the threshold.
    """
    return float(np.clip(-nearest, 0.0, config.standard_errors))


def capped_weights(utility: FloatArray, cap: float) -> FloatArray:
    """argmax_w sum w u - sum w log w with mean 1 and w <= cap: utility (n,) -> weights (n,).

    The solution is min(cap, c e^u); c is found by fixing the capped rows and rescaling the rest.
    """
    weight = np.full(len(utility), cap, np.float64)
    free = np.ones(len(utility), bool)
    while free.any():
        # relative to the largest that is left, because far below the largest of all e^u vanishes
        raw = np.exp(utility[free] - utility[free].max())
        weight[free] = raw * (len(weight) - cap * (~free).sum()) / raw.sum()
        over = weight > cap
        if not over.any():
            break
        weight[over] = cap
        free &= ~over
    return weight


def spread_like(values: FloatArray, other: FloatArray) -> FloatArray:
    """Values (n,) moved and scaled to mean zero and the standard deviation of others (n,); zeros where they are nan."""
    return spread_by(values, Moments.of(values), Moments.of(other))


def spread_by(values: FloatArray, own: Moments, other: Moments) -> FloatArray:
    """`spread_like` of some values (n,) of a column, by the moments of the whole columns."""
    if own.deviation <= 1e-12 * abs(own.mean):  # rounding gives equal values a spread
        return np.zeros(len(values))
    moved: FloatArray = np.nan_to_num((values - own.mean) / own.deviation) * other.deviation
    return moved


@dataclass(frozen=True, kw_only=True)
class WeightsAlong:
    """Weights of any pairs, min(cap, c e^u) by what their axes say of influence u: of mean 1 over those that it was fitted to."""

    additive: Additive | None
    """None where nothing is known: all weights are 1."""
    clip_score_share: float
    clip_score: Moments
    predicted: Moments
    temperature: float
    """In units of influence."""
    log_factor: float
    cap: float

    def __call__(self, axes: FloatArray, clip_score: FloatArray) -> FloatArray:
        """Of pairs by their axes (m, A) and their CLIP scores (m,): (m,)."""
        if self.additive is None:
            return np.ones(len(axes))
        weights: FloatArray = np.exp(
            np.minimum(self.log_factor + self._utility(axes, clip_score), np.log(self.cap))
        )
        return weights

    def _utility(self, axes: FloatArray, clip_score: FloatArray) -> FloatArray:
        assert self.additive is not None
        added = spread_by(clip_score, self.clip_score, self.predicted)
        return (self.additive.predict(axes)[0] + self.clip_score_share * added) / self.temperature


def weights_along(
    axes: FloatArray,
    rows: IntArray,
    influence: FloatArray,
    *,
    stands_for: FloatArray,
    knots: int,
    config: SelectionConfig,
    clip_score: FloatArray,
) -> WeightsAlong:
    """Fit weights to what axes (n, A) say of the influence (m,) of the pairs `rows` (m,).

    The temperature is in standard deviations of single influences over the pool, of which each scored pair `stands_for` so many
    (m,), so that their unit does not matter; the `clip_score` (n,) counts as the config says. With fewer than two scored pairs
    nothing is known, and weights are equal.
    """
    known = len(influence) >= 2
    additive = fit_additive(axes[rows], influence, knots, stands_for) if known else None
    deviation = (weighted_deviation(influence, stands_for) if known else 1.0) or 1.0
    fitted = WeightsAlong(
        additive=additive,
        clip_score_share=config.clip_score_share,
        clip_score=Moments.of(clip_score),
        predicted=Moments.of(additive.predict(axes)[0]) if additive else Moments(),
        temperature=deviation * config.temperature,
        log_factor=0.0,
        cap=config.max_weight,
    )
    if additive is None:
        return fitted
    utility = fitted._utility(axes, clip_score)
    # those below the cap have this factor, those at it would need less
    factor = np.log(capped_weights(utility, config.max_weight)) - utility
    return replace(fitted, log_factor=float(factor.max(initial=-np.inf)))


def top_fraction(score: FloatArray, keep: int) -> BoolArray:
    """The `keep` rows of highest score (n,) -> (n,), ties by order."""
    chosen = np.zeros(len(score), bool)
    chosen[np.argsort(-score, kind="stable")[:keep]] = True
    return chosen


def best_candidate(losses: FloatArray) -> int:
    """The candidate of the lowest mean loss, the first of equal ones, never one whose proxy diverged: (candidates, folds).

    No gain has to be significant: with a small target only large ones ever are.
    """
    return int(np.argmin(np.nan_to_num(losses.mean(1), nan=np.inf)))


def fairest_candidate(losses: FloatArray, worst_off: FloatArray, level: float = 0.05) -> int:
    """The candidate that does most for the group that is worst off, if any surely does, else the one that is best on the whole.

    `losses` (candidates, folds) of the whole target, `worst_off` the same for that group, with folds of its own; which group
    it is must be known from other pairs. They are means over seeds, by fold of the target's images. None that is worse on the
    whole than the first is taken for the group: nobody is served at the cost of everybody. Sure is a t-test against the first
    over the folds, paired, one-sided, whose error is `level` for all candidates together (Bonferroni).
    """
    gains = worst_off[0] - worst_off[1:]  # (candidates - 1, folds)
    count = gains.shape[1]
    if count >= 2 and len(gains):
        able = losses[1:].mean(1) <= losses[0].mean()
        error = np.maximum(gains.std(1, ddof=1), np.finfo(np.float64).tiny) / np.sqrt(count)
        sure = able & (gains.mean(1) / error > stdtrit(count - 1, 1 - level / len(gains)))
        if sure.any():
            return 1 + int(np.argmax(np.where(sure, gains.mean(1), -np.inf)))
    return best_candidate(losses)
