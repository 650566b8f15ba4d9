"""Clusters of the pool: centroids that no bucket size changes, labels, the tree, and how many there are."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import World, carry_beside, columns, with_sets
from sklearn.metrics import adjusted_rand_score

from influencespace.models.fusion import fuse
from influencespace.run import Run


def test_every_pair_lies_at_its_nearest_centroid(truth: Run) -> None:
    X = fuse(*truth.pool.inputs(slice(None)), truth.config.cluster.fusion, query=None)
    C = torch.from_numpy(np.load(truth.at("cluster") / "centroids.npy"))
    torch.testing.assert_close(C.norm(dim=1), torch.ones(2))
    assigned = columns(truth, "cluster/clusters")
    cosine, index = (X @ C.T).max(1)
    np.testing.assert_array_equal(assigned["cluster"], index)
    np.testing.assert_allclose(assigned["cosine"], cosine, atol=1e-6)


def test_planted_groups_are_found(truth: Run, world: World, tmp_path: Path) -> None:
    """Three far apart meanings, in the embeddings of images and captions."""
    table, generator = truth.pool.table, np.random.default_rng(0)
    centres = np.linalg.qr(generator.normal(size=(16, 3)))[0].T
    group, image = np.arange(len(table.images)) % 3, truth.pool.image
    folder = tmp_path / "pool"
    shutil.copytree(truth.pool.folder, folder)
    for name, owner in (("images.npy", group), ("texts.npy", group[image][np.argsort(truth.pool.text)])):
        noisy = centres[owner] + 0.05 * generator.normal(size=(len(owner), 16))
        np.save(folder / name, (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32))
    run = carry_beside(with_sets(truth, pool=replace(world["pool"], folder=folder)), tmp_path, "cluster", k=3)
    assert adjusted_rand_score(group[image], columns(run, "cluster/clusters")["cluster"]) == 1


@pytest.mark.parametrize(("size", "levels"), [(200, [1]), (60, [4]), (20, [3, 6, 12])])
def test_clusters_are_doubled_down_to_their_smallest_size(
    truth: Run, tmp_path: Path, size: int, levels: list[int]
) -> None:
    settings = {"k": "auto", "first": 3 if size == 20 else 4, "min_cluster_size": size, "tolerance": 1e-9}
    run = carry_beside(truth, tmp_path, "cluster", **settings)
    details = run.manifest("cluster").details
    assert details["levels"] == levels
    assert details["k"] == levels[details["level"]]
    assert details["level"] == np.argsort(details["davies_bouldin"])[0]  # the best, as none is stable
    assert len(details["davies_bouldin"]) == len(levels)
    tree = np.load(tmp_path / "cluster" / "tree.npz")
    for level, count in enumerate(levels):
        parents = tree[f"parents_of_level_{level}"]
        assert len(parents) == count
        assert set(parents) <= set(range(levels[level - 1] if level else 1))
    assert set(columns(run, "cluster/clusters")["cluster"]) <= set(range(details["k"]))


def test_doubling_stops_where_the_index_settles(truth: Run, tmp_path: Path) -> None:
    """The level before, which another doubling does not improve, is taken."""
    settings = {"k": "auto", "first": 2, "min_cluster_size": 1, "tolerance": 0.9}
    details = carry_beside(truth, tmp_path, "cluster", **settings).manifest("cluster").details
    assert (details["levels"], details["k"]) == ([2, 4], 2)


def test_more_clusters_than_pairs_become_one_a_pair(truth: Run, tmp_path: Path) -> None:
    assert carry_beside(truth, tmp_path, "cluster", k=10_000).manifest("cluster").details["k"] == len(
        truth.pool
    )
