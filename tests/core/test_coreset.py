"""Set-wise choices against their definitions written out on small sets."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from influencespace.core import coreset
from influencespace.core.kmeans import unit_rows

seeds = st.integers(0, 10_000)
ORDERS = {
    "k_center": coreset.k_center,
    "herding": coreset.herding,
    "diversity": coreset.diversity,
    "d2": lambda X, size: coreset.d2(X, np.linspace(1, 2, len(X)), size, neighbours=3),
}
every_order = pytest.mark.parametrize("name", ORDERS)


def covered(X: Tensor, chosen: np.ndarray) -> float:
    """What facility location raises: the sum of all rows' cosines with the nearest of the chosen."""
    return float((X @ X[torch.from_numpy(chosen)].T).max(1).values.sum())


def rows(n: int, seed: int, d: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit_rows(torch.randn(n, d, generator=generator, dtype=torch.float64))


@every_order
@given(n=st.integers(2, 25), seed=seeds)
def test_every_size_is_a_prefix_without_repeats(name: str, n: int, seed: int) -> None:
    X = rows(n, seed)
    whole = ORDERS[name](X, n)
    assert sorted(whole) == list(range(n))
    some = max(1, n // 2)
    np.testing.assert_array_equal(ORDERS[name](X, some), whole[:some])


@every_order
@given(n=st.integers(5, 25), seed=seeds)
def test_the_order_of_the_rows_changes_nothing(name: str, n: int, seed: int) -> None:
    X = rows(n, seed)
    order = np.random.default_rng(seed).permutation(n)
    if (
        name == "diversity"
    ):  # two rows that would cover each other are worth the same: only the cover is certain
        found = order[coreset.diversity(X[order], 4)]
        assert covered(X, found) == pytest.approx(covered(X, coreset.diversity(X, 4)), rel=0.02)
    elif name == "d2":
        score = np.linspace(1, 2, n)
        found = coreset.d2(X[order], score[order], 4, neighbours=3)
        np.testing.assert_array_equal(order[found], coreset.d2(X, score, 4, neighbours=3))
    else:
        np.testing.assert_array_equal(order[ORDERS[name](X[order], 4)], ORDERS[name](X, 4))


@every_order
def test_what_cannot_be_chosen_is_reported(name: str) -> None:
    for size in (0, 6):
        with pytest.raises(ValueError, match="of 5 rows cannot be chosen"):
            ORDERS[name](rows(5, 0), size)
    bad = rows(5, 0)
    bad[2, 1] = torch.nan
    with pytest.raises(ValueError, match="nan or infinity"):
        ORDERS[name](bad, 2)


@given(n=st.integers(3, 9), size=st.integers(1, 3), seed=seeds)
def test_k_center_is_within_twice_the_best_radius(n: int, size: int, seed: int) -> None:
    X = rows(n, seed)
    gaps = torch.cdist(X, X)

    def radius(chosen: tuple[int, ...]) -> float:
        return float(gaps[:, list(chosen)].min(1).values.max())

    best = min(radius(chosen) for chosen in combinations(range(n), size))
    assert radius(tuple(coreset.k_center(X, size).tolist())) <= 2 * best + 1e-9


@given(n=st.integers(4, 20), seed=seeds)
def test_diversity_is_the_plain_greedy_choice(n: int, seed: int) -> None:
    X = rows(n, seed)
    found = coreset.diversity(X, 3)
    for size in (1, 2, 3):
        others = [j for j in range(n) if j not in found[: size - 1]]
        best = max(covered(X, np.array([*found[: size - 1], j])) for j in others)
        assert covered(X, found[:size]) == pytest.approx(best, abs=1e-9)


@given(seed=seeds)
def test_the_means_of_herding_are_near_the_mean_of_all(seed: int) -> None:
    X = rows(60, seed)
    mean = X.mean(0)
    found = float((X[coreset.herding(X, 12)].mean(0) - mean).norm())
    generator = np.random.default_rng(seed)
    chance = [float((X[generator.permutation(60)[:12]].mean(0) - mean).norm()) for _ in range(20)]
    assert found < np.mean(chance)


def test_d2_spreads_over_what_is_alike() -> None:
    """Two bunches: by score alone all of the first would come before the second."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    X = torch.stack([first] * 4 + [second] * 4).double()
    score = np.array([2.0, 1.9, 1.8, 1.7, 1.0, 0.9, 0.8, 0.7])
    found = coreset.d2(X, score, 2, neighbours=3)
    assert sorted(found // 4) == [0, 1]
    assert coreset.d2(X, score, 2, neighbours=3, forward=None).tolist() == [0, 4]


def test_d2_without_neighbours_is_the_order_of_scores() -> None:
    score = np.random.default_rng(0).normal(size=20)
    score[7] = np.nan
    found = coreset.d2(rows(20, 0), score, 20, neighbours=0)
    assert found[-1] == 7
    np.testing.assert_array_equal(found[:-1], [i for i in np.argsort(-score, kind="stable") if i != 7])


@given(n=st.integers(3, 30), seed=seeds)
def test_nearest_rows_are_those_of_all_distances(n: int, seed: int) -> None:
    X = rows(n, seed)
    found, distance = coreset.nearest_rows(X, 2)
    gaps = torch.cdist(X, X).fill_diagonal_(torch.inf)
    truth = gaps.topk(2, largest=False).values.sort(1).values
    np.testing.assert_allclose(np.sort(distance, 1), truth, atol=1e-3)
    assert (found != np.arange(n)[:, None]).all()


def test_exact_copies_are_each_others_neighbours() -> None:
    X = rows(3, 0).repeat(4, 1)
    found, distance = coreset.nearest_rows(X, 3)
    assert (found % 3 == (np.arange(12) % 3)[:, None]).all()
    assert (found != np.arange(12)[:, None]).all()
    np.testing.assert_allclose(distance, 0, atol=2e-3)
