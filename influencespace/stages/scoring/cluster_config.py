"""The settings of clusters, and what follows from them for a pool of any size: clusters, mini-batches and work."""

from dataclasses import field as plain_field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as options

from influencespace.data.buckets import buckets_of
from influencespace.errors import STRICT
from influencespace.models.fusion import FusionConfig

MEAN_OVER_MIN = 4
"""Pairs of a mean leaf of `auto`, over those of the smallest that is allowed: small leaves are then few."""
MIN_STEPS = 16


@options(frozen=True, kw_only=True, config=STRICT)
class ClusterConfig:
    """Semantic clusters of the pool."""

    k: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Clusters; `auto` makes as many leaves as `max_k` and `min_cluster_size` allow, merges them two by two, and takes the level
    from which on the Davies-Bouldin index is stable, or else the best one."""
    first: int = Field(default=4, ge=1)
    """Clusters of the first level of the tree; each next one has twice as many, down to the leaves."""
    max_k: int = Field(default=1024, ge=1)
    """Leaves that `auto` aims at, at most."""
    min_cluster_size: int = Field(default=200, ge=1)
    """Fewest pairs of a leaf of `auto`; a mean leaf has at least four times as many."""
    tolerance: float = Field(default=0.02, gt=0)
    """`auto` takes a level when the next changes the index by less than this share."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the pool that move the centroids; small pools are passed more often."""
    steps: int = Field(default=64, ge=1)
    """Mini-batches of a pass, at most."""
    step_pairs: int = Field(default=16, ge=1)
    """Pairs a cluster in a mini-batch, at least."""
    seed_pairs: int = Field(default=8, ge=1)
    """Pairs a cluster in the sample that seeds centroids: the first of the canonical order, which is random."""
    bucket_size: int = Field(default=8192, ge=1)
    """Pairs assigned in one task; no centroid depends on it."""
    fusion: FusionConfig = plain_field(default_factory=FusionConfig)


def leaves(config: ClusterConfig, rows: int) -> int:
    """Leaves of `auto` for so many rows."""
    return max(1, min(config.max_k, rows // (MEAN_OVER_MIN * config.min_cluster_size)))


def clusters(config: ClusterConfig, rows: int) -> int:
    """Clusters of the k-means on so many rows."""
    return leaves(config, rows) if config.k == "auto" else min(config.k, rows)


def mini_batches(config: ClusterConfig, rows: int) -> list[tuple[int, int]]:
    """All mini-batches in turn, as ranges of rows."""
    size = max(config.step_pairs * clusters(config, rows), -(-rows // config.steps))
    once = list(buckets_of(rows, size))
    return once * max(config.epochs, -(-MIN_STEPS // len(once)))


def folded(config: ClusterConfig, rows: int) -> int:
    """Rows that the k-means passes: those of all mini-batches, and once all for the statistic of the tree."""
    return sum(stop - start for start, stop in mini_batches(config, rows)) + rows


def compared(config: ClusterConfig, rows: int) -> int:
    """Cosines of a row with a centroid that the stage takes: the last pass assigns the rows."""
    return clusters(config, rows) * (folded(config, rows) + rows)
