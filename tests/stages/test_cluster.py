"""Clusters of the pool: centroids that no bucket size changes, labels, the tree, and how many there are."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import World, carry_beside, columns, with_sets
from planted import replant
from sklearn.metrics import adjusted_rand_score

from influencespace.core.kmeans import unit_rows
from influencespace.engine.local import Engine, LocalEngine
from influencespace.models.fusion import fuse
from influencespace.run import Run
from influencespace.stages.scoring.cluster import FoldWorker, Fused, KMeans
from influencespace.stages.scoring.cluster_config import MIN_STEPS, ClusterConfig, compared, mini_batches


def test_every_pair_lies_at_its_nearest_centroid(truth: Run) -> None:
    X = fuse(*truth.pool.inputs(slice(None)), truth.config.cluster.fusion, query=None)
    C = torch.from_numpy(np.load(truth.at("cluster") / "centroids.npy"))
    torch.testing.assert_close(C.norm(dim=1), torch.ones(2))
    assigned = columns(truth, "cluster/clusters")
    own = (X * C[torch.from_numpy(assigned["cluster"])]).sum(1)
    np.testing.assert_allclose(assigned["cosine"], own, atol=1e-6)
    nearest = (
        (X @ C.T).argmax(1).numpy()
    )  # these are the means of the clusters: some pairs lie nearer to another
    assert np.mean(assigned["cluster"] == nearest) > 0.9


def test_planted_groups_are_found(truth: Run, world: World, tmp_path: Path) -> None:
    """Three far apart meanings, in the embeddings of images and captions."""
    generator = np.random.default_rng(0)
    centres = np.linalg.qr(generator.normal(size=(16, 3)))[0].T
    group = np.unique(truth.pool.image, return_inverse=True)[1] % 3
    folder = tmp_path / "pool"
    shutil.copytree(truth.pool.folder, folder)
    images, texts = (centres[group] + 0.05 * generator.normal(size=(len(group), 16)) for _ in range(2))
    replant(folder, images, texts)
    run = carry_beside(with_sets(truth, pool=replace(world["pool"], folder=folder)), tmp_path, "cluster", k=3)
    assert adjusted_rand_score(group, columns(run, "cluster/clusters")["cluster"]) == 1


@pytest.mark.parametrize(("size", "most"), [(100, 1), (15, 4), (5, 12)])
def test_leaves_are_no_smaller_than_asked_for_and_the_tree_is_whole(
    truth: Run, tmp_path: Path, size: int, most: int
) -> None:
    settings = {"k": "auto", "first": 2, "min_cluster_size": size, "tolerance": 1e-9}
    run = carry_beside(truth, tmp_path, "cluster", **settings)
    details = run.manifest("cluster").details
    sizes, pairs = details["levels"], columns(run, "cluster/clusters")
    assert sizes[-1] <= most
    assert sizes[:-1] == [n for n in (2, 4, 8) if n < sizes[-1]]
    assert details["level"] == np.argmin(details["davies_bouldin"]) or sizes == [
        1
    ]  # the best, as none is stable
    tree = np.load(tmp_path / "cluster" / "tree.npz")
    place = pairs["leaf"]
    assert np.bincount(place).min() >= size
    for level in range(len(sizes) - 1, -1, -1):
        assert tree[f"centroids_of_level_{level}"].shape == (sizes[level], 32)
        np.testing.assert_array_equal(np.bincount(place), tree[f"pairs_of_level_{level}"])
        if level == details["level"]:
            np.testing.assert_array_equal(place, pairs["cluster"])
            np.testing.assert_array_equal(
                np.load(tmp_path / "cluster" / "centroids.npy"), tree[f"centroids_of_level_{level}"]
            )
        place = tree[f"parents_of_level_{level}"][place]
    assert set(place) == {0}


def test_the_stable_level_is_taken(truth: Run, tmp_path: Path) -> None:
    """The first one, which the next does not change by much."""
    settings = {"k": "auto", "first": 2, "min_cluster_size": 5, "tolerance": 0.9}
    details = carry_beside(truth, tmp_path, "cluster", **settings).manifest("cluster").details
    assert (details["level"], details["k"]) == (0, 2)
    assert len(details["levels"]) > 2


def test_more_clusters_than_pairs_become_one_a_pair_at_most(truth: Run, tmp_path: Path) -> None:
    run = carry_beside(truth, tmp_path, "cluster", k=10_000)
    assert len(truth.pool) * 0.9 < run.manifest("cluster").details["k"] <= len(truth.pool)
    assert columns(run, "cluster/clusters")["cosine"].mean() > 0.99


def test_a_mini_batch_is_work_for_many_workers(truth: Run) -> None:
    config = replace(truth.config.cluster, k=2, steps=3, step_pairs=1, bucket_size=10, epochs=1)
    kmeans = KMeans.of(Fused(truth.pool, config.fusion), 240, config, seed=0)
    batches = mini_batches(config, 240)
    assert batches[:3] == [(0, 80), (80, 160), (160, 240)]
    assert len(batches) >= MIN_STEPS
    assert kmeans.spans(80, 160) == [(a, a + 10) for a in range(80, 160, 10)]


def test_cosines_are_counted_beforehand() -> None:
    """What `plan` reckons with is what the workers do: K cosines for every row of every pass, the last of which assigns."""
    config, rows = ClusterConfig(k=12, step_pairs=4, bucket_size=50), 600
    kmeans, spans = KMeans.of(Given(bunches()), rows, config, seed=0), list[tuple[int, int]]()
    with LocalEngine().pool(FoldWorker(kmeans.data)) as pool:
        kmeans.statistic(pool, kmeans.fit(pool, spans.append), spans.append)
    assert compared(config, rows) == 12 * (sum(stop - start for start, stop in spans) + rows)


@dataclass(frozen=True)
class Given:
    """Rows that are there."""

    X: torch.Tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.X[start:stop]


def bunches() -> torch.Tensor:
    """600 rows about twelve directions, of which the first has a half."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randint(0, 24, (600,), generator=generator).clamp_max(12) % 12
    return unit_rows(torch.eye(12)[own] + 0.05 * torch.randn(600, 12, generator=generator))


@pytest.mark.parametrize("bucket_size", [1, 7, 600])
def test_any_partition_gives_the_same_centroids(bucket_size: int) -> None:
    config = ClusterConfig(k=12, step_pairs=4, bucket_size=bucket_size)
    kmeans = KMeans.of(Given(bunches()), 600, config, seed=0)
    with LocalEngine().pool(FoldWorker(kmeans.data)) as pool:
        centroids = kmeans.fit(pool)
        whole = replace(kmeans, config=replace(config, bucket_size=50))
        torch.testing.assert_close(centroids, whole.fit(pool), rtol=0, atol=1e-5)
        assert whole.statistic(pool, centroids).inertia == pytest.approx(600 * 0.0025 * 11, rel=0.1)


def test_a_second_device_gives_the_same(truth: Run) -> None:
    config = truth.config.cluster
    with LocalEngine().pool(FoldWorker(Fused(truth.pool, config.fusion, "cpu:0"))) as pool:
        other = KMeans.of(Fused(truth.pool, config.fusion, "cpu:0"), 240, config, seed=0).fit(pool)
        torch.testing.assert_close(
            other, KMeans.of(Fused(truth.pool, config.fusion), 240, config, 0).fit(pool)
        )


@pytest.mark.ray
def test_two_workers_give_the_bits_of_the_plain_loop(ray_engine: Engine) -> None:
    config = ClusterConfig(k=12, step_pairs=4, bucket_size=9)
    kmeans = KMeans.of(Given(bunches()), 600, config, seed=0)
    fits = []
    for engine in (LocalEngine(), ray_engine):
        with engine.pool(FoldWorker(kmeans.data), workers=2) as pool:
            fits.append(kmeans.fit(pool))
    assert torch.equal(*fits)
