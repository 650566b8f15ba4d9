"""Laws of the mergeable k-means statistic and of the centroids that it moves, in float64."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus
from sklearn.metrics import davies_bouldin_score

from influencespace.core import kmeans
from influencespace.core.kmeans import Assignment

seeds = st.integers(0, 2**31)


def unit_rows(n: int, seed: int, d: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return kmeans.unit_rows(torch.randn(n, d, generator=generator, dtype=torch.float64))


def bunches(centres: int, each: int, seed: int, spread: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """`each` rows near each of well separated centres, and the centre of each row."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(centres).repeat(each)
    noise = spread * torch.randn(len(own), centres, generator=generator, dtype=torch.float64)
    return kmeans.unit_rows(torch.eye(centres, dtype=torch.float64)[own] + noise), own


def assert_equal(left: Assignment, right: Assignment) -> None:
    torch.testing.assert_close(left.count, right.count, rtol=0, atol=0)
    torch.testing.assert_close(left.total, right.total, rtol=0, atol=1e-12)
    torch.testing.assert_close(left.distance, right.distance, rtol=0, atol=1e-12)


@given(cuts=st.lists(st.integers(0, 30), max_size=6), order_seed=seeds, seed=seeds)
def test_any_partition_in_any_order_gives_the_same_statistic(
    cuts: list[int], order_seed: int, seed: int
) -> None:
    X, C = unit_rows(30, seed), unit_rows(5, seed + 1)
    borders = [0, *sorted(cuts), 30]
    parts = [kmeans.assign(X[a:b], C) for a, b in itertools.pairwise(borders)]
    np.random.default_rng(order_seed).shuffle(parts)
    assert_equal(functools.reduce(Assignment.merge, parts), kmeans.assign(X, C))


@given(seed=seeds)
def test_merging_is_associative(seed: int) -> None:
    C = unit_rows(3, seed)
    a, b, c = (kmeans.assign(unit_rows(n, seed + n), C) for n in (4, 1, 7))
    assert_equal(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(seed=seeds)
def test_the_statistic_is_that_of_the_nearest_centroids(seed: int) -> None:
    X, C = unit_rows(20, seed), unit_rows(4, seed + 1)
    distance = torch.cdist(X, C)
    index, cosine = kmeans.nearest(X, C)
    torch.testing.assert_close(index, distance.argmin(1))
    torch.testing.assert_close((2 - 2 * cosine).sqrt(), distance.min(1).values)
    statistic = kmeans.assign(X, C)
    for k in range(4):
        rows = index == k
        assert float(statistic.count[k]) == int(rows.sum())
        torch.testing.assert_close(statistic.total[k], X[rows].sum(0))
        torch.testing.assert_close(statistic.distance[k], distance[rows, k].sum())


@given(seed=st.integers(0, 1000), centres=st.integers(2, 6))
def test_seeds_are_rows_and_spread_over_the_bunches(seed: int, centres: int) -> None:
    X, own = bunches(centres, 12, seed, spread=0.001)
    C = kmeans.seed_centroids(X, centres, seed)
    same = (C[:, None] == X[None, :]).all(2)
    assert bool(same.any(1).all())
    assert sorted(own[same.int().argmax(1)].tolist()) == list(range(centres))
    torch.testing.assert_close(kmeans.seed_centroids(X, centres, seed), C, rtol=0, atol=0)


def test_greedy_seeds_end_in_less_inertia_than_seeds_of_one_trial() -> None:
    """Mean over ten seeds, after the same steps, on bunches of unequal size."""
    generator = np.random.default_rng(0)
    centres = unit_rows(50, 5, d=16)[generator.choice(50, 1000, p=generator.dirichlet(np.ones(50)))]
    X = kmeans.unit_rows(centres + 0.05 * torch.from_numpy(generator.standard_normal((1000, 16))))

    def inertia(C: torch.Tensor) -> float:
        for _ in range(5):
            C, _ = kmeans.step(C, torch.zeros(len(C), dtype=torch.float64), kmeans.assign(X, C), X)
        return float((1 - kmeans.nearest(X, C)[1]).sum())

    def one_trial(seed: int) -> torch.Tensor:
        return torch.from_numpy(kmeans_plusplus(X.numpy(), 50, random_state=seed, n_local_trials=1)[0])

    greedy = [inertia(kmeans.seed_centroids(X, 50, seed)) for seed in range(10)]
    single = [inertia(one_trial(seed)) for seed in range(10)]
    assert np.mean(greedy) < 0.85 * np.mean(single)


@pytest.mark.parametrize(
    ("indices", "level"),
    [
        ([1.957, 2.031, 2.125], 0),  # never settled: the best
        ([2.125, 2.031, 1.957], 2),
        ([3.0, 2.0, 1.99, 1.0], 1),  # settled before the best
        ([3.0, 2.99], 0),
        ([1.5], 0),
        ([math.nan, 2.0, 1.0], 2),  # a single cluster has no index
        ([math.nan], 0),
    ],
)
def test_the_stable_level_is_the_first_that_settles_or_else_the_best(
    indices: list[float], level: int
) -> None:
    assert kmeans.stable_level(indices, 0.02) == level


def test_seeds_of_coinciding_rows_and_of_too_few() -> None:
    same = unit_rows(1, 0).repeat(5, 1)
    torch.testing.assert_close(kmeans.seed_centroids(same, 3, 0), same[:3])
    with pytest.raises(ValueError, match=r"6 clusters .* only 5 pairs"):
        kmeans.seed_centroids(same, 6, 0)


@given(seed=seeds)
def test_the_first_step_of_a_batch_moves_centroids_to_the_directions_of_their_rows(seed: int) -> None:
    X, C = unit_rows(40, seed), unit_rows(3, seed + 1)
    batch = kmeans.assign(X, C)
    moved, seen = kmeans.step(C, torch.zeros(3, dtype=torch.float64), batch, X)
    used = batch.count > 0
    torch.testing.assert_close(seen, batch.count)
    torch.testing.assert_close(moved[used], kmeans.unit_rows(batch.total)[used])
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(3, dtype=torch.float64))


@given(seed=seeds, weight=st.integers(1, 1000))
def test_a_centroid_that_has_had_many_rows_moves_little(seed: int, weight: int) -> None:
    """The step is towards the batch's mean with the rate 1 / (rows ever seen)."""
    X, C = unit_rows(10, seed), unit_rows(1, seed + 1)
    had = torch.tensor([float(weight)], dtype=torch.float64)
    moved, seen = kmeans.step(C, had, kmeans.assign(X, C), X)
    rate = 10 / (10 + weight)
    expected = kmeans.unit_rows((1 - rate) * C + rate * X.mean(0))
    assert float(seen) == weight + 10
    torch.testing.assert_close(moved, expected)


def test_centroids_without_rows_stay_or_are_seeded_anew() -> None:
    X = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    C = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    spare = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    seen = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)
    moved, _ = kmeans.step(C, seen, kmeans.assign(X, C), spare)
    torch.testing.assert_close(moved[1], C[1])  # had rows before
    torch.testing.assert_close(moved[2], spare[0])  # never had one


@pytest.mark.parametrize("seed", range(3))
def test_steps_find_planted_bunches(seed: int) -> None:
    X, own = bunches(5, 40, seed)
    C = kmeans.seed_centroids(X, 5, seed)
    seen = torch.zeros(5, dtype=torch.float64)
    for start in range(0, len(X), 50):
        C, seen = kmeans.step(C, seen, kmeans.assign(X[start : start + 50], C), X)
    index, _ = kmeans.nearest(X, C)
    assert len({(int(a), int(b)) for a, b in zip(index, own)}) == 5


@given(seed=seeds, block=st.integers(1, 6))
@example(seed=7948, block=1)
def test_davies_bouldin_is_scikit_learns(seed: int, block: int) -> None:
    """Scikit-learn measures from the means of the clusters: with these as centroids the index is the same."""
    X = unit_rows(60, seed)
    index, _ = kmeans.nearest(X, unit_rows(5, seed + 1))
    labels = torch.unique(index, return_inverse=True)[1]
    K = int(labels.max()) + 1
    if K < 2:
        return
    means = torch.stack([X[labels == k].mean(0) for k in range(K)])
    gap = (X - means[labels]).norm(dim=1)
    statistic = Assignment(
        count=torch.bincount(labels).double(),
        total=means,
        distance=torch.zeros(K, dtype=torch.float64).index_add_(0, labels, gap),
    )
    expected = davies_bouldin_score(X.numpy(), labels.numpy())
    # scikit-learn takes distances from dot products: of a row to itself they are off by the root of the rounding, 1e-8
    assert kmeans.davies_bouldin(means, statistic, block) == pytest.approx(expected, rel=1e-6)


def test_davies_bouldin_leaves_empty_clusters_out_and_prefers_the_planted_number() -> None:
    X, _ = bunches(4, 50, 0)
    C = torch.eye(4, dtype=torch.float64)
    index = kmeans.davies_bouldin(C, kmeans.assign(X, C))
    with_empty = torch.cat([C, -C[:1]])
    assert kmeans.davies_bouldin(with_empty, kmeans.assign(X, with_empty)) == pytest.approx(index)
    merged = kmeans.unit_rows(torch.stack([C[0] + C[1], C[2], C[3]]))
    assert kmeans.davies_bouldin(merged, kmeans.assign(X, merged)) > index
    assert np.isnan(kmeans.davies_bouldin(C[:1], kmeans.assign(X, C[:1])))


def test_splitting_gives_each_centroid_two_children_among_its_own_rows() -> None:
    X, own = bunches(4, 20, 0)
    parents = kmeans.unit_rows(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64))
    children, parent = kmeans.split_centroids(parents, X, seed=0)
    assert parent.tolist() == [0, 0, 1, 1]
    index, _ = kmeans.nearest(X, children)
    for row, bunch in zip(index, own):
        assert parent[row] == int(bunch) // 2
    assert len({(int(a), int(b)) for a, b in zip(index, own)}) == 4


def test_a_centroid_with_one_row_keeps_itself() -> None:
    parents = torch.eye(3, dtype=torch.float64)[:2]
    X = torch.cat([parents[:1], parents[1:].repeat(4, 1)])
    children, parent = kmeans.split_centroids(parents, X, seed=0)
    assert parent.tolist() == [0, 1, 1]
    torch.testing.assert_close(children[0], parents[0])


def test_a_zero_row_stays_zero() -> None:
    torch.testing.assert_close(kmeans.unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))
