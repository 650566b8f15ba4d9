"""Other choices from a finished run's scores: a cleaned pool of a given size, and a coreset that spreads over the pool."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from influencespace.core.coreset import d2, diversity, herding, k_center
from influencespace.core.histogram import Column, Cut, Goal, carried_out, search
from influencespace.core.select import KEPT
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import read_rows, table_rows
from influencespace.data.results import check_result
from influencespace.errors import InputError
from influencespace.models.fusion import concatenation
from influencespace.run import Run
from influencespace.stages.passes import RANGE, looped

Method = Literal["d2", "k_center", "herding", "diversity"]
LOWEST = "lowest score"


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
    curated = check_result(run.folder, "curated.parquet")
    rows, cut = table_rows(curated), None
    if fraction is not None:
        read = partial(_scores, curated)
        # nan, which nothing could judge, sorts last: it is kept longest
        lowest = search(_itself, [Goal(rank=round(fraction * rows))], rows)
        (cut,) = carried_out(lowest, looped(read, rows))
    name = "auto" if fraction is None else f"{fraction:g}"
    path = run.at("clean") / name / "cleaned.parquet"
    chosen, start, writer = 0, 0, None
    with atomic_path(path) as aside, pq.ParquetFile(curated) as file:
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


def coreset(run: Run, size: float, method: Method = "d2") -> Choice:
    """Choose pairs that stand for all kept ones: `size` is a share of the pool (at most 1) or a number of pairs.

    `d2` weighs influence against likeness; the others look at likeness alone, of image and text embeddings side by side.
    Harmful pairs are never chosen. The embeddings of all kept pairs are in memory, 16 D bytes each or so.
    Writes coreset/<method>-<size>/coreset.parquet (rank, uid, score), the most wanted first: a smaller one is a prefix.
    Raises InputError for a size that the kept pairs cannot fill.
    """
    if not 0 < size < math.inf or (size > 1 and size != round(size)):
        raise InputError(
            f"size is {size:g}: give a share of the pool, above 0 and at most 1, or a number of pairs"
        )
    table = run.curated()
    rows = np.flatnonzero(table["kept"].to_numpy())
    count = round(size * len(table)) if size <= 1 else round(size)
    if not 1 <= count <= len(rows):
        raise InputError(
            f"size is {size:g}: that is {count} pairs, and the run kept {len(rows)} of {len(table)}; ask for 1 to {len(rows)}"
        )
    X = concatenation(*run.pool.inputs(rows))  # the table has the pool's order
    score = table["score"].to_numpy().astype(np.float64)[rows]
    if method == "d2":
        # pooled influence is a mean over like pairs already
        chosen = d2(X, score - np.nanmin(score), count, forward=None)
    else:
        chosen = {"k_center": k_center, "herding": herding, "diversity": diversity}[method](X, count)
    uids = table["uid"].take(rows[chosen])
    ranking = pa.table({"rank": np.arange(1, count + 1), "uid": uids, "score": score[chosen]})
    path = _written(ranking, run.at("coreset") / f"{method}-{size:g}" / "coreset.parquet")
    return Choice(path=path, chosen=count, of=len(table))


def _written(table: Any, path: Path) -> Path:
    with atomic_path(path) as aside:
        pq.write_table(table, aside)
    return path
