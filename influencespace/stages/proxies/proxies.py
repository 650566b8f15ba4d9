"""The proxies stage: one proxy on all pairs, one for each fold by image, and every pair's quality by both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import blocks_of
from influencespace.core.hashing import fold_of
from influencespace.data.artifacts import copy_file
from influencespace.data.buckets import Columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.filters import clip_score, neg_clip_loss
from influencespace.models.heads import Heads
from influencespace.models.space import Inputs
from influencespace.models.training import HeadsConfig
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.proxy import ALL, Proxy, ProxyConfig, proxy_name
from influencespace.stages.proxies.target import TargetHalves, choosing_loss
from influencespace.stages.proxies.train_many import (
    OutsideFold,
    Training,
    Uniform,
    Weights,
    train_many,
    training_memory,
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
    return OutsideFold(pool=pool, fold=fold, count=config.fold_count(len(pool)), seed=seed)


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
    device: str = "cpu"

    def __call__(self, start: int, stop: int) -> Columns:
        span = slice(start, stop)
        image, inputs = self.pool.read(span, "image")["image"], self.pool.inputs(span, self.device)
        fold = fold_of(image, self.config.fold_count(len(self.pool)), self.seed)
        columns: Columns = {name: np.empty(stop - start) for name in QUALITY}
        columns["clip_in"], columns["neg_clip_in"] = self._scores(None, inputs, image)
        for k in np.unique(fold):
            out = np.flatnonzero(fold == k)
            images, texts = (one[torch.from_numpy(out).to(self.device)] for one in inputs)
            scores = self._scores(int(k), (images, texts), image[out])
            columns["clip_out"][out], columns["neg_clip_out"][out] = scores
        return columns

    @torch.no_grad()
    def _scores(self, fold: int | None, inputs: Inputs, image: IntArray) -> tuple[FloatArray, FloatArray]:
        proxy = Proxy(self.folder, proxy_name(fold))
        heads = proxy.heads.to(self.device)
        bank = []
        for batch in proxy.reference_bank(self.pool):
            images, texts = (one.to(self.device) for one in batch.inputs)
            bank.append((*heads(images, texts), batch.image))
        u, t = heads(*inputs)
        return clip_score(u, t), neg_clip_loss(u, t, image, bank, 1 / self.config.train.temperature)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the proxies of a pool are trained, but for their steps."""

    pool: PairSet
    target: PairSet
    config: ProxyConfig
    seed: int
    bank_batches: int

    def training(self, fold: int | None, steps: int, name: str = "") -> Training:
        """Of the proxy of all pairs, or of the one without a fold."""
        return Training(
            name=name or proxy_name(fold),
            weights=seen_by(fold, self.pool, self.config, self.seed),
            seed=self.seed + 1 + (fold or 0),
            steps=steps,
            bank=(self.config.train.batch_size - 1, self.bank_batches, self.seed + 1),
            measure=ChoosingLoss(TargetHalves(self.target, self.seed), self.config.train),
        )

    def train(self, trainings: Sequence[Training], workers: Workers, **more: Any) -> list[dict[str, Any]]:
        return train_many(self.pool, self.config.train, trainings, workers, **more)


class Proxies(Stage):
    """Trains the proxies; writes one file each, and quality.parquet."""

    name = "proxies"
    version = 3

    def settings(self, config: Any) -> tuple[ProxyConfig, int]:
        return config.proxy, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        config, seed = self.settings(run.config)
        pairs = len(run.pool)
        folds, steps = config.fold_count(pairs), config.first_steps(pairs)
        enough = (config.train.batch_size - 1) * config.negative_batches
        images = workers.once(CountImages(pool=run.pool, folds=folds, seed=seed, enough=enough))
        recipe = Recipe(
            pool=run.pool,
            target=run.target,
            config=config,
            seed=seed,
            bank_batches=config.bank_batches(images),
        )
        first: list[int | None] = [None]
        records = []
        if config.max_steps(pairs) >= 2 * steps:
            records, first = [self._longest_that_pays(recipe, workers)], []
            steps = records[0]["steps"]
        trainings = [recipe.training(k, steps) for k in (*first, *range(folds))]
        records += recipe.train(trainings, workers)
        quality = Quality(
            pool=run.pool, config=config, folder=workers.folder, seed=seed, device=workers.device
        )
        needs = workers.heavy(memory=training_memory(run.pool))
        workers.table("quality", quality, pairs, config.bucket_size, label="quality", resources=needs)
        passes = config.passes(steps, pairs)
        details = {"steps": steps, "folds": folds, "passes": passes, "warnings": unseen(passes)}
        return Details(rows_in=pairs, rows_out=pairs, details=details | {"proxies": records})

    def _longest_that_pays(self, recipe: Recipe, workers: Workers) -> dict[str, Any]:
        """Train the proxy of all pairs for as many steps as pay, on all the cores of a machine; its record."""
        config, pairs = recipe.config, len(recipe.pool)
        cpus = workers.engine.cores_per_task if workers.device == "cpu" else 1

        def trained(steps: int) -> dict[str, Any]:
            one = recipe.training(None, steps, f".{ALL}-{steps}")
            return recipe.train([one], workers, label=f"{steps} steps", cpus=cpus)[0]

        best = trained(config.first_steps(pairs))
        losses = {best["steps"]: best["target_loss"]}
        while 2 * best["steps"] <= config.max_steps(pairs):
            longer = trained(2 * best["steps"])
            losses[longer["steps"]] = longer["target_loss"]
            if longer["target_loss"] > best["target_loss"] * (1 - config.min_gain):
                break
            best = longer
        # a copy: a run that is killed later finds again what was trained, and files with a dot are no part of the artifact
        copy_file(Proxy(workers.folder, best["name"]).path, Proxy(workers.folder, ALL).path)
        by_steps = {str(steps): loss for steps, loss in losses.items()}
        return best | {"name": ALL, "target_loss_by_steps": by_steps}


def unseen(passes: float) -> list[str]:
    """What it means where proxies were trained for less than a pass over the pool."""
    if passes >= 1:
        return []
    seen = f"{100 * passes:.2g} %"
    return [
        f"the proxies saw {seen} of the pool (proxy.epochs): for others influence in sample is that of pairs left out, so that "
        "harm by what a proxy would learn by heart is underestimated; set proxy.epochs to 1 or more"
    ]
