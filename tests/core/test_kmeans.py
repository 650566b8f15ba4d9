"""Laws of the mergeable k-means statistic and of the centroids that it moves, in float64."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus

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
    torch.testing.assert_close(left.squares, right.squares, rtol=0, atol=1e-12)


def stepped(C: torch.Tensor, X: torch.Tensor, batch: int, turns: int) -> torch.Tensor:
    """Centroids after so many passes in mini-batches."""
    memory, starts = Assignment.nothing(C), [*range(0, len(X), batch)] * turns
    for turn, start in enumerate(starts):
        C, memory = kmeans.step(C, memory, kmeans.assign(X[start : start + batch], C), turn / len(starts))
    return C


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
    mean = statistic.means(C)
    expected = sum(float((X[index == k] - mean[k]).square().sum()) for k in range(4))
    assert statistic.inertia == pytest.approx(expected)
    of_parts = kmeans.nearest(X[:7], C)[0], kmeans.nearest(X[7:], C)[0]
    torch.testing.assert_close(torch.cat(of_parts), index)


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
        return kmeans.assign(X, stepped(C, X, 1000, 5)).inertia

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
    moved, memory = kmeans.step(C, Assignment.nothing(C), batch, 0.0)
    used = batch.count > 0
    assert_equal(memory, batch)
    torch.testing.assert_close(moved[used], kmeans.unit_rows(batch.total)[used])
    torch.testing.assert_close(moved[~used], C[~used])
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(3, dtype=torch.float64))


@given(seed=seeds)
def test_the_last_steps_remember_more(seed: int) -> None:
    X, C = unit_rows(20, seed), unit_rows(1, seed + 1)
    one, other = kmeans.assign(X[:10], C), kmeans.assign(X[10:], C)
    for done, share in ((0.0, kmeans.SHORT), (0.74, kmeans.SHORT), (0.75, kmeans.LONG)):
        moved, memory = kmeans.step(C, one, other, done)
        assert float(memory.count) == pytest.approx(10 * share + 10)
        torch.testing.assert_close(moved, kmeans.unit_rows(share * one.total + other.total))


def test_small_batches_end_in_less_inertia_than_as_many_passes_of_the_whole() -> None:
    """Their noise leads out of poor places: mean over ten seeds."""
    generator = np.random.default_rng(0)
    centres = unit_rows(60, 5, d=16)[generator.choice(60, 2000, p=generator.dirichlet(np.ones(60)))]
    X = kmeans.unit_rows(centres + 0.2 * torch.from_numpy(generator.standard_normal((2000, 16))))
    first = [kmeans.seed_centroids(X, 20, seed) for seed in range(10)]
    small, whole = (
        np.mean([kmeans.assign(X, stepped(C, X, batch, 4)).inertia for C in first]) for batch in (320, 2000)
    )
    assert small < whole


def test_an_empty_cluster_is_seeded_anew_in_the_largest() -> None:
    X, own = bunches(4, 20, 0)
    C = torch.stack([X[own == 0].mean(0), X[own > 1].mean(0), X[own == 1].mean(0), -X.mean(0)])
    C = kmeans.unit_rows(C)
    memory = kmeans.assign(X, C)
    assert memory.count.tolist() == [20, 40, 20, 0]
    new, kept = kmeans.balance(C, memory, memory.count, X, (0.01, math.inf), seed=0)
    torch.testing.assert_close(new[[0, 2]], C[[0, 2]])
    assert kept.count.tolist() == [20, 0, 20, 0]
    assert kmeans.assign(X, new).count.tolist() == [20, 20, 20, 20]


def test_a_small_cluster_gives_its_centroid_away_only_where_a_half_is_large_enough() -> None:
    X, own = bunches(4, 20, 0)
    X = torch.cat([X[own < 3], X[own == 3][:2]])
    C = torch.eye(4, dtype=torch.float64)
    memory = kmeans.assign(X, C)
    assert memory.count.tolist() == [20, 20, 20, 2]
    new, _ = kmeans.balance(C, memory, memory.count, X, (0.1, math.inf), seed=0)
    assert not torch.equal(new[3], C[3])
    same, kept = kmeans.balance(C, memory, memory.count, X, (0.2, math.inf), seed=0)
    assert torch.equal(same, C)
    assert_equal(kept, memory)


def test_an_oversize_cluster_is_split_where_none_is_given_away() -> None:
    X, _ = bunches(4, 20, 0)
    C = kmeans.unit_rows(torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64))
    memory = kmeans.assign(X, C)
    new, kept = kmeans.balance(C, memory, memory.count, X, (0.01, 0.5), seed=0)
    assert len(new) == 3
    torch.testing.assert_close(new[1], C[1])
    assert kept.count.tolist() == [0, 20, 0]
    assert float(kmeans.assign(X, new).count[[0, 2]].min()) > 10
    same, _ = kmeans.balance(C, memory, memory.count, X, (0.01, 0.8), seed=0)
    assert torch.equal(same, C)


def test_a_cluster_of_one_row_is_not_split() -> None:
    X = unit_rows(1, 0).repeat(9, 1)
    C = torch.cat([X[:1], -X[:1]])
    memory = kmeans.assign(X, C)
    new, _ = kmeans.balance(C, memory, memory.count, X, (0.1, 0.5), seed=0)
    assert torch.equal(new, C)


@pytest.mark.parametrize("seed", range(3))
def test_steps_find_planted_bunches(seed: int) -> None:
    X, own = bunches(5, 40, seed)
    index, _ = kmeans.nearest(X, stepped(kmeans.seed_centroids(X, 5, seed), X, 50, 1))
    assert len({(int(a), int(b)) for a, b in zip(index, own)}) == 5


@given(seed=seeds, block=st.integers(1, 6))
def test_davies_bouldin_is_that_of_means_and_root_mean_squares(seed: int, block: int) -> None:
    X, C = unit_rows(60, seed), unit_rows(5, seed + 1)
    index, _ = kmeans.nearest(X, C)
    clusters = [X[index == k] for k in range(5) if bool((index == k).any())]
    if len(clusters) < 2:
        return
    mean = [rows.mean(0) for rows in clusters]
    spread = [float((rows - m).square().sum(1).mean().sqrt()) for rows, m in zip(clusters, mean)]
    worst = [
        max((spread[i] + spread[j]) / float((mean[i] - mean[j]).norm()) for j in range(len(mean)) if i != j)
        for i in range(len(mean))
    ]
    index = kmeans.davies_bouldin(kmeans.assign(X, C), block)
    assert index == pytest.approx(np.mean(worst), rel=1e-6)


def test_davies_bouldin_leaves_empty_clusters_out_and_prefers_the_planted_number() -> None:
    X, _ = bunches(4, 50, 0)
    C = torch.eye(4, dtype=torch.float64)
    index = kmeans.davies_bouldin(kmeans.assign(X, C))
    with_empty = torch.cat([C, -C[:1]])
    assert kmeans.davies_bouldin(kmeans.assign(X, with_empty)) == pytest.approx(index)
    merged = kmeans.unit_rows(torch.stack([C[0] + C[1], C[2], C[3]]))
    assert kmeans.davies_bouldin(kmeans.assign(X, merged)) > index
    assert np.isnan(kmeans.davies_bouldin(kmeans.assign(X, C[:1])))


def test_groups_of_clusters_have_the_statistic_of_all_their_rows() -> None:
    X, C = unit_rows(30, 0), unit_rows(4, 1)
    statistic = kmeans.grouped(kmeans.assign(X, C), np.array([0, 1, 0, 1]))
    index = kmeans.nearest(X, C)[0] % 2
    assert statistic.count.tolist() == [int((index == k).sum()) for k in range(2)]
    torch.testing.assert_close(statistic.total, torch.stack([X[index == k].sum(0) for k in range(2)]))


def test_a_zero_row_stays_zero() -> None:
    torch.testing.assert_close(kmeans.unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))
