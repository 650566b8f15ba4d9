"""The proxies stage: one proxy on all pairs, one for each fold by image, and every pair's quality by both."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import blocks_of
from influencespace.core.hashing import fold_of
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.placement import Resources
from influencespace.estimators.filters import clip_score, neg_clip_loss
from influencespace.models.heads import Heads
from influencespace.models.training import HeadsConfig
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.proxy import ALL, Proxy, ProxyConfig, proxy_name
from influencespace.stages.proxies.target import TargetHalves, choosing_loss
from influencespace.stages.proxies.train_many import (
    OutsideFold,
    Training,
    Uniform,
    Weights,
    fold_of_rows,
    train_many,
)

QUALITY = ("clip_in", "clip_out", "neg_clip_in", "neg_clip_out")
"""Columns of quality.parquet: CLIP score and negCLIPLoss by the proxy of all pairs, and by the one that left the pair out."""


@dataclass(frozen=True, kw_only=True)
class CountImages:
    """Task: how many images the proxy without the largest fold is trained on, counted from the first rows up to `enough`."""

    pool: PairSet
    folds: int
    seed: int
    enough: int

    def __call__(self) -> int:
        seen = np.empty(0, np.int64)
        images = 0
        for start, stop in blocks_of(len(self.pool)):
            seen = np.union1d(seen, self.pool.read(slice(start, stop), "image")["image"])
            sizes = np.bincount(fold_of(seen, self.folds, self.seed), minlength=self.folds)
            images = len(seen) - int(sizes.max())
            if images >= self.enough:
                break
        return images


def seen_by(fold: int | None, pool: PairSet, config: ProxyConfig, seed: int) -> Weights:
    """Weights that a proxy is trained by: all pairs alike, or those outside of its fold."""
    if fold is None:
        return Uniform()
    return OutsideFold(pool=pool, fold=fold, count=config.folds, seed=seed)


@dataclass(frozen=True)
class ChoosingLoss:
    """Measure: loss on the choosing half of the target."""

    halves: TargetHalves
    config: HeadsConfig

    def __call__(self, heads: Heads) -> dict[str, Any]:
        return {"target_loss": choosing_loss(heads, self.halves, self.config)}


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality columns of a bucket of pairs."""

    pool: PairSet
    config: ProxyConfig
    folder: Path
    seed: int

    def __call__(self, start: int, stop: int) -> Columns:
        rows = np.arange(start, stop)
        fold = fold_of_rows(self.pool, slice(start, stop), self.config.folds, self.seed)
        columns: Columns = {name: np.empty(len(rows)) for name in QUALITY}
        columns["clip_in"], columns["neg_clip_in"] = self._scores(rows, None)
        for k in np.unique(fold):
            out = fold == k
            columns["clip_out"][out], columns["neg_clip_out"][out] = self._scores(rows[out], int(k))
        return columns

    def _scores(self, rows: IntArray, fold: int | None) -> tuple[FloatArray, FloatArray]:
        proxy = Proxy(self.folder, proxy_name(fold))
        bank = [(*proxy.embed(batch.inputs), batch.image) for batch in proxy.reference_bank(self.pool)]
        u, t = proxy.embed(self.pool.inputs(rows))
        scale = 1 / self.config.train.temperature
        return clip_score(u, t), neg_clip_loss(u, t, self.pool.image[rows], bank, scale)


class Proxies(Stage):
    """Trains the proxies; writes one file each, and quality.parquet."""

    name = "proxies"
    version = 2

    def settings(self, config: Any) -> tuple[ProxyConfig, int]:
        return config.proxy, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        config, seed = self.settings(run.config)
        pairs, size = len(run.pool), config.train.batch_size - 1
        enough = size * config.negative_batches
        images = workers.once(CountImages(pool=run.pool, folds=config.folds, seed=seed, enough=enough))
        bank = size, config.bank_batches(images), seed + 1
        measure = ChoosingLoss(TargetHalves(run.target, seed), config.train)

        def training(fold: int | None, steps: int, name: str) -> Training:
            return Training(
                name=name,
                weights=seen_by(fold, run.pool, config, seed),
                seed=seed + 1 + (fold or 0),
                steps=steps,
                bank=bank,
                measure=measure,
            )

        first = self._first(run, workers, config.first_steps(pairs), training)
        others = [training(k, first["steps"], proxy_name(k)) for k in range(config.folds)]
        records = [first, *train_many(run.pool, config.train, others, workers, label="by fold")]
        quality = Quality(pool=run.pool, config=config, folder=workers.folder, seed=seed)
        workers.table("quality", quality, pairs, config.bucket_size, label="quality")
        details = {"steps": first["steps"], "proxies": records}
        return Details(rows_in=pairs, rows_out=pairs, details=details)

    def _first(self, run: Run, workers: Workers, steps: int, training: Any) -> dict[str, Any]:
        """Train the proxy of all pairs for as many steps as pay, on all the cores of a machine; its record."""
        config = run.config.proxy
        whole = Resources(cpus=workers.engine.cores_per_task)

        def trained(steps: int) -> dict[str, Any]:
            one = training(None, steps, f".{ALL}-{steps}")
            return train_many(
                run.pool, config.train, [one], workers, label=f"{steps} steps", resources=whole
            )[0]

        best = trained(steps)
        losses = {steps: best["target_loss"]}
        for _ in range(config.max_doublings if config.choose_steps else 0):
            longer = trained(2 * best["steps"])
            losses[longer["steps"]] = longer["target_loss"]
            if longer["target_loss"] > best["target_loss"] * (1 - config.min_gain):
                break
            best = longer
        # a copy: a run that is killed later finds again what was trained, and files with a dot are no part of the artifact
        with atomic_path(Proxy(workers.folder, ALL).path) as aside:
            shutil.copyfile(Proxy(workers.folder, best["name"]).path, aside)
        by_steps = {str(steps): loss for steps, loss in losses.items()}
        return best | {"name": ALL, "target_loss_by_steps": by_steps}
