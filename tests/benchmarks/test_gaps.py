"""Laws of group gaps, and of minimax weights against a slow primal solver."""

from typing import Any

import numpy as np
import pytest
from fairlearn import metrics
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from benchmarks.fairness.gaps import demographic_parity, equalised_odds, squared_gap, worst_group
from benchmarks.fairness.minimax import minimax_weights
from influencespace.core.fairness import group_means
from influencespace.core.select import capped_weights
from influencespace.errors import InputError

seeds = st.integers(0, 10_000)


def grouped(seed: int, n: int = 60, groups: int = 3) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng, np.concatenate([np.arange(groups), rng.integers(0, groups, n - groups)])


@given(seed=seeds, groups=st.integers(2, 4))
def test_measures_are_those_of_the_definition(seed: int, groups: int) -> None:
    rng, group = grouped(seed, groups=groups)
    decided, positive = rng.random((2, 60)) < 0.5
    rates = [decided[group == g].mean() for g in range(groups)]
    assert demographic_parity(decided, group) == pytest.approx(max(rates) - min(rates))
    loss = rng.random(60)
    means = [loss[group == g].mean() for g in range(groups)]
    np.testing.assert_allclose(group_means(loss, group), means)
    assert worst_group(loss, group) == pytest.approx(max(means))
    cells = [[decided[(group == g) & (positive == truth)] for g in range(groups)] for truth in (True, False)]
    odds = equalised_odds(decided, positive, group)
    if any(len(cell) == 0 for row in cells for cell in row):
        assert np.isnan(odds)
    else:
        assert odds == pytest.approx(max(np.ptp([cell.mean() for cell in row]) for row in cells))


@settings(max_examples=15)
@given(seed=seeds)
def test_measures_are_those_of_fairlearn(seed: int) -> None:
    rng, group = grouped(seed)
    decided, positive = rng.random((2, 60)) < 0.5
    odds = equalised_odds(decided, positive, group)
    assume(np.isfinite(odds))
    given = {"y_true": positive, "y_pred": decided, "sensitive_features": group}
    assert demographic_parity(decided, group) == pytest.approx(
        metrics.demographic_parity_difference(**given), abs=1e-12
    )
    assert odds == pytest.approx(metrics.equalized_odds_difference(**given), abs=1e-12)


@given(seed=seeds)
def test_names_and_order_of_groups_do_not_matter(seed: int) -> None:
    rng, group = grouped(seed)
    values = rng.normal(size=60)
    named, order = np.array(["z", "a", "m"])[group], rng.permutation(60)
    for measure in (demographic_parity, lambda v, g: squared_gap(v, g)[0]):
        assert measure(values[order], named[order]) == pytest.approx(measure(values, group))
    assert worst_group(values[order], named[order]) == pytest.approx(worst_group(values, group))


@given(seed=seeds, groups=st.integers(2, 4))
def test_the_squared_gap_has_its_derivative(seed: int, groups: int) -> None:
    rng, group = grouped(seed, n=20, groups=groups)
    values = rng.normal(size=20)
    gap, slope = squared_gap(values, group)
    steps = 1e-6 * np.eye(20)
    numeric = [(squared_gap(values + h, group)[0] - squared_gap(values - h, group)[0]) / 2e-6 for h in steps]
    np.testing.assert_allclose(slope, numeric, atol=1e-8)
    if groups == 2:
        assert gap == pytest.approx(demographic_parity(values, group) ** 2)


def test_one_group_has_no_gap_to_close() -> None:
    with pytest.raises(InputError, match="needs two groups"):
        squared_gap(np.zeros(3), np.zeros(3))


def instance(seed: int) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """A small problem: losses, influence, counts, and its settings."""
    rng = np.random.default_rng(seed)
    K, A, G = rng.integers(2, 9), rng.integers(1, 4), rng.integers(1, 3)
    counts = rng.integers(1, 6, (K, G))
    chosen = {
        "temperature": float(10 ** rng.uniform(-1.5, 0.5)),
        "cap": float(rng.choice([np.inf, 1.5, 3.0])),
        "floor": float(rng.choice([0.0, 0.5, 0.9])),
        "radius": float(rng.choice([np.inf, 0.3, 1.0])),
    }
    return (rng.normal(size=A), rng.normal(size=(K, A)), counts), chosen


def objective(w: np.ndarray, loss: np.ndarray, influence: np.ndarray, p: np.ndarray, tau: float) -> float:
    entropy = p @ (w * np.log(np.maximum(w, 1e-300)))
    return float(np.max(loss - (p * (w - 1)) @ influence) + tau * entropy)


def primal(
    loss: np.ndarray, influence: np.ndarray, counts: np.ndarray, *, temperature: float, cap: float, floor: float,
    radius: float,
) -> np.ndarray:  # fmt: skip
    """The slow truth: all weights and the worst loss as variables."""
    K = len(counts)
    p, share = counts.sum(1) / counts.sum(), counts / counts.sum(1)[:, None]
    constraints = [
        {"type": "eq", "fun": lambda x: p @ x[:K] - 1},
        {"type": "ineq", "fun": lambda x: x[K] - (loss - (p * (x[:K] - 1)) @ influence)},
        {"type": "ineq", "fun": lambda x: (p * x[:K]) @ share - floor * (p @ share)},
    ]
    if np.isfinite(radius):
        constraints.append({"type": "ineq", "fun": lambda x: radius**2 - p @ (x[:K] - 1) ** 2})
    found = minimize(
        lambda x: x[K] + temperature * (p @ (x[:K] * np.log(np.maximum(x[:K], 1e-12)))),
        np.append(np.ones(K), loss.max() + 0.1),
        method="SLSQP",
        bounds=[(1e-9, min(cap, 1e3))] * K + [(None, None)],
        constraints=constraints,
        options={"maxiter": 2000, "ftol": 1e-13},
    )
    return np.asarray(found.x[:K])


def held(w: np.ndarray, counts: np.ndarray, *, cap: float, floor: float, radius: float) -> None:
    p, share = counts.sum(1) / counts.sum(), counts / counts.sum(1)[:, None]
    assert p @ w == pytest.approx(1, abs=1e-9)
    assert w.min() >= 0
    assert w.max() <= cap + 1e-9
    assert ((p * w) @ share >= floor * (p @ share) - 1e-6).all()
    assert np.sqrt(p @ (w - 1) ** 2) <= radius + 1e-6


@settings(max_examples=60)
@given(seed=seeds)
def test_the_dual_finds_what_the_primal_finds(seed: int) -> None:
    given, chosen = instance(seed)
    loss, influence, counts = given
    w, slow = minimax_weights(*given, **chosen), primal(*given, **chosen)
    p, tau = counts.sum(1) / counts.sum(), chosen.pop("temperature")
    held(w, counts, **chosen)
    ours, theirs = (objective(x, loss, influence, p, tau) for x in (w, slow))
    # a solver that stopped early is no truth: ours may be better, by no more than its constraints give way
    assert ours <= theirs + 1e-6
    assert ours <= objective(np.ones(len(p)), loss, influence, p, tau) + 1e-7


@settings(max_examples=20)
@given(seed=seeds, floor=st.sampled_from([0.0, 0.7]), radius=st.sampled_from([0.2, np.inf]))
def test_thousands_of_pairs_keep_their_constraints_and_the_worst_group_gains(
    seed: int, floor: float, radius: float
) -> None:
    rng = np.random.default_rng(seed)
    K = 3000
    counts = np.eye(3)[rng.integers(0, 3, K)]
    influence = rng.normal(size=(K, 2)) * [1.0, 0.2] + counts @ rng.normal(size=(3, 2))
    loss = np.array([0.0, 0.3])
    w = minimax_weights(loss, influence, counts, temperature=0.2, cap=5.0, floor=floor, radius=radius)
    held(w, counts, cap=5.0, floor=floor, radius=radius)
    assert np.max(loss - (w - 1) @ influence / K) < loss.max()


@given(seed=seeds, cap=st.sampled_from([1.2, 3.0, 1e6]), temperature=st.floats(0.1, 5))
def test_one_group_has_the_entropy_weights(seed: int, cap: float, temperature: float) -> None:
    utility = np.random.default_rng(seed).normal(size=30)
    found = minimax_weights(np.zeros(1), utility[:, None], np.ones((30, 1)), temperature=temperature, cap=cap)
    np.testing.assert_allclose(found, capped_weights(utility / temperature, cap), atol=1e-8)


@given(seed=seeds)
def test_a_stratum_is_as_its_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    influence, n = rng.normal(size=(5, 2)), rng.integers(1, 5, 5)
    chosen = {"temperature": 0.5, "cap": 2.0, "radius": 0.6}
    strata = minimax_weights(np.zeros(2), influence, n[:, None], **chosen)
    pairs = minimax_weights(np.zeros(2), np.repeat(influence, n, 0), np.ones((n.sum(), 1)), **chosen)
    np.testing.assert_allclose(pairs, np.repeat(strata, n), atol=1e-5)


def test_two_steps_from_where_one_ended_are_one_of_twice_the_influence() -> None:
    rng = np.random.default_rng(0)
    influence, counts = rng.normal(size=(20, 1)), np.ones((20, 1))
    half = minimax_weights(np.zeros(1), influence, counts, temperature=1.0)
    whole = minimax_weights(np.zeros(1), influence, counts, temperature=1.0, start=half)
    np.testing.assert_allclose(
        whole, minimax_weights(np.zeros(1), 2 * influence, counts, temperature=1.0), atol=1e-8
    )


def test_what_has_no_weight_at_the_start_gets_none() -> None:
    start = np.array([0.0, 1.5, 1.5])
    w = minimax_weights(
        np.zeros(1),
        np.array([[9.0], [1.0], [0.0]]),
        np.ones((3, 1)),
        temperature=1.0,
        cap=2.0,
        radius=0.3,
        start=start,
    )
    assert w[0] == 0
    assert w[1] > w[2] > 0
    assert np.sqrt(((w - start) ** 2).mean()) <= 0.3 + 1e-6


@given(seed=seeds, temperature=st.floats(0.1, 2))
def test_mirrored_groups_are_treated_alike(seed: int, temperature: float) -> None:
    """Each stratum has a twin that does to one group what it does to the other: the groups end with equal losses."""
    half = np.random.default_rng(seed).normal(size=(6, 2))
    influence, loss = np.concatenate([half, half[:, ::-1]]), np.array([0.4, 0.4])
    w = minimax_weights(loss, influence, np.ones((12, 1)), temperature=temperature)
    np.testing.assert_allclose(w[:6], w[6:], atol=1e-5)
    predicted = loss - (w - 1) @ influence / 12
    assert np.ptp(predicted) < 1e-6


@example(temperature=0.3)
@given(temperature=st.floats(0.1, 2))
def test_the_worse_group_is_served_first(temperature: float) -> None:
    influence = np.eye(2)  # stratum k helps group k
    w = minimax_weights(np.array([0.0, 5.0]), influence, np.ones((2, 1)), temperature=temperature)
    np.testing.assert_allclose(w, 2 / (1 + np.exp(np.array([1, -1]) / temperature)), atol=1e-6)


@given(seed=seeds, temperature=st.floats(0.05, 5))
def test_a_smaller_radius_is_nearer_to_the_start(seed: int, temperature: float) -> None:
    (loss, influence, counts), _ = instance(seed)
    p = counts.sum(1) / counts.sum()
    far, near = (
        minimax_weights(loss, influence, counts, temperature=temperature, radius=radius)
        for radius in (np.inf, 0.1)
    )
    moved = np.sqrt(p @ (far - 1) ** 2)
    assert np.sqrt(p @ (near - 1) ** 2) == pytest.approx(min(0.1, moved), abs=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale: float) -> None:
    (loss, influence, counts), _ = instance(5)
    chosen = {"cap": 3.0, "floor": 0.5, "radius": 0.5}
    plain = minimax_weights(loss, influence, counts, temperature=0.3, **chosen)
    scaled = minimax_weights(scale * loss, scale * influence, counts, temperature=0.3 * scale, **chosen)
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


def test_influence_that_is_all_alike_moves_nothing() -> None:
    w = minimax_weights(np.zeros(2), np.ones((4, 2)), np.ones((4, 1)), temperature=0.1, radius=0.5)
    np.testing.assert_allclose(w, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0"),
        ({"radius": 0.0}, "radius = 0"),
        ({"cap": 0.5}, "no start below the cap 0.5"),
        (
            {"floor": 0.9, "start": np.array([0.2, 1.8])},
            "holds 0.2 of its weight at the start, below the floor",
        ),
        ({"start": np.array([1.0, 2.0])}, "of mean 1.5"),
    ],
)
def test_what_has_no_solution_says_so(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        minimax_weights(np.zeros(1), np.ones((2, 1)), np.eye(2), **({"temperature": 1.0} | change))


@pytest.mark.parametrize(("influence", "counts"), [([0.0, np.nan], [1, 1]), ([0.0, 1.0], [1, 0])])
def test_strata_without_influence_are_told(influence: list[float], counts: list[int]) -> None:
    with pytest.raises(InputError, match="1 of 2 strata"):
        minimax_weights(np.zeros(1), np.array(influence)[:, None], np.array(counts)[:, None], temperature=1.0)
