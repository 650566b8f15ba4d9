"""Strata of all pairs, and the samples of them that are scored."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from influencespace.core.quality import agreement, caption_axis, quality_axis
from influencespace.core.strata import quantile_of, stratified_sample
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import read_columns, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.run import Run

STRATA = (
    *("quality", "cluster", "quantile", "in_sample", "out_of_fold", "pretrained"),
    *("caption_images", "caption_agreement", "sharpness", "group"),
)
"""Columns of strata.parquet: quality is the mean of in_sample and out_of_fold, a pair's negCLIPLoss by the proxy that was
trained on it and by the one that was not; pretrained is the given encoder's CLIP score."""


@dataclass(frozen=True, kw_only=True)
class DrawSamples:
    """Task: write the strata of all pairs and the rows of each sample; how many there are."""

    run: Run
    folder: Path

    def __call__(self) -> dict[str, int]:
        pool, config = self.run.pool, self.run.config.influence
        quality = read_columns(self.run.at("proxies") / "quality.parquet", "neg_clip_in", "neg_clip_out")
        axis = quality_axis(quality["neg_clip_in"], quality["neg_clip_out"])
        cluster = read_columns(self.run.at("cluster") / "clusters.parquet", "cluster")["cluster"]
        quantiles = config.quantiles_of(len(axis))
        quantile = quantile_of(axis, quantiles)
        first = min(config.initial_samples, config.max_samples)
        samples = {
            "sample": stratified_sample(cluster * quantiles + quantile, first),
            "target_sample": stratified_sample(quantile, config.target_samples),
            # the canonical order is random, so its beginning is a random sample
            "control_sample": np.arange(min(config.control_samples, len(axis))),
        }
        permuted = pool.captions_of_others(samples["control_sample"], seed=self.run.seed)
        for name, rows in (*samples.items(), ("permuted_captions", permuted)):
            with atomic_path(self.folder / f"{name}.npy") as aside, aside.open("wb") as file:
                np.save(file, rows)
        values = (
            *(axis, cluster, quantile, quality["neg_clip_in"], quality["neg_clip_out"], pool.clip_score),
            caption_axis(pool.image, pool.text),
            caption_agreement(pool),
            *(pool.sharpness, pool.group),
        )
        write_columns(self.folder / "strata.parquet", dict(zip(STRATA, values, strict=True)))
        return {name: len(rows) for name, rows in samples.items()} | {
            "pairs": len(axis),
            "quantiles": quantiles,
        }


def caption_agreement(pool: PairSet, size: int = 16_384) -> NDArray[np.float64]:
    """Agreement of every pair's caption with the other captions of its image (n,), some images in memory at a time.

    A pair that the pool holds twice counts once.
    """
    pairs, first, place = np.unique(
        np.stack([pool.image, pool.text]), axis=1, return_index=True, return_inverse=True
    )
    result = np.empty(pairs.shape[1])
    start = 0
    while start < len(result):
        # as many whole images as fit, one at least
        last = pairs[0, min(start + size, len(result)) - 1]
        stop = int(np.searchsorted(pairs[0], last, side="right"))
        result[start:stop] = agreement(pool.inputs(first[start:stop])[1].numpy(), pairs[0, start:stop])
        start = stop
    return result[place.reshape(-1)]
