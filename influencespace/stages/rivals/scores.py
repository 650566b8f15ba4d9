"""Scores of each pair by itself that rivals rank pairs by, over the given embeddings: scores.parquet."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import disjoint_batches
from influencespace.data.buckets import Columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.filters import clip_score, neg_clip_loss
from influencespace.estimators.norm_sim import largest_cosine, mean_squared_cosine
from influencespace.models.encoders import logit_scale
from influencespace.run import Run, Workers
from influencespace.stages.proxies.proxies import ChoosingLoss
from influencespace.stages.proxies.proxy import Proxy
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.proxies.train_many import Given, Training, Uniform, WeightedPool, train_many

SCALE = 100.0
"""Of an encoder that is not at hand: CLIP's own limit, which its trained models are at."""
BATCHES, BATCH = 5, 512
"""Negative batches of negCLIPLoss, and pairs of each (Wang et al. 2024 take five or more)."""
TARGETS = 1024  # of the target's images that a pair is compared with at once
SHORTER = (1.0, 0.5, 0.25, 0.125)
"""Parts of `proxy.train.steps` that heads are tuned for on the target, of which the best is taken: it is small."""


@dataclass(frozen=True, kw_only=True)
class GivenScale:
    """Task: the factor on the cosines of the run's encoder."""

    encoder: str
    trust_remote_code: bool

    def __call__(self) -> float:
        return logit_scale(self.encoder, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class DrawBank:
    """Task: the rows of the negative batches, drawn alike from all pairs."""

    pool: PairSet
    seed: int

    def __call__(self) -> tuple[IntArray, ...]:
        pairs = WeightedPool(self.pool, Uniform())
        return tuple(disjoint_batches(pairs, BATCH, BATCHES, self.seed))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Columns: the scores `names` of a range of pairs, the higher the better; computed where it is used."""

    names: tuple[str, ...]
    pool: PairSet
    target: PairSet
    halves: TargetHalves
    bank: tuple[IntArray, ...]
    scale: float
    tuned: Proxy | None
    """Heads that were tuned on the target."""
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> Columns:
        rows = slice(start, stop)
        u, t = self.pool.inputs(rows, self.device)
        image = self.pool.read(rows, "image")["image"]
        score: dict[str, Callable[[], FloatArray]] = {
            "neg_clip_loss": lambda: neg_clip_loss(u, t, image, self._bank, self.scale),
            "norm_sim": lambda: _numbers(largest_cosine(u, self._images, TARGETS)),
            "norm_sim_2": lambda: _numbers(mean_squared_cosine(u, self._images)),
            "dfn": lambda: self._dfn(u, t),
        }
        return {name: score[name]() for name in self.names}

    @cached_property
    def _bank(self) -> list[tuple[Tensor, Tensor, IntArray]]:
        images = [self.pool.read(rows, "image")["image"] for rows in self.bank]
        return [(*self.pool.inputs(rows, self.device), image) for rows, image in zip(self.bank, images)]

    @cached_property
    def _images(self) -> Tensor:
        """Of the target's half that gives gradients: the other one makes choices."""
        return self.target.inputs(self.halves.gradient, self.device)[0]

    def _dfn(self, u: Tensor, t: Tensor) -> FloatArray:
        assert self.tuned is not None
        return clip_score(*self.tuned.heads.to(self.device)(u, t))


def _numbers(values: Tensor) -> FloatArray:
    numbers: FloatArray = values.double().cpu().numpy()
    return numbers


def tuned_on_target(run: Run, workers: Workers) -> Proxy:
    """Heads tuned on one half of the target, for as many steps as the other half likes best, as the data filtering networks of
    Fang et al. 2023 are tuned on good pairs."""
    halves, config = TargetHalves(run.target, run.seed), run.config.proxy.train
    weights = np.zeros(len(run.target))
    weights[halves.gradient] = 1
    steps = dict.fromkeys(max(1, round(part * config.steps)) for part in SHORTER)
    trainings = [
        Training(
            name=f".tuned-{count}",
            weights=Given(weights),
            seed=run.seed,
            steps=count,
            measure=ChoosingLoss(halves, config),
        )
        for count in steps
    ]
    records = train_many(run.target, config, trainings, workers, label="heads on the target")
    best = min(records, key=lambda record: np.nan_to_num(record["target_loss"], nan=np.inf))
    return Proxy(workers.folder, best["name"])


def write_scores(run: Run, names: tuple[str, ...], workers: Workers, **needs: Any) -> dict[str, Any]:
    """Write scores.parquet; the encoder's scale, for the manifest."""
    pool, embed = run.everything, run.config.embed
    scale = SCALE
    if "neg_clip_loss" in names and embed.encoder:
        scale = workers.once(GivenScale(encoder=embed.encoder, trust_remote_code=embed.trust_remote_code))
    scores = Scores(
        names=names,
        pool=pool,
        target=run.target,
        halves=TargetHalves(run.target, run.seed),
        bank=workers.once(DrawBank(pool=pool, seed=run.seed)) if "neg_clip_loss" in names else (),
        scale=scale,
        tuned=tuned_on_target(run, workers) if "dfn" in names else None,
        device=workers.device,
    )
    workers.table("scores", scores, len(pool), run.config.proxy.bucket_size, label="scores", **needs)
    return {"logit_scale": scale}
