"""The cluster stage: distributed mini-batch spherical k-means over fused embeddings, its tree, and every pair's leaf."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import field as plain_field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.kmeans import (
    Assignment,
    assign,
    davies_bouldin,
    nearest,
    seed_centroids,
    split_centroids,
    stable_level,
    step,
)
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns, buckets_of
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Pool
from influencespace.errors import STRICT
from influencespace.models.fusion import FusionConfig, fuse
from influencespace.run import Details, Run, Stage, Workers

QUERY_SAMPLE = 4096  # pairs whose mean embedding is the query of attention pooling


@options(frozen=True, kw_only=True, config=STRICT)
class ClusterConfig:
    """Semantic clusters of the pool."""

    k: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Clusters; `auto` doubles them until the Davies-Bouldin index settles, and takes the level from which on it is stable, or
    else the best one."""
    first: int = Field(default=4, ge=1)
    """Clusters of the first level of `auto`."""
    min_cluster_size: int = Field(default=800, ge=1)
    """Mean pairs a cluster must have: a leaf needs enough pairs for each of its quality quantiles."""
    tolerance: float = Field(default=0.02, gt=0)
    """`auto` stops when the index changes by less than this share."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the pool at each level."""
    batch_size: int = Field(default=8192, ge=1)
    """Pairs of a mini-batch."""
    sample: int = Field(default=20_000, ge=2)
    """Pairs that seed centroids: the first of the canonical order, which is random."""
    bucket_size: int = Field(default=16_384, ge=1)
    """Pairs assigned in one task; no centroid depends on it."""
    fusion: FusionConfig = plain_field(default_factory=FusionConfig)


@dataclass(frozen=True)
class Fused:
    """Fused embeddings of a pool, computed where they are used."""

    pool: PairSet
    fusion: FusionConfig

    @cached_property
    def _query(self) -> Tensor:
        images, texts = self.pool.inputs(slice(0, QUERY_SAMPLE))
        return torch.cat([images, texts]).mean(0) if images.shape[1] == texts.shape[1] else images.mean(0)

    def rows(self, start: int, stop: int) -> Tensor:
        images, texts = self.pool.inputs(slice(start, stop))
        return fuse(images, texts, self.fusion, query=self._query)


@dataclass(frozen=True)
class FoldWorker:
    """WorkerFactory: folds the k-means statistic of a range of pairs for the centroids that are shared."""

    pool: PairSet
    fusion: FusionConfig

    def __call__(self) -> Callable[[tuple[int, int], Tensor], Assignment]:
        fused = Fused(self.pool, self.fusion)
        return lambda span, centroids: assign(fused.rows(*span), centroids)


@dataclass(frozen=True, kw_only=True)
class Seeding:
    """Task: first centroids, or the children of given ones, from the recorded sample."""

    pool: PairSet
    config: ClusterConfig
    k: int
    seed: int
    parents: Tensor | None = None

    def __call__(self) -> tuple[Tensor, NDArray[np.int64], Tensor]:
        sample = Fused(self.pool, self.config.fusion).rows(0, self.config.sample)
        spare = sample[:256]
        if self.parents is None:
            return seed_centroids(sample, self.k, self.seed), np.zeros(self.k, np.int64), spare
        children, parent = split_centroids(self.parents, sample, self.seed)
        return children, parent, spare


@dataclass(frozen=True, kw_only=True)
class AssignBucket:
    """Columns: the nearest centroid of a bucket of pairs, and its cosine."""

    pool: PairSet
    fusion: FusionConfig
    centroids: Tensor

    def __call__(self, start: int, stop: int) -> Columns:
        index, cosine = nearest(Fused(self.pool, self.fusion).rows(start, stop), self.centroids)
        return {"cluster": index.numpy(), "cosine": cosine.numpy()}


def refine(pool: Pool, centroids: Tensor, spare: Tensor, rows: int, config: ClusterConfig) -> Tensor:
    """Mini-batch passes over the canonical order: slice t of the order is mini-batch t."""
    seen = torch.zeros(len(centroids), dtype=torch.float64)
    for _ in range(config.epochs):
        for start, stop in buckets_of(rows, config.batch_size):
            spans = [(start + a, start + b) for a, b in buckets_of(stop - start, config.bucket_size)]
            batch = pool.fold(spans, Assignment.merge, centroids)
            centroids, seen = step(centroids, seen, batch, spare)
    return centroids


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the tree of clusters."""

    centroids: Tensor
    parent: NDArray[np.int64]
    """Of each centroid, on the level above."""
    davies_bouldin: float


def grow(pool: Pool, run: Run, rows: int) -> list[Level]:
    """The levels of the tree, each with twice the clusters of the one above, until the index settles or they grow too small."""
    config: ClusterConfig = run.config.cluster
    spans = list(buckets_of(rows, config.bucket_size))
    limit = max(1, rows // config.min_cluster_size)
    k = min(config.first, limit) if config.k == "auto" else min(config.k, rows)
    levels: list[Level] = []
    while True:
        parents = levels[-1].centroids if levels else None
        seeding = Seeding(pool=run.pool, config=config, k=k, seed=run.seed, parents=parents)
        centroids, parent, spare = pool.run(seeding)
        centroids = refine(pool, centroids, spare, rows, config)
        index = davies_bouldin(centroids, pool.fold(spans, Assignment.merge, centroids))
        levels.append(Level(centroids=centroids, parent=parent, davies_bouldin=index))
        before = levels[-2].davies_bouldin if len(levels) > 1 else np.inf
        settled = abs(index - before) < config.tolerance * before < np.inf
        if config.k != "auto" or settled or 2 * len(centroids) > limit:
            return levels


@dataclass(frozen=True)
class CountPairs:
    """Task: the pairs of a pool."""

    pool: PairSet

    def __call__(self) -> int:
        return len(self.pool)


class Cluster(Stage):
    """Clusters the pool; writes centroids.npy, tree.npz and clusters.parquet (cluster, cosine)."""

    name = "cluster"

    def settings(self, config: Any) -> tuple[ClusterConfig, int]:
        return config.cluster, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        config, _ = self.settings(run.config)
        rows = workers.once(CountPairs(run.pool))
        with workers.pool(FoldWorker(run.pool, config.fusion), workers.cores) as pool:
            levels = grow(pool, run, rows)
        level = stable_level([one.davies_bouldin for one in levels], config.tolerance)
        chosen = levels[level]
        assigned = AssignBucket(pool=run.pool, fusion=config.fusion, centroids=chosen.centroids)
        workers.table("clusters", assigned, rows, config.bucket_size)
        write_arrays(workers.folder, chosen, levels)
        details = {
            "k": len(chosen.centroids),
            "level": level,
            "levels": [len(level.centroids) for level in levels],
            "davies_bouldin": [level.davies_bouldin for level in levels],
        }
        return Details(rows_in=rows, rows_out=rows, details=details)


def write_arrays(out: Path, chosen: Level, levels: Sequence[Level]) -> None:
    """Centroids of the chosen level, and each centroid's parent level by level."""
    with atomic_path(out / "centroids.npy") as aside, aside.open("wb") as file:
        np.save(file, chosen.centroids.numpy())
    with atomic_path(out / "tree.npz") as aside, aside.open("wb") as file:
        parents: dict[str, Any] = {f"parents_of_level_{i}": level.parent for i, level in enumerate(levels)}
        np.savez(file, **parents)
