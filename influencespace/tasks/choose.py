"""Other choices from a finished run's scores: a cleaned pool of a given size, and a coreset that spreads over the pool."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.coreset import d2, diversity, herding, k_center
from influencespace.core.histogram import Column, Cut, Goal, carried_out, search
from influencespace.core.select import KEPT
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import buckets_of, read_rows, table_rows
from influencespace.data.mirror import here
from influencespace.data.pair_set import PairSet
from influencespace.data.results import CURATED, check_result
from influencespace.data.sorting import sorted_tables
from influencespace.errors import InputError
from influencespace.models.fusion import concatenation
from influencespace.run import Run
from influencespace.stages.passes import RANGE, looped

Method = Literal["d2", "k_center", "herding", "diversity"]
LOWEST = "lowest score"
MAX_AT_ONCE = 32_768
"""Kept pairs among which a coreset is chosen at once: some methods compare each with each."""
CORESET = pa.schema([("rank", pa.int64()), ("uid", pa.large_string()), ("score", pa.float64())])
"""Columns of coreset.parquet."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How many pairs were chosen of how many, and where they are written."""

    path: Path
    chosen: int
    of: int


def clean(run: Run, fraction: float | None) -> Choice:
    """Remove the share of pairs that score lowest; None removes those that the run itself did not keep.

    Writes clean/<fraction>/cleaned.parquet with the columns of curated.parquet; all that is kept has weight 1. Raises InputError
    for a fraction that is not within [0, 1) and for a run that is not finished.
    """
    if fraction is not None and not 0 <= fraction < 1:
        raise InputError(f"fraction is {fraction}: give the share of pairs to remove, 0 to below 1, or auto")
    run.summary()
    curated = check_result(run.folder, CURATED)
    rows, cut = table_rows(curated), None
    if fraction is not None:
        read = partial(_scores, curated)
        # nan, which nothing could judge, sorts last: it is kept longest
        lowest = search(_itself, [Goal(rank=round(fraction * rows))], rows)
        (cut,) = carried_out(lowest, looped(read, rows))
    name = "auto" if fraction is None else f"{fraction:g}"
    path = run.at("clean") / name / "cleaned.parquet"
    chosen, start, writer = 0, 0, None
    with atomic_path(path) as aside, pq.ParquetFile(here(curated)) as file:
        for batch in file.iter_batches(RANGE):
            table = _cleaned(pa.Table.from_batches([batch]), start, cut)
            writer = writer or pq.ParquetWriter(aside, table.schema)
            writer.write_table(table)
            chosen, start = chosen + pc.sum(table["kept"]).as_py(), start + len(table)
        assert writer is not None, f"{curated} is empty"
        writer.close()
    return Choice(path=path, chosen=chosen, of=rows)


def _scores(curated: Path, start: int, stop: int) -> Column:
    score = read_rows(curated, slice(start, stop), "score")["score"]
    return Column(score.astype(np.float64), np.arange(start, stop))


def _itself(column: Column) -> Column:
    return column


def _cleaned(table: Any, start: int, cut: Cut | None) -> Any:
    """The decisions on a range of pairs without those that lie before the cut, or as they are."""
    kept, reason = table["kept"].to_numpy(), table["reason"]
    if cut is not None:
        score = table["score"].to_numpy().astype(np.float64)
        kept = ~cut.below(score, np.arange(start, start + len(score)))
        reason = pa.array(np.where(kept, KEPT, LOWEST).tolist())
    for name, values in (("kept", kept), ("weight", kept.astype(np.float64)), ("reason", reason)):
        values = values if name == "reason" else pa.array(values)
        table = table.set_column(table.column_names.index(name), name, values)
    return table


@dataclass(frozen=True, kw_only=True)
class KeptPairs:
    """The kept pairs of a finished run, numbered in the pool's order."""

    curated: Path
    edges: IntArray
    """How many of them lie before each range of the pool, and in all."""
    lowest: float
    """Their lowest score."""

    @classmethod
    def of(cls, curated: Path) -> "KeptPairs":
        counts, lowest = [0], np.inf
        for start, stop in buckets_of(table_rows(curated), RANGE):
            _, score = _kept_of(curated, start, stop)
            counts.append(len(score))
            lowest = float(np.fmin(lowest, np.fmin.reduce(score, initial=np.inf)))
        return cls(curated=curated, edges=np.cumsum(counts), lowest=lowest)

    def __len__(self) -> int:
        return int(self.edges[-1])

    def read(self, first: int, last: int) -> tuple[IntArray, FloatArray]:
        """Rows of the pool and scores of the kept pairs [first, last) (m,), (m,)."""
        parts = []
        for number in np.flatnonzero((self.edges[1:] > first) & (self.edges[:-1] < last)):
            before, start = int(self.edges[number]), int(number) * RANGE
            local = slice(max(0, first - before), last - before)
            parts.append([values[local] for values in _kept_of(self.curated, start, start + RANGE)])
        rows, score = zip(*parts, strict=True)
        return np.concatenate(rows), np.concatenate(score)


def _kept_of(curated: Path, start: int, stop: int) -> tuple[IntArray, FloatArray]:
    """Rows and scores of the kept pairs of a range."""
    columns = read_rows(curated, slice(start, stop), "kept", "score")
    (kept,) = np.nonzero(columns["kept"])
    return start + kept, columns["score"][kept].astype(np.float64)


def coreset(run: Run, size: float, method: Method = "d2") -> Choice:
    """Choose pairs that stand for all kept ones: `size` is a share of the pool (at most 1) or a number of pairs.

    `d2` weighs influence against likeness; the others look at likeness alone, of image and text embeddings side by side.
    Harmful pairs are never chosen. More than MAX_AT_ONCE kept pairs are cut into equal random parts, which take turns to name
    their next one (Mirzasoleiman et al. 2013): pairs of two parts are not compared. The embeddings of one part are in memory.
    Writes coreset/<method>-<size>/coreset.parquet (rank, uid, score), the most wanted first: a smaller one is a prefix.
    Raises InputError for a size that the kept pairs cannot fill.
    """
    if not 0 < size < math.inf or (size > 1 and size != round(size)):
        raise InputError(
            f"size is {size:g}: give a share of the pool, above 0 and at most 1, or a number of pairs"
        )
    run.summary()
    curated = check_result(run.folder, CURATED)
    rows, kept = table_rows(curated), KeptPairs.of(curated)
    count = round(size * rows) if size <= 1 else round(size)
    if not 1 <= count <= len(kept):
        raise InputError(
            f"size is {size:g}: that is {count} pairs, and the run kept {len(kept)} of {rows}; ask for 1 to {len(kept)}"
        )
    path = run.at("coreset") / f"{method}-{size:g}" / "coreset.parquet"
    with atomic_path(path) as aside, pq.ParquetWriter(aside, CORESET) as writer:
        for table in sorted_tables(_chosen(run.pool, kept, count, method), "rank", RANGE):
            writer.write_table(table)
    return Choice(path=path, chosen=count, of=rows)


def _chosen(pool: PairSet, kept: KeptPairs, count: int, method: Method) -> Iterator[pa.Table]:
    """What each part of the kept pairs chooses, in columns of coreset.parquet."""
    parts, first = -(-len(kept) // MAX_AT_ONCE), 0
    for part in range(parts):
        size, wanted = (number // parts + (part < number % parts) for number in (len(kept), count))
        if wanted:
            rows, score = kept.read(first, first + size)  # curated.parquet has the pool's order
            X = concatenation(*pool.inputs(rows))
            if method == "d2":
                # pooled influence is a mean over like pairs already
                chosen = d2(X, score - kept.lowest, wanted, forward=None)
            else:
                chosen = {"k_center": k_center, "herding": herding, "diversity": diversity}[method](X, wanted)
            rank, uid = part + 1 + parts * np.arange(wanted), pool.read(rows[chosen], "uid")["uid"]
            yield pa.table([rank, uid, score[chosen]], schema=CORESET)
        first += size
