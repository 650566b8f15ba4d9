"""Laws of the decision: thresholds in standard deviations, exact sizes, weights of mean one below their cap."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from scipy.stats import norm
from whole_decision import by_ranges, looped, pairs_of, rule_for, whole

from influencespace.core import histogram, rule
from influencespace.core import select as module
from influencespace.core.additive import fit_additive
from influencespace.core.rule import _refuse, find_level, leveled
from influencespace.core.select import (
    HARMFUL,
    KEPT,
    OVER_SIZE,
    REDUNDANT,
    SelectionConfig,
    Subset,
    best_candidate,
    capped_weights,
    margin_that_held,
    spread_like,
    weights_along,
)
from influencespace.errors import InputError

finite = st.floats(-3, 3, allow_nan=False)


def select(
    score: np.ndarray,
    se: np.ndarray,
    deviation: float,
    predicted: np.ndarray,
    config: SelectionConfig,
    **known: np.ndarray,
) -> Subset:
    """The decision by passes over ranges of seven pairs, where it leaves images enough."""
    pairs = pairs_of(score, se, predicted, **known)
    with pytest.MonkeyPatch.context() as patch:
        if "image" not in known:
            patch.setattr(rule, "_refuse", lambda kept, config, rows: _refuse((kept[0], 0, 1), config, rows))
        return by_ranges(pairs, deviation, config)


def below_threshold(
    excess: np.ndarray, se: np.ndarray, config: SelectionConfig, counted: np.ndarray | None = None
) -> np.ndarray:
    """Which pairs are harmful; two more, which are not, keep the subset from being empty."""
    counted = np.ones(len(excess), bool) if counted is None else counted
    more = [np.append(values, [last] * 2) for values, last in ((excess, 1.0), (se, 0.0))]
    pairs = pairs_of(*more, more[0], redundant=np.append(~counted, [False] * 2))
    return rule_for(pairs, 1.0, config, 7).harmful(pairs)[:-2]


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, standard errors and predicted influence of some pairs."""
    n = draw(st.integers(1, 40))
    column = st.lists(finite, min_size=n, max_size=n).map(np.array)
    return draw(column), np.abs(draw(column)), draw(column)


@given(pairs=scored(), deviation=st.floats(0.1, 5), tau_low=st.floats(-1, 1))
def test_what_is_below_the_threshold_goes(
    pairs: tuple[np.ndarray, ...], deviation: float, tau_low: float
) -> None:
    score, se, predicted = pairs
    assume((score >= tau_low * deviation).any())
    subset = select(score, se, deviation, predicted, SelectionConfig(tau_low=tau_low, margin_se=0))
    np.testing.assert_array_equal(subset.kept, score >= tau_low * deviation)
    np.testing.assert_array_equal(subset.reason, np.where(subset.kept, KEPT, HARMFUL))
    np.testing.assert_array_equal(subset.weight, subset.kept.astype(float))


@given(pairs=scored(), rate=st.floats(0, 0.5))
def test_where_many_are_significantly_harmful_some_less_sure_ones_go_along(
    pairs: tuple[np.ndarray, ...], rate: float
) -> None:
    score, se, _ = pairs
    config = SelectionConfig(max_false_discovery=rate)
    harmful = below_threshold(score, se, config)
    sure = score + config.margin_se * se < 0
    assert (harmful >= sure).all()
    assert not (harmful & (score >= 0)).any()
    with np.errstate(over="ignore"):
        ratio = [s / e if e else -np.inf for s, e in zip(score, se, strict=True) if s < 0]
    certainty = np.array(ratio)  # those that are equally certain go together
    above = norm.cdf(certainty)
    surest = [
        certainty <= value for value in np.unique(certainty) if above[certainty <= value].mean() <= rate
    ]
    along = surest[-1] if surest and rate else np.zeros(len(above), bool)
    np.testing.assert_array_equal(harmful[score < 0], sure[score < 0] | along)


def test_the_more_are_significantly_harmful_the_more_doubtful_ones_go_with_them() -> None:
    doubtful, good = np.linspace(-0.25, -0.15, 10), np.full(10, 5.0)
    for sure, gone in ((0, 0), (10, 1), (60, 8), (600, 10)):
        score = np.concatenate([np.full(sure, -9.0), doubtful, good])
        harmful = below_threshold(score, np.ones(len(score)), SelectionConfig())
        assert harmful[sure : sure + 10].tolist() == [True] * gone + [False] * (10 - gone)
        assert harmful[:sure].all()
        assert not harmful[sure + 10 :].any()
        only = below_threshold(score, np.ones(len(score)), SelectionConfig(max_false_discovery=0))
        assert only.sum() == sure
        held = margin_that_held(score[harmful].max(initial=-np.inf), SelectionConfig())
        np.testing.assert_array_equal(harmful, score < -held + 1e-12 if gone else score < -held)
        assert held == pytest.approx(SelectionConfig().margin_se if gone == 0 else -doubtful[gone - 1])


def test_copies_of_a_harmful_pair_take_no_other_pair_along() -> None:
    score = np.concatenate([np.full(600, -9.0), np.linspace(-0.25, -0.15, 10), np.full(10, 5.0)])
    leader = np.arange(len(score)) == 0
    leader[600:] = True
    harmful = below_threshold(score, np.ones(len(score)), SelectionConfig(), leader)
    assert harmful[:600].all()
    assert not harmful[600:].any()
    copies = select(score, np.ones(len(score)), 1.0, score, SelectionConfig(), redundant=~leader)
    np.testing.assert_array_equal(copies.reason == HARMFUL, harmful)


def test_a_margin_is_kept_to_where_nothing_may_go_along() -> None:
    score = np.array([-40.0, 5.0])
    assert not below_threshold(score, np.ones(2), SelectionConfig(margin_se=100, max_false_discovery=0)).any()


@given(pairs=scored())
def test_caution_keeps_all_that_the_plain_rule_keeps_and_what_is_uncertain(
    pairs: tuple[np.ndarray, ...],
) -> None:
    score, se, predicted = pairs
    assume((score >= 0).any())
    plain = select(score, se, 1.0, predicted, SelectionConfig(margin_se=0))
    conservative = select(score, se, 1.0, predicted, SelectionConfig(conservative=True))
    assert (conservative.kept >= plain.kept).all()
    np.testing.assert_array_equal(conservative.kept, score + 1.96 * se >= 0)


@given(pairs=scored(), size=st.floats(0.01, 1))
def test_a_target_size_is_met_exactly_and_what_helps_least_goes(
    pairs: tuple[np.ndarray, ...], size: float
) -> None:
    score, se, predicted = pairs
    assume((score >= 0).any())
    subset = select(score, se, 1.0, predicted, SelectionConfig(target_size=size, margin_se=0))
    helpful = score >= 0
    assert subset.kept.sum() == min(helpful.sum(), max(1, round(size * len(score))))
    assert not (subset.kept & ~helpful).any()
    over = subset.reason == OVER_SIZE
    np.testing.assert_array_equal(over, helpful & ~subset.kept)
    if over.any():
        assert predicted[over].max() <= predicted[subset.kept].min()


@given(pairs=scored(), size=st.floats(0.1, 1))
def test_copies_go_before_anything_that_helps(pairs: tuple[np.ndarray, ...], size: float) -> None:
    score, _, predicted = pairs
    leader = np.arange(len(score)) // 2 * 2
    score = score[leader]  # copies have the score of their group
    copy = leader != np.arange(len(score))
    assume((score >= 0).any())
    config = SelectionConfig(target_size=size, margin_se=0)
    subset = select(score, np.zeros_like(score), 1.0, predicted, config, redundant=copy)
    np.testing.assert_array_equal(subset.reason == HARMFUL, score < 0)
    np.testing.assert_array_equal(subset.reason == REDUNDANT, (score >= 0) & copy)
    distinct = int(((score >= 0) & ~copy).sum())
    assert subset.kept.sum() == min(distinct, max(1, round(size * len(score))))


def test_a_further_caption_of_an_image_counts_half_a_deviation_less() -> None:
    """The third pair is the second of its image, and too little above the first to stay before it."""
    predicted = np.array([0.0, 1.0, 0.2, 1.0])
    config = SelectionConfig(target_size=0.75)
    nothing = np.zeros(4)
    subset = select(nothing, nothing, 1.0, predicted, config, image=np.array([0, 1, 1, 2]))
    assert subset.reason.tolist() == [KEPT, KEPT, OVER_SIZE, KEPT]
    assert select(nothing, nothing, 1.0, predicted, config).reason.tolist() == [OVER_SIZE, KEPT, KEPT, KEPT]


def test_a_subset_without_pairs_is_refused() -> None:
    with pytest.raises(InputError, match=r"every pair scores below tau_low = 0\.0"):
        select(np.array([-1.0, -2.0]), np.zeros(2), 1.0, np.zeros(2), SelectionConfig())


@given(pairs=scored(), temperature=st.floats(0.05, 10), cap=st.floats(1, 8))
def test_influence_weights_have_mean_one_rise_with_what_is_predicted_and_stay_below_the_cap(
    pairs: tuple[np.ndarray, ...], temperature: float, cap: float
) -> None:
    score, se, predicted = pairs
    assume((score >= 0).any())
    config = SelectionConfig(weighting="influence", temperature=temperature, max_weight=cap, margin_se=0)
    subset = select(score, se, 1.0, predicted, config)
    kept = subset.weight[subset.kept]
    assert kept.mean() == pytest.approx(1, rel=1e-4)
    assert kept.max() <= cap
    assert (subset.weight[~subset.kept] == 0).all()
    assert (np.diff(kept[np.argsort(predicted[subset.kept])]) >= -1e-9).all()


@given(slope=st.floats(0.5, 5), temperature=st.floats(0.2, 5), cap=st.floats(1.5, 8), seed=st.integers(0, 99))
def test_weights_along_an_axis_follow_what_it_says_of_influence_in_any_unit(
    slope: float, temperature: float, cap: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    axes, other = generator.normal(size=(300, 2)), generator.normal(size=300)
    rows, stands_for = generator.permutation(300)[:200], generator.uniform(1, 3, 200)
    influence = slope * axes[rows, 0] + 0.1 * generator.normal(size=200)
    rule = SelectionConfig(temperature=temperature, max_weight=cap, clip_score_share=0.3)
    fitted = weights_along(
        axes, rows, influence, stands_for=stands_for, knots=5, config=rule, clip_score=other
    )
    weight = fitted(axes, other)
    np.testing.assert_allclose(
        np.concatenate([fitted(axes[:7], other[:7]), fitted(axes[7:], other[7:])]), weight
    )
    predicted, _ = fit_additive(axes[rows], influence, 5, stands_for).predict(axes)
    followed = predicted + 0.3 * spread_like(other, predicted)
    deviation = np.sqrt(np.cov(influence, aweights=stands_for, bias=True))
    np.testing.assert_allclose(weight, capped_weights(followed / deviation / temperature, cap))
    assert weight.mean() == pytest.approx(1)
    assert weight.max() <= cap * (1 + 1e-9)
    assert weight[axes[:, 0] > 1].mean() > weight[axes[:, 0] < -1].mean()
    again = weights_along(
        axes, rows, 1e-6 * influence, stands_for=stands_for, knots=5, config=rule, clip_score=other
    )(axes, other)
    np.testing.assert_allclose(again, weight, 1e-6)


@pytest.mark.parametrize("influence", [[], [1.0], [2.0] * 30], ids=["none", "one", "all alike"])
def test_weights_are_equal_where_nothing_is_known(influence: list[float]) -> None:
    axes = np.random.default_rng(0).normal(size=(40, 2))
    rows, alike = np.arange(len(influence)), np.ones(len(influence))
    rule = SelectionConfig(clip_score_share=0.5)
    weight = weights_along(
        axes, rows, np.array(influence), stands_for=alike, knots=5, config=rule, clip_score=np.arange(40.0)
    )(axes, np.arange(40.0))
    np.testing.assert_allclose(weight, 1.0, atol=1e-6)


@given(utility=st.lists(st.floats(-2, 2), min_size=2, max_size=20).map(np.array), cap=st.floats(1.1, 4))
def test_weights_maximise_utility_less_entropy(utility: np.ndarray, cap: float) -> None:
    """No feasible shift of weight from one pair to another raises the objective."""

    def objective(weight: np.ndarray) -> float:
        return float((weight * utility - weight * np.log(weight)).sum())

    weight = capped_weights(utility, cap)
    best = objective(weight)
    for giver in range(len(weight)):
        for taker in range(len(weight)):
            moved = weight.copy()
            share = min(0.01, moved[giver] / 2, cap - moved[taker])
            moved[giver] -= share
            moved[taker] += share
            if giver != taker and share > 0:
                assert objective(moved) <= best + 1e-6


@pytest.mark.parametrize("cap", [1.0, 1.5, 3.0])
def test_utilities_far_apart_have_weights(cap: float) -> None:
    """A low temperature makes e^u vanish for most pairs."""
    weight = capped_weights(np.array([0.0, -1000.0, -2000.0, -3000.0]), cap)
    assert np.isfinite(weight).all()
    assert weight.mean() == pytest.approx(1)
    assert weight.max() <= cap
    assert (np.diff(weight) <= 0).all()


@given(tau_high=st.floats(-1, 3), temperature=st.floats(0.2, 3))
def test_weights_follow_what_is_above_tau_high(tau_high: float, temperature: float) -> None:
    score = np.linspace(0, 2, 40)
    config = SelectionConfig(
        weighting="influence", tau_high=tau_high, temperature=temperature, max_weight=1e6, margin_se=0
    )
    weight = select(score, np.zeros(40), 0.5, score, config).weight
    above = score / 0.5 > tau_high
    np.testing.assert_allclose(weight[~above], weight.min())
    followed = np.maximum(score / 0.5 - tau_high, 0) / temperature
    np.testing.assert_allclose(np.log(weight / weight[0]), followed - followed[0], atol=1e-9)
    assert weight.mean() == pytest.approx(1)


def test_clusters_are_not_weighed_by_what_is_of_pairs() -> None:
    for name in ("clip_score_share", "group_share", "min_group_share"):
        with pytest.raises(ValueError, match=f"{name} = 0.5 is for pairs: set it to 0, or unit to pair"):
            SelectionConfig(unit="cluster", **{name: 0.5})
    assert not SelectionConfig(unit="cluster", weighting="auto").serves_groups


def test_a_high_temperature_is_uniform() -> None:
    score = np.linspace(0, 2, 9)
    subset = select(score, score, 1.0, score, SelectionConfig(weighting="influence", temperature=1e9))
    np.testing.assert_allclose(subset.weight, 1)


@given(score=st.lists(st.integers(0, 4).map(float), min_size=1, max_size=30).map(np.array), data=st.data())
def test_the_top_fraction_has_its_size_and_no_better_row_outside(
    score: np.ndarray, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, len(score)))
    chosen = module.top_fraction(score, keep)
    assert chosen.sum() == keep
    if 0 < keep < len(score):
        assert score[chosen].min() >= score[~chosen].max()


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_size": 0},
        {"target_size": 1.1},
        {"max_weight": 0.5},
        {"temperature": 0},
        {"margin_se": -1},
        {"tau_low": float("nan")},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SelectionConfig(**wrong)


@given(
    score=arrays(np.float64, 40, elements=st.floats(-1, 1)),
    floor=st.floats(0, 1),
    size=st.none() | st.floats(0.1, 1),
    seed=st.integers(0, 99),
)
def test_every_group_keeps_its_floor_and_no_copy_comes_back(
    score: np.ndarray, floor: float, size: float | None, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    group, copy = generator.integers(0, 3, 40), generator.random(40) < 0.2
    score[0], copy[0] = 1.0, False
    config = SelectionConfig(margin_se=0, target_size=size, weighting="uniform")
    before = select(score, np.zeros(40), 1.0, score, config, redundant=copy, group=group)
    after = select(
        score, np.zeros(40), 1.0, score, replace(config, min_group_share=floor), redundant=copy, group=group
    )
    assert (after.kept >= before.kept).all()
    assert not after.kept[copy].any()
    np.testing.assert_array_equal(after.reason == KEPT, after.kept)
    np.testing.assert_array_equal(after.weight > 0, after.kept)
    for name in range(3):
        mine = (group == name) & ~copy
        assert after.kept[mine].sum() >= floor * mine.sum() - 1e-6
        back, out = mine & after.kept & ~before.kept, mine & ~after.kept
        if back.any() and out.any():
            assert score[back].min() >= score[out].max()


@given(
    values=st.lists(finite, min_size=2, max_size=30).map(np.array), factor=st.floats(0.1, 10), shift=finite
)
def test_another_score_takes_the_spread_of_what_it_is_added_to(
    values: np.ndarray, factor: float, shift: float
) -> None:
    other = np.array([1.0, 2.0, 4.0])
    assume(values.std() > 1e-3)
    moved = spread_like(values, other)
    assert moved.mean() == pytest.approx(0, abs=1e-9)
    assert moved.std() == pytest.approx(other.std())
    assert np.corrcoef(moved, values)[0, 1] == pytest.approx(1)
    np.testing.assert_allclose(spread_like(factor * values + shift, other), moved, atol=1e-6)
    unknown = np.append(values, np.nan)
    np.testing.assert_allclose(spread_like(unknown, other), np.append(moved, 0.0))


def test_a_score_that_tells_nothing_adds_nothing() -> None:
    for nothing in (np.full(3, 0.2), np.full(3, np.nan), np.empty(0)):
        assert not spread_like(nothing, np.array([1.0, 2.0])).any()


def test_influences_that_are_all_alike_leave_weights_equal() -> None:
    config = SelectionConfig(weighting="influence", margin_se=0)
    weight = select(np.full(9, 0.5), np.full(9, 0.1), 0.0, np.full(9, 0.5), config).weight
    np.testing.assert_array_equal(weight, 1.0)


def test_a_candidate_whose_proxy_diverged_is_never_the_best() -> None:
    assert best_candidate(np.array([[1.0, 1.0], [0.5, np.nan], [0.9, 0.9]])) == 2


def test_pairs_of_one_image_are_no_subset() -> None:
    score, image = np.arange(1.0, 9.0), np.repeat(np.arange(4), 2)
    config = SelectionConfig(target_size=0.1)
    with pytest.raises(InputError, match=r"only 1 of 8 pairs would be kept.*raise target_size"):
        select(score, np.full(8, 0.1), 1.0, score, config, image=image)


def outcome(decide: Callable[..., Subset], *given: Any) -> Subset | str:
    """The subset, or why there is none."""
    try:
        return decide(*given)
    except InputError as error:
        return str(error)


@st.composite
def pools(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Pairs with copies, images and groups; many are equal."""
    n = draw(st.integers(2, 60))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    places = draw(st.integers(0, 3))
    leader = np.arange(n)
    copies = leader[(leader > n // 2) & (generator.random(n) < 0.4)]
    leader[copies] = generator.integers(0, n // 2, len(copies))
    columns = {
        "score": generator.normal(size=n).round(places)[leader],
        "se": np.abs(generator.normal(size=n).round(places))[leader],
        "predicted": generator.normal(size=n).round(places),
        "redundant": leader != np.arange(n),
        "image": generator.integers(0, n, n),
        "group": generator.integers(-1, 3, n),
    }
    columns["score"][leader <= 1], columns["image"][:2] = 1.0, [-1, -2]
    return columns


@pytest.mark.parametrize("collected", [10**6, 8, 0], ids=["collected", "few collected", "counted"])
@given(
    columns=pools(),
    size=st.integers(1, 70),
    rate=st.sampled_from([0.0, 0.05, 0.3]),
    target=st.none() | st.floats(0.05, 1),
    floor=st.sampled_from([0.0, 0.4, 1.0]),
    weighting=st.sampled_from(["uniform", "influence"]),
    cap=st.sampled_from([1.0, 1.7, 5.0]),
)
def test_the_rule_of_any_ranges_decides_as_one_that_sees_all(
    collected: int,
    columns: dict[str, np.ndarray],
    size: int,
    rate: float,
    target: float | None,
    floor: float,
    weighting: str,
    cap: float,
) -> None:
    config = SelectionConfig(
        max_false_discovery=rate,
        target_size=target,
        min_group_share=floor,
        weighting=weighting,
        max_weight=cap,
        temperature=0.5,
    )
    pairs = pairs_of(**columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "COLLECTED", collected)
        found, expected = outcome(by_ranges, pairs, 0.7, config, size), outcome(whole, pairs, 0.7, config)
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected
        return
    np.testing.assert_array_equal(found.kept, expected.kept)
    np.testing.assert_array_equal(found.reason, expected.reason)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-9, atol=1e-12)


@given(
    utility=arrays(np.float64, st.integers(1, 50), elements=st.floats(-800, 800)),
    cap=st.floats(1, 9),
    size=st.integers(1, 60),
    closely=st.booleans(),
)
def test_weights_found_in_passes_are_the_capped_weights(
    utility: np.ndarray, cap: float, size: int, closely: bool
) -> None:
    utility = 1 + utility * 1e-12 if closely else utility
    parts = [utility[i : i + size] for i in range(0, len(utility), size)]
    level = looped(find_level(np.asarray, cap), parts)
    np.testing.assert_allclose(leveled(utility, level, cap), capped_weights(utility, cap), 1e-6, 1e-300)
