"""Means of the strata, as the charts and the page show them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

MAX_CLUSTERS = 40  # rows of the map; nobody can tell more clusters apart


def records(rows: pd.DataFrame) -> Iterator[Any]:
    """The rows, with an attribute for each column."""
    yield from rows.itertuples()


def influence_by_quantile(strata: pd.DataFrame) -> pd.DataFrame:
    """Means over the clusters of each quality quantile, weighted by pairs, as rows in order of `quantile`.

    Columns: quantile, pairs, scored, quality, influence, influence_se (strata taken as independent), kept (fraction of
    the pairs). Strata in which nothing was scored count for `pairs`, `quality` and `kept` alone; means of nothing are nan.
    """
    pairs, known = strata["pairs"], strata["pairs"].where(np.isfinite(strata["influence"]), 0)
    weighted = strata[["quantile", "pairs", "scored"]].assign(
        known=known,
        quality=pairs * strata["quality"],
        influence=known * strata["influence"],
        influence_se=(known * strata["influence_se"]) ** 2,
        kept=pairs * strata["kept"],
    )
    sums = weighted.groupby("quantile", as_index=False).sum()
    sums["influence_se"] **= 0.5
    for total, means in {"pairs": ["quality", "kept"], "known": ["influence", "influence_se"]}.items():
        sums[means] = sums[means].div(sums[total], axis=0)
    return sums


def map_clusters(strata: pd.DataFrame) -> list[int]:
    """The MAX_CLUSTERS largest clusters, those of lowest mean pooled influence first."""
    known = strata["pairs"].where(np.isfinite(strata["pooled"]), 0)
    sums = pd.DataFrame({"cluster": strata["cluster"], "known": known, "total": known * strata["pooled"]})
    sums = sums.assign(pairs=strata["pairs"]).groupby("cluster", as_index=False).sum()
    sums = sums.sort_values(["pairs", "cluster"], ascending=[False, True])[:MAX_CLUSTERS]
    order = sums.assign(mean=sums["total"] / sums["known"].clip(lower=1)).sort_values(["mean", "cluster"])
    return [int(cluster) for cluster in order["cluster"]]
