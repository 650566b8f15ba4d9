"""The cluster stage: distributed mini-batch spherical k-means over fused embeddings, its tree, and every pair's place in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.core.cluster_tree import tree_levels
from influencespace.core.kmeans import (
    Assignment,
    assign,
    balance,
    davies_bouldin,
    grouped,
    nearest,
    seed_centroids,
    stable_level,
    step,
    unit_rows,
)
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns, buckets_of
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Done, Pool, nothing
from influencespace.engine.placement import Resources
from influencespace.models.fusion import FusionConfig, fuse
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.scoring.cluster_config import ClusterConfig, clusters, folded, mini_batches

QUERY_SAMPLE = 4096  # pairs whose mean embedding is the query of attention pooling
OVERSIZE = 8
"""A leaf of `auto` with so many times the mean is split."""
MIN_SAMPLE = 2048
WORKER_MEMORY = 800 * 2**20
"""Bytes: half of it Python and torch; rows of a bucket and states of 1,000 centroids are less than the rest."""


class Rows(Protocol):
    """Unit rows that are clustered; cheap to pickle."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), on the device where they are compared."""


@dataclass(frozen=True)
class Fused:
    """Rows: fused embeddings of a pool, computed where they are used."""

    pool: PairSet
    fusion: FusionConfig
    device: str = "cpu"

    @cached_property
    def _query(self) -> Tensor:
        images, texts = self.pool.inputs(slice(0, QUERY_SAMPLE), self.device)
        return torch.cat([images, texts]).mean(0) if images.shape[1] == texts.shape[1] else images.mean(0)

    def rows(self, start: int, stop: int) -> Tensor:
        images, texts = self.pool.inputs(slice(start, stop), self.device)
        query = self._query if self.fusion.name == "attention_pooling" else None
        return fuse(images, texts, self.fusion, query=query)


@dataclass(frozen=True)
class FoldWorker:
    """WorkerFactory: folds the k-means statistic of a range of rows for the centroids that are shared."""

    data: Rows

    def __call__(self) -> Callable[[tuple[int, int], Tensor], Assignment]:
        def fold(span: tuple[int, int], centroids: Tensor) -> Assignment:
            rows = self.data.rows(*span)
            return assign(rows, centroids.to(rows.device)).cpu()

        return fold


@dataclass(frozen=True, kw_only=True)
class Seeding:
    """Task: the first centroids, from the first rows."""

    data: Rows
    rows: int
    k: int
    seed: int

    def __call__(self) -> Tensor:
        return seed_centroids(self.data.rows(0, self.rows), self.k, self.seed).cpu()


@dataclass(frozen=True, kw_only=True)
class Balancing:
    """Task: split oversize clusters and seed small ones anew, from the first rows."""

    data: Rows
    rows: int
    centroids: Tensor
    memory: Assignment
    count: Tensor
    shares: tuple[float, float]
    seed: int

    def __call__(self) -> tuple[Tensor, Assignment]:
        sample = self.data.rows(0, self.rows).cpu()
        return balance(self.centroids, self.memory, self.count, sample, self.shares, self.seed)


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Mini-batches over the canonical order: slice t of the order is mini-batch t, folded over ranges on all workers."""

    data: Rows
    rows: int
    k: int
    seed: int
    config: ClusterConfig
    shares: tuple[float, float]
    """A cluster with less than the first share of the rows is seeded anew; one with more than the second is split."""

    @classmethod
    def of(cls, data: Rows, rows: int, config: ClusterConfig, seed: int) -> "KMeans":
        """As the config asks for."""
        k = clusters(config, rows)
        if config.k == "auto":
            shares = config.min_cluster_size / rows, OVERSIZE / k
        else:
            shares = 0.0, float("inf")  # just empty ones
        return cls(data=data, rows=rows, k=k, seed=seed, config=config, shares=shares)

    @property
    def sample(self) -> int:
        """Rows that centroids are seeded from."""
        return min(self.rows, max(MIN_SAMPLE, self.config.seed_pairs * self.k))

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The tasks of a range of rows."""
        return [(start + a, start + b) for a, b in buckets_of(stop - start, self.config.bucket_size)]

    def fit(self, pool: Pool, done: Done = nothing) -> Tensor:
        """The centroids (K, d); `done` is called with each range (start, stop) that has been folded."""
        centroids: Tensor = pool.run(Seeding(data=self.data, rows=self.sample, k=self.k, seed=self.seed))
        memory, batches = Assignment.nothing(centroids), mini_batches(self.config, self.rows)
        count = memory.count
        for turn, batch in enumerate(batches):
            folded = pool.fold(self.spans(*batch), Assignment.merge, centroids, done=done)
            centroids, memory = step(centroids, memory, folded, turn / len(batches))
            count = count + folded.count
            if turn in (len(batches) // 4, len(batches) // 2):
                balancing = Balancing(
                    data=self.data,
                    rows=self.sample,
                    centroids=centroids,
                    memory=memory,
                    count=count,
                    shares=self.shares,
                    seed=self.seed + turn,
                )
                centroids, memory = pool.run(balancing)
                count = torch.zeros_like(memory.count)
        return centroids

    def statistic(self, pool: Pool, centroids: Tensor, done: Done = nothing) -> Assignment:
        """The statistic of all rows for given centroids."""
        result: Assignment = pool.fold(self.spans(0, self.rows), Assignment.merge, centroids, done=done)
        return result


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the tree of clusters."""

    label: IntArray
    """Of each centroid of the k-means (K,)."""
    centroids: Tensor
    pairs: IntArray
    """Of each cluster."""
    parent: IntArray
    """Of each cluster, on the level above; of the first level 0."""
    davies_bouldin: float


@dataclass(frozen=True, kw_only=True)
class GrowTree:
    """Task: the levels of the tree above the centroids, from the top; the last one has the leaves."""

    statistic: Assignment
    centroids: Tensor
    min_count: int
    first: int

    def __call__(self) -> list[Level]:
        mean = self.statistic.means(self.centroids)
        sizes = [self.first << i for i in range(32) if self.first << i < len(mean)]
        labels = tree_levels(self.statistic.count.numpy(), mean.numpy(), self.min_count, sizes)
        levels, above = [], np.zeros_like(labels[0])
        for label in labels:
            one = grouped(self.statistic, label)
            parent = np.zeros(len(one.count), np.int64)
            parent[label] = above
            index = davies_bouldin(one)
            centroids = unit_rows(one.total).to(self.centroids.dtype)
            pairs = one.count.numpy().astype(np.int64)
            levels.append(
                Level(label=label, centroids=centroids, pairs=pairs, parent=parent, davies_bouldin=index)
            )
            above = label
        return levels


@dataclass(frozen=True, kw_only=True)
class AssignBucket:
    """Columns: the leaf and the cluster of a bucket of pairs by their nearest centroid, and the cosine to the cluster's."""

    data: Rows
    centroids: Tensor
    leaf: IntArray
    chosen: Level

    def __call__(self, start: int, stop: int) -> Columns:
        rows = self.data.rows(start, stop)
        index = nearest(rows, self.centroids.to(rows.device))[0].cpu().numpy()
        cluster = self.chosen.label[index]
        cosine = (rows * self.chosen.centroids.to(rows.device)[torch.from_numpy(cluster)]).sum(1)
        return {"cluster": cluster, "cosine": cosine.cpu().numpy(), "leaf": self.leaf[index]}


@dataclass(frozen=True)
class CountPairs:
    """Task: the pairs of a pool."""

    pool: PairSet

    def __call__(self) -> int:
        return len(self.pool)


class Cluster(Stage):
    """Clusters the pool; writes centroids.npy, tree.npz and clusters.parquet (cluster, cosine, leaf)."""

    name = "cluster"
    version = 3

    def settings(self, config: Any) -> tuple[ClusterConfig, int]:
        return config.cluster, config.seed

    def resources(self, run: Run) -> Resources:
        return Resources(memory=WORKER_MEMORY)

    def work(self, run: Run, workers: Workers) -> Details:
        config, seed = self.settings(run.config)
        rows = workers.once(CountPairs(run.pool))
        workers = replace(workers, resources=workers.heavy(memory=WORKER_MEMORY))
        data = Fused(run.pool, config.fusion, workers.device)
        kmeans = KMeans.of(data, rows, config, seed)
        with (
            workers.progress(folded(config, rows), label="k-means") as bar,
            workers.pool(FoldWorker(data), -(-rows // config.bucket_size)) as pool,
        ):

            def advance(span: tuple[int, int]) -> None:
                bar.advance(span[1] - span[0])

            centroids = kmeans.fit(pool, advance)
            statistic = kmeans.statistic(pool, centroids, advance)
            fewest = config.min_cluster_size if config.k == "auto" else 1
            tree = GrowTree(statistic=statistic, centroids=centroids, min_count=fewest, first=config.first)
            levels: list[Level] = pool.run(tree)
        indices = [level.davies_bouldin for level in levels]
        level = stable_level(indices, config.tolerance) if config.k == "auto" else len(levels) - 1
        chosen = levels[level]
        assigned = AssignBucket(data=data, centroids=centroids, leaf=levels[-1].label, chosen=chosen)
        workers.table("clusters", assigned, rows, config.bucket_size)
        write_arrays(workers.folder, chosen, levels)
        details = {
            "k": len(chosen.centroids),
            "level": level,
            "levels": [len(level.centroids) for level in levels],
            "davies_bouldin": indices,
            "inertia": statistic.inertia / rows,
        }
        return Details(rows_in=rows, rows_out=rows, details=details)


def write_arrays(out: Path, chosen: Level, levels: Sequence[Level]) -> None:
    """Centroids of the chosen level; centroids, pairs and parents of the clusters of every level, the first at the top."""
    with atomic_path(out / "centroids.npy") as aside, aside.open("wb") as file:
        np.save(file, chosen.centroids.numpy())
    arrays: dict[str, Any] = {}
    for i, level in enumerate(levels):
        arrays[f"centroids_of_level_{i}"] = level.centroids.numpy()
        arrays[f"pairs_of_level_{i}"] = level.pairs
        arrays[f"parents_of_level_{i}"] = level.parent
    with atomic_path(out / "tree.npz") as aside, aside.open("wb") as file:
        np.savez(file, **arrays)
