"""The redundancy stage: which pairs are copies or near copies of a better one, found cluster by cluster."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from influencespace.core.kmeans import unit_rows
from influencespace.core.quality import MAX_SHARED, quality_axis, shared_captions
from influencespace.core.redundancy import exact_leaders, halved, near_leaders
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen
from influencespace.data.buckets import has_bucket, join_buckets, read_columns, write_bucket, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, run_once, run_task
from influencespace.engine.progress import progress
from influencespace.models.fusion import concatenation
from influencespace.stages.finish import finish_stage, finished_stage

IntArray = NDArray[np.int64]
COPIES = "copies.parquet"
MEAN_SAMPLE = 4096  # distinct images, and captions, whose mean is taken off


@options(frozen=True, kw_only=True)
class RedundancyConfig:
    """When a pair is a copy of another: both its image and its caption are."""

    find: bool = True
    """Whether copies are looked for; exact ones need no threshold. Near ones are looked for only where most captions are of one
    image: two pictures of a class that has one caption are no copies, however alike."""
    image: float = Field(default=0.75, gt=0, le=1)
    """Two images are one from this cosine of the given encoder's embeddings on, their mean taken off: encoders differ in how
    alike they find any two pictures. 1 finds equal ones only."""
    text: float = Field(default=0.99, gt=0, le=1)
    """The same for captions: stricter, since one picture's captions say similar things."""
    most: int = Field(default=16_384, ge=2)
    """Pairs that are compared with each other at most: larger clusters are halved across their greatest spread."""


@dataclass(frozen=True, kw_only=True)
class OrderPairs:
    """Task: drop exact copies, and order the others by cluster and quality.

    Gives the end of each cluster in that order, and whether captions describe images.
    """

    pool: PairSet
    config: RedundancyConfig
    quality: Path
    clusters: Path
    folder: Path

    def __call__(self) -> tuple[list[int], bool]:
        columns = read_columns(self.quality, "neg_clip_in", "neg_clip_out")
        quality = quality_axis(columns["neg_clip_in"], columns["neg_clip_out"])
        leader = np.arange(len(quality))
        if self.config.find:
            leader = exact_leaders(self.pool.image, self.pool.text, quality)
        rows = np.unique(leader)
        cluster = read_columns(self.clusters, "cluster")["cluster"][rows]
        order = rows[np.lexsort((-quality[rows], cluster))]
        for name, values in (("leader", leader), ("order", order)):
            with atomic_path(self.folder / f"{name}.npy") as aside, aside.open("wb") as file:
                np.save(file, values)
        sizes = np.bincount(cluster)
        ends: list[int] = np.cumsum(sizes[sizes > 0]).tolist()
        return ends, shared_captions(self.pool.image, self.pool.text) <= MAX_SHARED


@dataclass(frozen=True, kw_only=True)
class CompareCluster:
    """Task: the leader of each pair of a cluster, exact copies aside."""

    pool: PairSet
    config: RedundancyConfig
    folder: Path
    start: int
    stop: int
    mark: str
    describing: bool
    """Whether captions describe single images, so that an equal one says that a pair is a copy."""

    @property
    def name(self) -> str:
        return f"near copies among ordered pairs {self.start} to {self.stop}"

    def __call__(self) -> int:
        if not has_bucket(self.folder, "near", self.start, self.mark):
            rows = np.load(self.folder / "order.npy")[self.start : self.stop]
            write_bucket(
                self.folder, "near", self.start, self.mark, {"pair": rows, "leader": self._leaders(rows)}
            )
        return self.stop - self.start

    def _leaders(self, rows: IntArray) -> IntArray:
        if not (self.config.find and self.describing):
            return rows
        table = self.pool.table
        images, texts = (
            unit_rows(values - torch.from_numpy(distinct[:MEAN_SAMPLE].mean(0)))
            for values, distinct in zip(self.pool.inputs(rows), (table.images, table.texts))
        )
        leader = np.empty_like(rows)
        for part in halved(concatenation(images, texts), self.config.most):
            among = torch.from_numpy(part)
            near = near_leaders(images[among], texts[among], self.config.image, self.config.text)
            leader[part] = rows[part[near]]
        return leader


@dataclass(frozen=True)
class JoinCopies:
    """Task: write leader and image of every pair in canonical order; how many pairs are exact copies, and how many near ones."""

    pool: PairSet
    folder: Path
    starts: list[int]

    def __call__(self) -> dict[str, int]:
        join_buckets(self.folder, "near", self.starts)
        near = read_columns(self.folder / "near.parquet")
        exact = np.load(self.folder / "leader.npy")
        leader = exact.copy()
        leader[near["pair"]] = near["leader"]
        write_columns(self.folder / COPIES, {"leader": leader[exact], "image": self.pool.image})
        return {
            "pairs": len(exact),
            "exact_copies": len(exact) - len(near["pair"]),
            "near_copies": int((near["leader"] != near["pair"]).sum()),
        }


def redundancy(
    pool: PairSet,
    proxy_folder: Path,
    cluster_folder: Path,
    inputs: dict[str, str],
    config: RedundancyConfig,
    out: Path,
    engine: Engine,
) -> Manifest:
    """Find the copies among the pairs of the pool; writes copies.parquet: each pair's image and its leader.

    A pair that copies no other leads itself. Copies in different clusters are missed, exact ones aside.
    """
    mark = fingerprint({"stage": "redundancy", "writes": COPIES, "config": config, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    ordering = OrderPairs(
        pool=pool,
        config=config,
        quality=proxy_folder / "quality.parquet",
        clusters=cluster_folder / "clusters.parquet",
        folder=out,
    )
    ends, describing = run_once(engine, ordering)
    make = partial(CompareCluster, pool=pool, config=config, folder=out, mark=mark, describing=describing)
    tasks = [make(start=a, stop=b) for a, b in zip([0, *ends], ends)]
    with progress("redundancy", ends[-1], "pairs") as bar:
        for count in engine.map(run_task, tasks, num_actors=engine.cores):
            bar.advance(count)
    counts = run_once(engine, JoinCopies(pool, out, [task.start for task in tasks]))
    for name in ("near.parquet", "leader.npy", "order.npy"):
        (out / name).unlink(missing_ok=True)
    rows = counts["pairs"]
    manifest = Manifest(
        stage="redundancy", fingerprint=mark, inputs=inputs, rows_in=rows, rows_out=rows, details=counts
    )
    return finish_stage(out, manifest, began)
