"""The redundancy stage: which pairs are copies or near copies of a better one, found cluster by cluster."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from influencespace.core.arrays import IntArray
from influencespace.core.kmeans import unit_rows
from influencespace.core.quality import MAX_SHARED, quality_axis, shared_captions
from influencespace.core.redundancy import exact_leaders, halved, near_leaders
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns, WriteBucket, read_bucket, read_columns, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.errors import STRICT
from influencespace.models.fusion import concatenation
from influencespace.run import Details, Run, Stage, Workers

COPIES = "copies.parquet"
MEAN_SAMPLE = 4096  # distinct images, and captions, whose mean is taken off


@options(frozen=True, kw_only=True, config=STRICT)
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
    max_compared: int = Field(default=16_384, ge=2)
    """Pairs that are compared with each other at most: larger clusters are halved across their greatest spread."""


@dataclass(frozen=True, kw_only=True)
class OrderPairs:
    """Task: drop exact copies, and order the others by cluster and quality.

    Gives the end of each cluster in that order, and whether captions describe images.
    """

    run: Run
    folder: Path

    def __call__(self) -> tuple[list[int], bool]:
        pool = self.run.pool
        columns = read_columns(self.run.at("proxies") / "quality.parquet", "neg_clip_in", "neg_clip_out")
        quality = quality_axis(columns["neg_clip_in"], columns["neg_clip_out"])
        leader = np.arange(len(quality))
        if self.run.config.redundancy.find:
            leader = exact_leaders(pool.image, pool.text, quality)
        rows = np.unique(leader)
        cluster = read_columns(self.run.at("cluster") / "clusters.parquet", "cluster")["cluster"][rows]
        order = rows[np.lexsort((-quality[rows], cluster))]
        for name, values in (("leader", leader), ("order", order)):
            with atomic_path(self.folder / f".{name}.npy") as aside, aside.open("wb") as file:
                np.save(file, values)
        sizes = np.bincount(cluster)
        ends: list[int] = np.cumsum(sizes[sizes > 0]).tolist()
        return ends, shared_captions(pool.image, pool.text) <= MAX_SHARED


@dataclass(frozen=True, kw_only=True)
class CompareCluster:
    """Columns: the leader of each pair of a cluster, exact copies aside, for a range of the ordered pairs."""

    pool: PairSet
    config: RedundancyConfig
    folder: Path
    describing: bool
    """Whether captions describe single images, so that an equal one says that a pair is a copy."""

    def __call__(self, start: int, stop: int) -> Columns:
        rows = np.load(self.folder / ".order.npy")[start:stop]
        return {"pair": rows, "leader": self._leaders(rows)}

    def _leaders(self, rows: IntArray) -> IntArray:
        if not (self.config.find and self.describing):
            return rows
        sample = self.pool.inputs(slice(0, MEAN_SAMPLE))
        images, texts = (
            unit_rows(values - some.mean(0)) for values, some in zip(self.pool.inputs(rows), sample)
        )
        leader = np.empty_like(rows)
        for part in halved(concatenation(images, texts), self.config.max_compared):
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
        parts = [read_bucket(self.folder, "near", start, "pair", "leader") for start in self.starts]
        pair, near = (np.concatenate([part[name] for part in parts]) for name in ("pair", "leader"))
        exact = np.load(self.folder / ".leader.npy")
        leader = exact.copy()
        leader[pair] = near
        write_columns(self.folder / COPIES, {"leader": leader[exact], "image": self.pool.image})
        return {
            "pairs": len(exact),
            "exact_copies": len(exact) - len(pair),
            "near_copies": int((near != pair).sum()),
        }


class Redundancy(Stage):
    """Finds the copies among the pairs of the pool; writes copies.parquet: each pair's image and its leader.

    A pair that copies no other leads itself. Copies in different clusters are missed, exact ones aside.
    """

    name = "redundancy"
    needs = ("proxies", "cluster")

    def settings(self, config: Any) -> RedundancyConfig:
        return config.redundancy

    def work(self, run: Run, workers: Workers) -> Details:
        ends, describing = workers.once(OrderPairs(run=run, folder=workers.folder))
        compare = CompareCluster(
            pool=run.pool, config=run.config.redundancy, folder=workers.folder, describing=describing
        )
        tasks = [
            WriteBucket(folder=workers.folder, table="near", start=a, stop=b, compute=compare)
            for a, b in zip([0, *ends], ends)
        ]
        workers.map(tasks, total=ends[-1], size=int)
        counts = workers.once(JoinCopies(run.pool, workers.folder, [task.start for task in tasks]))
        return Details(rows_in=counts["pairs"], rows_out=counts["pairs"], details=counts)
