"""The proxies stage: one proxy on all pairs, one for each fold by image, and every pair's quality by both."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import folds_by_image
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
from influencespace.stages.proxies.train_many import Training, train_many

QUALITY = ("clip_in", "clip_out", "neg_clip_in", "neg_clip_out")
"""Columns of quality.parquet: CLIP score and negCLIPLoss by the proxy of all pairs, and by the one that left the pair out."""
FOLDS = "folds.npy"


@dataclass(frozen=True, kw_only=True)
class DrawFolds:
    """Task: write the fold of every pair, by image, once for all that ask; the pairs and images of the pool."""

    pool: PairSet
    count: int
    seed: int
    folder: Path

    def __call__(self) -> tuple[int, int]:
        fold = folds_by_image(self.pool.image, self.count, self.seed)
        with atomic_path(self.folder / FOLDS) as aside, aside.open("wb") as file:
            np.save(file, fold)
        return len(fold), len(np.unique(self.pool.image))


def folds_of(proxies: Path, rows: IntArray | slice) -> IntArray:
    """Fold of some pairs of the pool (m,)."""
    return np.asarray(np.load(proxies / FOLDS, mmap_mode="r")[rows])


@dataclass(frozen=True)
class OutsideFold:
    """Weights of a pool's pairs: 1, but 0 in one fold."""

    folder: Path
    fold: int | None

    def __call__(self) -> FloatArray:
        fold = folds_of(self.folder, slice(None))
        return np.ones(len(fold)) if self.fold is None else (fold != self.fold).astype(np.float64)


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

    def __call__(self, start: int, stop: int) -> Columns:
        rows = np.arange(start, stop)
        fold = folds_of(self.folder, rows)
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
    """Trains the proxies; writes one file each, folds.npy and quality.parquet."""

    name = "proxies"

    def settings(self, config: Any) -> tuple[ProxyConfig, int]:
        return config.proxy, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        config, seed = self.settings(run.config)
        folds = DrawFolds(pool=run.pool, count=config.folds, seed=seed, folder=workers.folder)
        pairs, images = workers.once(folds)
        bank = config.train.batch_size - 1, config.bank_batches(images), seed + 1
        measure = ChoosingLoss(TargetHalves(run.target, seed), config.train)

        def training(fold: int | None, steps: int, name: str) -> Training:
            return Training(
                name=name,
                weights=OutsideFold(workers.folder, fold),
                seed=seed + 1 + (fold or 0),
                steps=steps,
                bank=bank,
                measure=measure,
            )

        first = self._first(run, workers, config.first_steps(pairs), training)
        others = [training(k, first["steps"], proxy_name(k)) for k in range(config.folds)]
        records = [first, *train_many(run.pool, config.train, others, workers, label="by fold")]
        quality = Quality(pool=run.pool, config=config, folder=workers.folder)
        workers.table("quality", quality, pairs, config.bucket_size, label="quality")
        details = {"steps": first["steps"], "images": images, "proxies": records}
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
