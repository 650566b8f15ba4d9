"""The tree above clusters: Ward's, by their numbers of rows, with leaves that are large enough."""

import itertools

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score

from influencespace.core import cluster_tree
from influencespace.core.cluster_tree import tree_levels


def test_of_rows_it_is_the_tree_of_ward() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 5))
    levels = tree_levels(np.ones(60), rows, 1, [20, 2, 5, 100])
    assert [level.max() + 1 for level in levels] == [2, 5, 20, 60]
    theirs = linkage(rows, "ward")
    for level in levels:
        assert adjusted_rand_score(level, fcluster(theirs, level.max() + 1, "maxclust")) == 1


def test_clusters_are_merged_as_their_rows_would_be() -> None:
    """Of clusters whose rows coincide the tree goes on where the tree of the rows is."""
    generator = np.random.default_rng(1)
    mean, count = generator.normal(size=(12, 3)), generator.integers(1, 9, 12)
    of_rows = fcluster(linkage(np.repeat(mean, count, 0), "ward"), 4, "maxclust")
    level = tree_levels(count, mean, 1, [4])[0]
    assert adjusted_rand_score(np.repeat(level, count), of_rows) == 1


@pytest.mark.parametrize("seed", range(3))
def test_every_level_is_nested_in_the_one_above(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count, mean = generator.integers(0, 50, 40), generator.normal(size=(40, 3))
    levels = tree_levels(count, mean, 20, [2, 4, 8])
    for above, below in itertools.pairwise(levels):
        assert {*zip(below.tolist(), above.tolist())} == {
            (k, int(above[below == k][0])) for k in {*below.tolist()}
        }
    for level in levels:
        assert {*level.tolist()} == {*range(level.max() + 1)}
    assert np.bincount(levels[-1], count).min() >= 20


def test_a_small_leaf_goes_into_its_nearest_and_the_others_stay() -> None:
    mean = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 1.0], [0.0, 9.0]])
    (leaves,) = tree_levels(np.array([30, 30, 2, 30]), mean, 5, [])
    assert leaves.tolist() == [0, 1, 1, 2]
    (leaves,) = tree_levels(np.array([30, 30, 0, 30]), mean, 1, [])
    assert leaves.tolist() == [0, 1, 1, 2]
    (leaves,) = tree_levels(np.array([1, 1, 1, 1]), mean, 100, [2])
    assert leaves.tolist() == [0, 0, 0, 0]


def test_very_many_clusters_have_no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_tree, "MAX_LEAVES", 3)
    (leaves,) = tree_levels(np.array([0, 3, 0, 2]), np.eye(4), 1, [2])
    assert leaves[[1, 3]].tolist() == [0, 1]
