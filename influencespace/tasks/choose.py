"""Other choices from a finished run's scores: a cleaned pool of a given size, and a coreset that spreads over the pool."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from influencespace.core.coreset import d2, diversity, herding, k_center
from influencespace.core.select import KEPT
from influencespace.data.artifacts import atomic_path
from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.models.fusion import FusionConfig, fuse
from influencespace.report.table import read_summary
from influencespace.stages.finish import stage_of
from influencespace.stages.ingest.split import pair_sets

FloatArray = NDArray[np.float64]
Method = Literal["d2", "k_center", "herding", "diversity"]
LOWEST = "lowest score"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and where it is written."""

    path: Path
    chosen: int
    of: int


def clean(run: Path, fraction: float | None) -> Choice:
    """Remove the share of pairs that score lowest; None removes those that the run itself did not keep.

    Writes clean/<fraction>/cleaned.parquet with the columns of curated.parquet; all that is kept has weight 1. Raises InputError
    for a fraction that is not within [0, 1) and for a run that is not finished.
    """
    if fraction is not None and not 0 <= fraction < 1:
        raise InputError(f"fraction is {fraction}: give the share of pairs to remove, 0 to below 1, or auto")
    table = _curated(run)
    reason = table["reason"].to_pylist()
    if fraction is None:
        kept = table["kept"].to_numpy()
    else:
        score = table["score"].to_numpy().astype(np.float64)
        kept = np.ones(len(score), bool)
        # nan, which nothing could judge, sorts last: it is kept longest
        kept[np.argsort(score, kind="stable")[: round(fraction * len(score))]] = False
        reason = np.where(kept, KEPT, LOWEST).tolist()
    for name, values in (("kept", kept), ("weight", kept.astype(np.float64)), ("reason", reason)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    name = "auto" if fraction is None else f"{fraction:g}"
    return _written(table, run, Path("clean") / name / "cleaned.parquet", int(kept.sum()))


def coreset(run: Path, size: float, method: Method = "d2") -> Choice:
    """Choose pairs that stand for all kept ones: `size` is a share of the pool (at most 1) or a number of pairs.

    `d2` weighs influence against likeness; the others look at likeness alone, of image and text embeddings side by side.
    Harmful pairs are never chosen.
    Writes coreset/<method>-<size>/coreset.parquet (rank, uid, score), the most wanted first: a smaller one is a prefix.
    Raises InputError for a size that the kept pairs cannot fill.
    """
    if not 0 < size < math.inf or (size > 1 and size != round(size)):
        raise InputError(
            f"size is {size:g}: give a share of the pool, above 0 and at most 1, or a number of pairs"
        )
    table = _curated(run)
    rows = np.flatnonzero(table["kept"].to_numpy())
    count = round(size * len(table)) if size <= 1 else round(size)
    if not 1 <= count <= len(rows):
        raise InputError(
            f"size is {size:g}: that is {count} pairs, and the run kept {len(rows)} of {len(table)}; ask for 1 to {len(rows)}"
        )
    pool = pair_sets(run / "split", stage_of(run, "split"))["pool"]
    X = fuse(*pool.inputs(_rows_of(pool, table, rows)), FusionConfig(), query=None)
    score = table["score"].to_numpy().astype(np.float64)[rows]
    if method == "d2":
        # pooled influence is a mean over like pairs already
        chosen = d2(X, score - np.nanmin(score), count, forward=None)
    else:
        chosen = {"k_center": k_center, "herding": herding, "diversity": diversity}[method](X, count)
    uids = table["uid"].take(rows[chosen])
    found = pa.table({"rank": np.arange(1, count + 1), "uid": uids, "score": score[chosen]})
    return _written(
        found, run, Path("coreset") / f"{method}-{size:g}" / "coreset.parquet", count, of=len(table)
    )


def _curated(run: Path) -> pa.Table:
    read_summary(run)  # without one the stages may be of two configs
    return pq.read_table(run / "curated.parquet")


def _rows_of(pool: PairSet, table: pa.Table, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the pool that the rows of curated.parquet are."""
    place = {uid: row for row, uid in enumerate(pool.column("uid"))}
    return np.array([place[uid] for uid in table["uid"].take(rows).to_pylist()])


def _written(table: Any, run: Path, name: Path, chosen: int, of: int | None = None) -> Choice:
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as aside:
        pq.write_table(table, aside)
    return Choice(path=path, chosen=chosen, of=len(table) if of is None else of)
