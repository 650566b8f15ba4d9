"""Clusters of the pool: centroids that no block size changes, labels, the tree, and how many there are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, assert_equal_results
from sklearn.metrics import adjusted_rand_score

from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.models.fusion import fuse
from influencespace.stages.scoring.cluster import ClusterConfig


def cluster_by(truth: Chain, out: Path, **settings: object) -> Chain:
    """The cluster stage alone, with other settings."""
    chain = replace(truth, out=out, cluster=ClusterConfig(**settings))
    chain.run("cluster")
    return chain


def labels(chain: Chain) -> np.ndarray:
    return read_columns(chain.out / "cluster" / "clusters.parquet")["cluster"]


def test_every_pair_lies_at_its_nearest_centroid(truth: Chain) -> None:
    pool = truth.sets["pool"]
    X = fuse(*pool.inputs(slice(None)), truth.cluster.fusion, query=None)
    C = torch.from_numpy(np.load(truth.out / "cluster" / "centroids.npy"))
    torch.testing.assert_close(C.norm(dim=1), torch.ones(2))
    found = read_columns(truth.out / "cluster" / "clusters.parquet")
    cosine, index = (X @ C.T).max(1)
    np.testing.assert_array_equal(found["cluster"], index)
    np.testing.assert_allclose(found["cosine"], cosine, atol=1e-6)


@pytest.mark.parametrize("bucket_size", [16, 256])
def test_blocks_change_nothing(truth: Chain, tmp_path: Path, bucket_size: int) -> None:
    cluster_by(truth, tmp_path, k=2, batch_size=64, bucket_size=bucket_size)
    assert_equal_results(truth.out / "cluster", tmp_path / "cluster", spreads=1e-5)


def test_planted_groups_are_found(truth: Chain, tmp_path: Path) -> None:
    """Three far apart meanings, in the embeddings of images and captions."""
    table = PairSet(truth.world.pool.folder).table
    generator = np.random.default_rng(0)
    centres = np.linalg.qr(generator.normal(size=(16, 3)))[0].T
    group = np.arange(len(table.images)) % 3
    image = table.column("image")
    folder = tmp_path / "pool"
    folder.mkdir()
    for path in truth.world.pool.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, owner in (("images.npy", group), ("texts.npy", group[image][np.argsort(table.column("text"))])):
        noisy = centres[owner] + 0.05 * generator.normal(size=(len(owner), 16))
        np.save(folder / name, (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32))
    world = replace(truth.world, pool=replace(truth.world.pool, folder=folder))
    chain = cluster_by(replace(truth, world=world), tmp_path, k=3)
    assert adjusted_rand_score(group[image], labels(chain)) == 1


@pytest.mark.parametrize(("least_size", "levels"), [(200, [1]), (60, [4]), (20, [3, 6, 12])])
def test_clusters_are_doubled_up_to_their_least_size(
    truth: Chain, tmp_path: Path, least_size: int, levels: list[int]
) -> None:
    first = 3 if least_size == 20 else 4
    chain = cluster_by(truth, tmp_path, first=first, least_size=least_size, tolerance=1e-9)
    details = chain.manifest("cluster").details
    assert details["levels"] == levels
    assert details["k"] == levels[-1]
    assert len(details["davies_bouldin"]) == len(levels)
    tree = np.load(tmp_path / "cluster" / "tree.npz")
    for level, size in enumerate(levels):
        parents = tree[f"parents_of_level_{level}"]
        assert len(parents) == size
        assert set(parents) <= set(range(levels[level - 1] if level else 1))
    assert set(labels(chain)) <= set(range(levels[-1]))


def test_doubling_stops_where_the_index_settles(truth: Chain, tmp_path: Path) -> None:
    chain = cluster_by(truth, tmp_path, first=2, least_size=1, tolerance=0.9)
    assert chain.manifest("cluster").details["levels"] == [2, 4]


def test_more_clusters_than_pairs_become_one_a_pair(truth: Chain, tmp_path: Path) -> None:
    chain = cluster_by(truth, tmp_path, k=10_000)
    assert chain.manifest("cluster").details["k"] == len(truth.world.pool)
