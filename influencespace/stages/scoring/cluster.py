"""The cluster stage: distributed mini-batch spherical k-means over fused embeddings, its tree, and every pair's leaf."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import field as plain_field
from functools import cached_property, partial
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
    step,
)
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen
from influencespace.data.buckets import buckets_of, has_bucket, join_buckets, write_bucket
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, Pool, run_once, run_task
from influencespace.engine.progress import progress
from influencespace.models.fusion import FusionConfig, fuse
from influencespace.stages.finish import finish_stage, finished_stage

QUERY_SAMPLE = 4096  # pairs whose mean embedding is the query of attention pooling


@options(frozen=True, kw_only=True)
class ClusterConfig:
    """Semantic clusters of the pool."""

    k: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Clusters; `auto` doubles them until the Davies-Bouldin index settles."""
    first: int = Field(default=4, ge=1)
    """Clusters of the first level of `auto`."""
    least_size: int = Field(default=800, ge=1)
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
    seed: int = Field(default=0, ge=0)


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
    parents: Tensor | None = None

    def __call__(self) -> tuple[Tensor, NDArray[np.int64], Tensor]:
        sample = Fused(self.pool, self.config.fusion).rows(0, self.config.sample)
        spare = sample[:256]
        if self.parents is None:
            return seed_centroids(sample, self.k, self.config.seed), np.zeros(self.k, np.int64), spare
        children, parent = split_centroids(self.parents, sample, self.config.seed)
        return children, parent, spare


@dataclass(frozen=True, kw_only=True)
class AssignBlock:
    """Task: the nearest centroid of a block of pairs."""

    pool: PairSet
    config: ClusterConfig
    centroids: Tensor
    folder: Path
    start: int
    stop: int
    mark: str

    @property
    def name(self) -> str:
        return f"clusters of pairs {self.start} to {self.stop}"

    def __call__(self) -> int:
        if not has_bucket(self.folder, "clusters", self.start, self.mark):
            index, cosine = nearest(
                Fused(self.pool, self.config.fusion).rows(self.start, self.stop), self.centroids
            )
            columns = {"cluster": index.numpy(), "cosine": cosine.numpy()}
            write_bucket(self.folder, "clusters", self.start, self.mark, columns)
        return self.stop - self.start


def refine(pool: Pool, centroids: Tensor, spare: Tensor, rows: int, config: ClusterConfig) -> Tensor:
    """Mini-batch passes over the canonical order: slice t of the order is mini-batch t."""
    seen = torch.zeros(len(centroids), dtype=torch.float64)
    for _ in range(config.epochs):
        for start, stop in buckets_of(rows, config.batch_size):
            spans = [(start + a, start + b) for a, b in buckets_of(stop - start, config.bucket_size)]
            batch = pool.fold(spans, Assignment.merge, centroids)
            centroids, seen = step(centroids, seen, batch, spare)
    return centroids


def cluster(
    pool: PairSet, rows: int, inputs: dict[str, str], config: ClusterConfig, out: Path, engine: Engine
) -> Manifest:
    """Cluster the pool's `rows` pairs; writes centroids.npy, tree.npy and clusters.parquet."""
    mark = fingerprint({"stage": "cluster", "config": config, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    spans = list(buckets_of(rows, config.bucket_size))
    most = max(1, rows // config.least_size)
    k = min(config.first, most) if config.k == "auto" else min(config.k, rows)
    tree: list[NDArray[np.int64]] = []
    indices: list[float] = []
    levels: list[Tensor] = []
    with engine.pool(FoldWorker(pool, config.fusion), num_actors=engine.cores) as workers:
        parents: Tensor | None = None
        while True:
            centroids, parent, spare = workers.run(Seeding(pool=pool, config=config, k=k, parents=parents))
            centroids = refine(workers, centroids, spare, rows, config)
            index = davies_bouldin(centroids, workers.fold(spans, Assignment.merge, centroids))
            tree.append(parent)
            levels.append(centroids)
            indices.append(index)
            settled = len(indices) > 1 and abs(index - indices[-2]) < config.tolerance * indices[-2]
            if config.k != "auto" or settled or 2 * len(centroids) > most:
                break
            parents = centroids
    make = partial(AssignBlock, pool=pool, config=config, centroids=levels[-1], folder=out, mark=mark)
    tasks = [make(start=a, stop=b) for a, b in spans]
    with progress("cluster", rows, "pairs") as bar:
        for count in engine.map(run_task, tasks, num_actors=engine.cores):
            bar.advance(count)
    run_once(engine, partial(join_buckets, out, "clusters", [task.start for task in tasks]))
    write_arrays(out, levels, tree)
    details: dict[str, Any] = {
        "k": len(levels[-1]),
        "levels": [len(level) for level in levels],
        "davies_bouldin": indices,
    }
    manifest = Manifest(
        stage="cluster", fingerprint=mark, inputs=inputs, rows_in=rows, rows_out=rows, details=details
    )
    return finish_stage(out, manifest, began)


def write_arrays(out: Path, levels: Sequence[Tensor], tree: Sequence[NDArray[np.int64]]) -> None:
    """Centroids of the last level, and each centroid's parent level by level."""
    with atomic_path(out / "centroids.npy") as aside, aside.open("wb") as file:
        np.save(file, levels[-1].numpy())
    with atomic_path(out / "tree.npz") as aside, aside.open("wb") as file:
        parents: dict[str, Any] = {f"parents_of_level_{i}": parent for i, parent in enumerate(tree)}
        np.savez(file, **parents)
