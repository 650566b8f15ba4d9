"""The redundancy stage: which pairs are copies or near copies of a better one, found cluster by cluster.

Pairs meet by the hash of what they share: equal ones by image and caption, near ones by cluster, images by caption, captions by
image. No process holds a column of the whole pool.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.cells import cells
from influencespace.core.hashing import hashed
from influencespace.core.kmeans import unit_rows
from influencespace.core.quality import FitAxis, QualityAxis
from influencespace.core.redundancy import exact_leaders, near_leaders
from influencespace.data.buckets import Columns, buckets_of, read_rows
from influencespace.data.exchange import PARTITION_ROWS, Vectors, whole_groups
from influencespace.data.pair_set import PairSet, unit_vectors
from influencespace.errors import STRICT
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.passes import RangePasses
from influencespace.stages.scoring.sampling import scores_of
from influencespace.stages.selection.captions import RANGE, VECTOR_RANGE, write_captions

COPIES = ("leader", "copies")
"""Columns of copies.parquet: the pair of the pool that a pair copies, itself where it is none; how many have this leader."""
EXACT, NEAR = ".exact", ".near"  # tables that only serve the work
MEAN_SAMPLE = 4096  # pairs whose mean is taken off
PAIR_VECTORS = ("image_vector", "text_vector")
"""Columns that go with the pairs of a cluster."""
READ = 16_384  # pairs whose embeddings are in memory at once
MEMORY = 2**30  # of a worker
MIN_PARTITION, MAX_PARTITIONS = 16_384, 256
"""Clusters are shared out among more tasks than thin columns are: rows of a task at least, and how many tasks by then."""


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
    max_compared: int = Field(default=4096, ge=2)
    """Pairs that are compared with each other at most: larger clusters are cut between captions that differ."""


@dataclass(frozen=True)
class WithQuality:
    """Columns: image, text, quality of a range of pairs, and `pair`, a number that copies share."""

    run: Run
    axis: QualityAxis

    def __call__(self, start: int, stop: int) -> Columns:
        columns = self.run.pool.read(slice(start, stop), "image", "text")
        pair = hashed(columns["image"], 1) ^ hashed(columns["text"], 2)
        return columns | {"quality": self.quality(start, stop), "pair": pair.view(np.int64)}

    def quality(self, start: int, stop: int) -> FloatArray:
        """Of a range of pairs (n,)."""
        scores = scores_of(self.run)(start, stop)
        return self.axis(scores.in_sample, scores.out_of_fold)


def lead_equal(columns: Columns) -> Columns:
    """Of whole groups of equal pairs: the row of the best one, and how many there are."""
    leader = exact_leaders(columns["image"], columns["text"], columns["quality"])
    return {"exact": columns["row"][leader], "held": np.bincount(leader, minlength=len(leader))[leader]}


@dataclass(frozen=True)
class WithCluster:
    """Columns: cluster, quality and number of equal pairs of a range of pairs; exact copies are groups of their own."""

    pairs: WithQuality
    folder: Path

    def __call__(self, start: int, stop: int) -> Columns:
        rows = slice(start, stop)
        exact = read_rows(self.folder / f"{EXACT}.parquet", rows)
        cluster = read_rows(self.pairs.run.at("cluster") / "clusters.parquet", rows, "cluster")["cluster"]
        row = np.arange(start, stop)
        return {
            "cluster": np.where(exact["exact"] == row, cluster.astype(np.int64), -1 - row),
            "quality": self.pairs.quality(start, stop),
            "exact": exact["exact"],
            "held": exact["held"],
        }


@dataclass(frozen=True)
class StoredPairs:
    """Columns: the embeddings of a range of pairs."""

    pool: PairSet

    def __call__(self, start: int, stop: int) -> Columns:
        rows = slice(start, stop)
        return {name: self.pool.stored(rows, kind) for kind, name in enumerate(PAIR_VECTORS)}


@dataclass(frozen=True, kw_only=True)
class CompareClusters:
    """Of whole clusters, exact copies aside: the leader of each pair, and how many pairs that leads, exact copies among them."""

    config: RedundancyConfig
    means: tuple[Tensor, Tensor]
    device: str

    def __call__(self, columns: Columns, vectors: Mapping[str, Vectors] | None = None) -> Columns:
        """Without vectors no pair is compared."""
        row, leader = columns["row"], np.arange(len(columns["row"]))
        compared = np.flatnonzero(columns["cluster"] >= 0) if vectors else leader[:0]
        for start, stop in whole_groups(columns["cluster"][compared], READ):
            places = compared[start:stop]
            cluster, quality = columns["cluster"][places], columns["quality"][places]
            leader[places] = places[self._leaders(vectors or {}, places, cluster, quality)]
        copies = np.bincount(leader, columns["held"], len(row)).astype(np.int64)
        return {"exact": columns["exact"], "leader": row[leader], "copies": copies[leader]}

    def _leaders(
        self, vectors: Mapping[str, Vectors], rows: IntArray, cluster: IntArray, quality: FloatArray
    ) -> IntArray:
        """The place of each pair's leader among these: of some clusters, which are read at once, or a large one, which is read in
        parts."""
        at_once = self._inputs(vectors, rows) if len(rows) <= READ else None

        def read(places: IntArray) -> tuple[Tensor, Tensor]:
            if at_once is None:
                return self._inputs(vectors, rows[places])
            here = torch.from_numpy(places).to(at_once[0].device)
            return at_once[0][here], at_once[1][here]

        leader = np.arange(len(rows))
        for places in np.split(leader.copy(), np.flatnonzero(np.diff(cluster)) + 1):
            for part in cells(places, read, self.config.max_compared):
                part = part[np.argsort(-quality[part], kind="stable")]
                leader[part] = part[near_leaders(*read(part), self.config.image, self.config.text)]
        return leader

    def _inputs(self, vectors: Mapping[str, Vectors], rows: IntArray) -> tuple[Tensor, Tensor]:
        inputs = [unit_vectors(vectors[name][rows], self.device) for name in PAIR_VECTORS]
        images, texts = (unit_rows(X - mean.to(X.device)) for X, mean in zip(inputs, self.means))
        return images, texts


@dataclass(frozen=True)
class ReadTable:
    """Columns of a range of a table."""

    path: Path

    def __call__(self, start: int, stop: int) -> Columns:
        return read_rows(self.path, slice(start, stop))


def follow_exact(columns: Columns) -> Columns:
    """Of whole groups of equal pairs: what is known of the best one."""
    best = np.flatnonzero(columns["row"] == columns["exact"])  # one of each group
    group = np.unique(columns["exact"], return_inverse=True)[1]
    return {name: columns[name][best][group] for name in COPIES}


def alone(start: int, stop: int) -> Columns:
    """Columns of copies.parquet where no copies are looked for."""
    return dict(zip(COPIES, (np.arange(start, stop), np.ones(stop - start, np.int64)), strict=True))


def sample_means(pool: PairSet) -> tuple[Tensor, Tensor]:
    """Mean embedding of images and of captions of the first pairs, which are a random sample: (D,), (D,)."""
    images, texts = pool.inputs(slice(0, MEAN_SAMPLE))
    return images.mean(0), texts.mean(0)


@dataclass(frozen=True)
class CountCopies:
    """Task: how many pairs of a range are exact copies, and how many are any."""

    folder: Path
    start: int
    stop: int

    def __call__(self) -> tuple[int, int]:
        rows, row = slice(self.start, self.stop), np.arange(self.start, self.stop)
        exact = read_rows(self.folder / f"{EXACT}.parquet", rows, "exact")["exact"]
        leader = read_rows(self.folder / "copies.parquet", rows, "leader")["leader"]
        return int((exact != row).sum()), int((leader != row).sum())


class Redundancy(Stage):
    """Finds the copies among the pairs of the pool; writes copies.parquet and captions.parquet.

    A pair that copies no other leads itself. Copies in different clusters are missed, exact ones aside.
    """

    name = "redundancy"
    version = 3
    needs = ("proxies", "cluster")

    def settings(self, config: Any) -> RedundancyConfig:
        return config.redundancy

    def work(self, run: Run, workers: Workers) -> Details:
        rows = len(run.pool)
        describing = write_captions(run.pool, workers)
        if run.config.redundancy.find:
            exact, copies = self._find(run, workers, describing)
        else:
            workers.table("copies", alone, rows, RANGE)
            exact = copies = 0
        details = {"pairs": rows, "exact_copies": exact, "near_copies": copies - exact}
        return Details(rows_in=rows, rows_out=rows, details=details)

    def _find(self, run: Run, workers: Workers, describing: bool) -> tuple[int, int]:
        """Write copies.parquet; how many exact copies there are, and how many copies in all."""
        rows, folder = len(run.pool), workers.folder
        pairs = WithQuality(run, RangePasses(workers).fold(FitAxis(), scores_of(run), rows))
        workers.group_by(EXACT, pairs, "pair", lead_equal, rows, RANGE)
        compare = CompareClusters(
            config=run.config.redundancy,
            means=workers.once(partial(sample_means, run.pool)),
            device=workers.device,
        )
        workers.group_by(
            *(NEAR, WithCluster(pairs, folder), "cluster", compare, rows, VECTOR_RANGE),
            # where captions name classes an equal one does not say that a pair is a copy
            vectors=StoredPairs(run.pool) if describing else None,
            resources=workers.heavy(memory=MEMORY),
            partition_rows=min(PARTITION_ROWS, max(MIN_PARTITION, rows // MAX_PARTITIONS)),
        )
        workers.group_by("copies", ReadTable(folder / f"{NEAR}.parquet"), "exact", follow_exact, rows, RANGE)
        spans = buckets_of(rows, RANGE)
        counts = workers.map([CountCopies(folder, *span) for span in spans], label="count")
        return sum(exact for exact, _ in counts), sum(copies for _, copies in counts)
