"""Orders by how alike pictures are, cluster by cluster: likeness.parquet."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.coreset import d2, diversity, k_center, repeated
from influencespace.data.buckets import Columns, read_rows
from influencespace.data.embeddings import IMAGE
from influencespace.data.exchange import Vectors, whole_groups
from influencespace.data.pair_set import PairSet, unit_vectors
from influencespace.run import Run, Workers

RANGE = 32_768  # pairs of a task that passes embeddings on
COMPARED = 4096
"""Pairs that are compared with each other at most: a larger cluster is cut into parts, each a random sample of it."""
VECTOR = "image_vector"


@dataclass(frozen=True)
class WithCluster:
    """Columns: cluster and CLIP score of a range of pairs."""

    pool: PairSet
    clusters: Path

    def __call__(self, start: int, stop: int) -> Columns:
        rows = slice(start, stop)
        columns = read_rows(self.clusters, rows, "cluster") | self.pool.read(rows, "clip_score")
        return {name: columns[name] for name in ("cluster", "clip_score")}


@dataclass(frozen=True)
class StoredImages:
    """Columns: the pictures' embeddings of a range of pairs."""

    pool: PairSet

    def __call__(self, start: int, stop: int) -> Columns:
        return {VECTOR: self.pool.stored(slice(start, stop), IMAGE)}


@dataclass(frozen=True)
class OrderClusters:
    """Of whole clusters: how far in front each pair is by each of some orders, the higher the better."""

    names: tuple[str, ...]
    device: str

    def __call__(self, columns: Columns, vectors: Mapping[str, Vectors]) -> Columns:
        orders = {name: np.zeros(len(columns["cluster"])) for name in self.names}
        for start, stop in whole_groups(columns["cluster"], 1):
            parts = -(-(stop - start) // COMPARED)
            for part in range(parts):  # rows are in hash order, so that every part is a sample
                rows = np.arange(start + part, stop, parts)
                X = unit_vectors(vectors[VECTOR][rows], self.device)
                for name, values in orders.items():
                    values[rows] = ORDER[name](X, columns["clip_score"][rows].astype(np.float64))
        return dict(orders)


def _places(order: IntArray) -> FloatArray:
    """Minus the place of each row in an order (n,), over their number: the first parts of clusters go together."""
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    return -(place + 0.5) / len(order)


def _by_d2(X: Tensor, clip_score: FloatArray) -> FloatArray:
    low, spread = clip_score.min(), np.ptp(clip_score) or 1.0
    return _places(d2(X, (clip_score - low) / spread, len(X)) if len(X) > 1 else np.zeros(1, np.int64))


ORDER: dict[str, Callable[[Tensor, FloatArray], FloatArray]] = {
    "d2": _by_d2,
    "semdedup": lambda X, clip_score: -repeated(X),
    "diversity": lambda X, clip_score: _places(diversity(X, len(X))),
    "coreset": lambda X, clip_score: _places(k_center(X, len(X))),
}


def write_likeness(run: Run, names: tuple[str, ...], workers: Workers, **needs: Any) -> None:
    """Write likeness.parquet by the clusters of the first round."""
    pool = run.everything
    emit = WithCluster(pool, run.first.at("cluster") / "clusters.parquet")
    order = OrderClusters(names, workers.device)
    workers.group_by(
        "likeness", emit, "cluster", order, len(pool), RANGE, vectors=StoredImages(pool), **needs
    )
