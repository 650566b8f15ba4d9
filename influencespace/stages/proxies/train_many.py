"""Training proxies: one way for all that are trained, as many at once as the machines hold."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import BLOCK, disjoint_batches, stream_batches
from influencespace.core.hashing import fold_of
from influencespace.data.buckets import buckets_of, read_rows
from influencespace.data.joined import TrainingPairs
from influencespace.data.pair_set import PairSet
from influencespace.engine.placement import LIBRARY_BYTES
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.training import Alone, Exchange, HeadsConfig, Trained, train_heads
from influencespace.run import Workers
from influencespace.stages.proxies.proxy import Proxy

Measure = Callable[[Heads], dict[str, Any]]


class Weights(Protocol):
    """Weights of a pool's pairs: how often each is met in an epoch."""

    def read(self, start: int, stop: int) -> FloatArray:
        """Of the rows [start, stop) (m,)."""


@dataclass(frozen=True)
class Uniform:
    """All pairs alike."""

    def read(self, start: int, stop: int) -> FloatArray:
        return np.ones(stop - start)


@dataclass(frozen=True)
class Given:
    """Weights that are at hand (n,), of a small pool."""

    values: FloatArray

    def read(self, start: int, stop: int) -> FloatArray:
        return self.values[start:stop]


@dataclass(frozen=True)
class Column:
    """Weights in a column of a Parquet file."""

    path: Path
    name: str

    def read(self, start: int, stop: int) -> FloatArray:
        return read_rows(self.path, slice(start, stop), self.name)[self.name].astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class OutsideFold:
    """1, but 0 for pairs of one fold of the images."""

    pool: PairSet
    fold: int
    count: int
    seed: int

    def read(self, start: int, stop: int) -> FloatArray:
        fold = fold_of_rows(self.pool, slice(start, stop), self.count, self.seed)
        return (fold != self.fold).astype(np.float64)


def fold_of_rows(pool: PairSet, rows: IntArray | slice, count: int, seed: int) -> IntArray:
    """Fold 0 .. count-1 of some pairs of the pool (m,), by their images."""
    return fold_of(pool.read(rows, "image")["image"], count, seed)


def total_weight(weights: Weights, rows: int) -> float:
    """Sum of the weights of so many rows."""
    return sum(float(weights.read(start, stop).sum()) for start, stop in buckets_of(rows, BLOCK))


@dataclass(frozen=True)
class WeightedPool:
    """A pool with weights, as batches are drawn from it (`core.batches.Pairs`)."""

    pool: TrainingPairs
    weights: Weights

    def __len__(self) -> int:
        return len(self.pool)

    def read(self, start: int, stop: int) -> tuple[FloatArray, IntArray]:
        return self.weights.read(start, stop), self.pool.read(slice(start, stop), "image")["image"]


class BlockInputs:
    """Embeddings of batches of a pool: what lies in one block is read at once, in order, and cut from memory."""

    def __init__(self, pool: TrainingPairs, device: str = "cpu", block: int = BLOCK) -> None:
        self._pool, self._device, self._block = pool, device, block
        self._held: tuple[int, tuple[Tensor, Tensor]] | None = None

    def __call__(self, rows: IntArray) -> tuple[Tensor, Tensor]:
        """Of images and captions of some rows: two (m, D)."""
        blocks, counts = np.unique(rows // self._block, return_counts=True)
        places, parts = [], []
        for i in np.argsort(
            counts
        ):  # the one that is most of the batch takes the place of the one held, at last
            place = np.flatnonzero(rows // self._block == blocks[i])
            places.append(place)
            parts.append(self._of_block(int(blocks[i]), rows[place], 2 * len(place) > len(rows)))
        if len(parts) == 1:
            return parts[0]
        order = torch.from_numpy(np.argsort(np.concatenate(places))).to(self._device)
        images, texts = (torch.cat(one)[order] for one in zip(*parts, strict=True))
        return images, texts

    def _of_block(self, block: int, rows: IntArray, hold: bool) -> tuple[Tensor, Tensor]:
        start = block * self._block
        if hold and (self._held is None or self._held[0] != block):
            self._held = None  # before the next one is read: no two at once
            span = slice(start, min(start + self._block, len(self._pool)))
            self._held = block, self._pool.inputs(span, self._device)
        if self._held is None or self._held[0] != block:
            return self._pool.inputs(rows, self._device)
        place = torch.from_numpy(rows - start).to(self._device)
        images, texts = (one[place] for one in self._held[1])
        return images, texts


@dataclass(frozen=True, kw_only=True)
class Training:
    """One proxy to be trained."""

    name: str
    weights: Weights
    seed: int
    steps: int
    bank: tuple[int, int, int] | None = None
    """Size, number and seed of the negative batches to draw."""
    measure: Measure | None = None
    """Of the trained heads, for the record."""
    trainer: "Trainer | None" = None
    """Of the pool of all others."""
    pairs: TrainingPairs | None = None
    """What it is trained on, where that is not the pool of all others."""


def first_heads(pool: TrainingPairs, config: HeadsConfig, seed: int) -> Heads:
    """Heads before the first step on a pool."""
    images, texts = pool.inputs(slice(0, 1))
    return initial_heads(images.shape[1], texts.shape[1], config.dimension, seed)


def beginning(
    pool: TrainingPairs, weights: Weights, config: HeadsConfig, seed: int
) -> tuple[Heads, Iterator[IntArray]]:
    """Heads before the first step, and the rows of the pool in every batch: with these a training can be replayed."""
    batches = stream_batches(WeightedPool(pool, weights), config.batch_size, config.steps, seed)
    return first_heads(pool, config, seed), batches


class Trainer(Protocol):
    """A way to train."""

    def __call__(
        self, pool: PairSet, weights: Weights, config: HeadsConfig, seed: int, exchange: Exchange, device: str
    ) -> Trained:
        """As `train`."""


def train(
    pool: TrainingPairs,
    weights: Weights,
    config: HeadsConfig,
    seed: int,
    exchange: Exchange | None = None,
    device: str = "cpu",
) -> Trained:
    """A proxy trained on the pool by weight, alone or as one of the workers of an exchange; its heads are on the CPU."""
    heads, batches = beginning(pool, weights, config, seed)
    inputs = BlockInputs(pool, device)
    return train_heads(inputs, batches, heads.to(device), config, exchange=exchange).cpu()


@lru_cache(maxsize=1)
def _warm(pool: PairSet, config: HeadsConfig) -> None:
    """Imports, threads and caches, once a process: they are no part of the time of whatever happens to be trained first."""
    train(pool, Uniform(), replace(config, steps=1), 0)


@dataclass(frozen=True, kw_only=True)
class TrainProxy:
    """Task: train one proxy into its file, unless that is there; the record of its training."""

    pool: PairSet
    config: HeadsConfig
    training: Training
    folder: Path
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"training of {self.training.name}"

    @property
    def proxy(self) -> Proxy:
        return Proxy(self.folder, self.training.name)

    def __call__(self, exchange: Exchange | None = None) -> dict[str, Any]:
        """All workers of an exchange train; the first one writes."""
        if (record := self.proxy.record) is not None:
            return record
        exchange = exchange or Alone()
        training, config = self.training, replace(self.config, steps=self.training.steps)
        pairs = self.pool if training.pairs is None else training.pairs
        _warm(self.pool, self.config)
        began = time.monotonic()
        how = training.weights, config, training.seed, exchange, self.device
        trained = training.trainer(self.pool, *how) if training.trainer else train(pairs, *how)
        record = {
            "name": training.name,
            "seed": training.seed,
            "steps": len(trained.losses),
            "training_loss": trained.losses[-1],
        }
        seconds = time.monotonic() - began
        if exchange.rank == 0:
            record |= training.measure(trained.heads) if training.measure else {}
            bank: list[IntArray] = []
            if training.bank is not None:
                size, count, seed = training.bank
                bank = disjoint_batches(WeightedPool(pairs, training.weights), size, count, seed)
            self.proxy.save(trained, bank, record, seconds)
        return record | {"seconds": seconds}


def training_memory(pool: PairSet) -> int:
    """Bytes that a worker takes which trains a proxy on the pool: a block of embeddings, as it is read and as it is kept."""
    images, texts = pool.inputs(slice(0, 1))
    pair = 6 * (images.shape[1] + texts.shape[1])  # float32, beside float16 or half of another copy
    return LIBRARY_BYTES + min(len(pool), BLOCK) * pair


def train_many(
    pool: PairSet,
    config: HeadsConfig,
    trainings: Sequence[Training],
    workers: Workers,
    *,
    label: str = "",
    cpus: int = 1,
) -> list[dict[str, Any]]:
    """Train proxies into `workers.folder`, one file each, those aside that lie there; their records in the order given.

    As many are trained at once as there is room for, of `cpus` cores each.
    """
    tasks = [
        TrainProxy(pool=pool, config=config, training=one, folder=workers.folder, device=workers.device)
        for one in trainings
    ]
    needs = workers.heavy(cpus=cpus, memory=training_memory(pool))
    records = workers.map(tasks, unit="proxies", label=label, resources=needs)
    by_name = {record["name"]: record for record in records}
    return [by_name[training.name] for training in trainings]
