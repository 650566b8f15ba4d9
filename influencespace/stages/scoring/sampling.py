"""Strata of all pairs, range by range, and the samples of them that are scored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influencespace.core.arrays import IntArray
from influencespace.core.quality import Quantiles, Scores
from influencespace.core.strata import first_of_each
from influencespace.data.artifacts import atomic_path, write_json
from influencespace.data.buckets import Columns, buckets_of, read_rows
from influencespace.run import Run
from influencespace.stages.passes import RANGE

STRATA = (
    *("quality", "cluster", "quantile", "in_sample", "out_of_fold", "pretrained"),
    *("caption_images", "caption_agreement", "sharpness", "group"),
)
"""Columns of strata.parquet: quality is the mean of in_sample and out_of_fold, a pair's negCLIPLoss by the proxy that was
trained on it and by the one that was not; pretrained is the given encoder's CLIP score."""
FACTS = "strata.json"
"""How many pairs, quantiles and clusters there are."""


@dataclass(frozen=True)
class ReadScores:
    """Scores of a range of the pool, from the proxies' quality.parquet."""

    path: Path

    def __call__(self, start: int, stop: int) -> Scores:
        columns = read_rows(self.path, slice(start, stop), "neg_clip_in", "neg_clip_out")
        return Scores(np.arange(start, stop), columns["neg_clip_in"], columns["neg_clip_out"])


def scores_of(run: Run) -> ReadScores:
    """Of the run's pool."""
    return ReadScores(run.at("proxies") / "quality.parquet")


def save_rows(path: Path, rows: NDArray[Any]) -> None:
    """Write an array, atomically."""
    with atomic_path(path) as aside, aside.open("wb") as file:
        np.save(file, rows)


@dataclass(frozen=True, kw_only=True)
class DrawSamples:
    """Task: write the rows of each sample; how many there are.

    Of each quantile the first pairs of the canonical order, which is random: ranges are read until every quantile has enough.
    """

    run: Run
    folder: Path
    quantiles: Quantiles
    pairs: int

    def __call__(self) -> dict[str, int]:
        config, count = self.run.config.influence, len(self.quantiles.cuts) + 1
        each = max(-(-config.max_samples // count), config.target_samples)
        rows, quantile = self._first(each, count)
        samples = {
            "sample": rows[first_of_each(quantile, -(-config.max_samples // count))],
            "target_sample": rows[first_of_each(quantile, config.target_samples)],
            "control_sample": np.arange(min(config.control_samples, self.pairs)),
        }
        permuted = self.run.pool.captions_of_others(samples["control_sample"], seed=self.run.seed)
        for name, chosen in (*samples.items(), ("permuted_captions", permuted)):
            save_rows(self.folder / f"{name}.npy", chosen)
        facts = {"pairs": self.pairs, "quantiles": count, "clusters": self._clusters()}
        write_json(self.folder / FACTS, facts)
        return {name: len(rows) for name, rows in samples.items()} | facts

    def _first(self, each: int, count: int) -> tuple[IntArray, IntArray]:
        """The first rows of each quantile and their quantiles."""
        read, rows = scores_of(self.run), np.empty(0, np.int64)
        quantile = rows
        for start, stop in buckets_of(self.pairs, RANGE):
            _, more = self.quantiles(read(start, stop))
            rows = np.concatenate([rows, np.arange(start, stop)])
            quantile = np.concatenate([quantile, more])
            chosen = first_of_each(quantile, each)
            rows, quantile = rows[chosen], quantile[chosen]
            if np.bincount(quantile, minlength=count).min() >= each:
                break
        return rows, quantile

    def _clusters(self) -> int:
        return int(self.run.manifest("cluster").details["k"])


@dataclass(frozen=True, kw_only=True)
class StrataOfRange:
    """Columns of strata.parquet."""

    run: Run
    quantiles: Quantiles

    def __call__(self, start: int, stop: int) -> Columns:
        rows, scores = slice(start, stop), scores_of(self.run)(start, stop)
        quality, quantile = self.quantiles(scores)
        cluster = read_rows(self.run.at("cluster") / "clusters.parquet", rows, "cluster")["cluster"]
        captions = read_rows(self.run.at("redundancy") / "captions.parquet", rows)
        pairs = self.run.pool.read(rows, "clip_score", "sharpness", "group")
        values = (
            *(quality, cluster, quantile, scores.in_sample, scores.out_of_fold),
            pairs["clip_score"].astype(np.float64),
            *(captions["caption_images"], captions["caption_agreement"]),
            *(pairs["sharpness"].astype(np.float64), pairs["group"]),
        )
        return dict(zip(STRATA, values, strict=True))
