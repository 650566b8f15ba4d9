"""Training proxies: one way for all that are trained, as many at once as the machines hold."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import disjoint_batches, training_batches
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.placement import Resources
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.training import Alone, Exchange, HeadsConfig, Trained, train_heads
from influencespace.run import Workers
from influencespace.stages.proxies.proxy import Proxy

Measure = Callable[[Heads], dict[str, Any]]


class Trainer(Protocol):
    """Another way to train than on fixed weights."""

    def __call__(
        self, pool: PairSet, weights: FloatArray, config: HeadsConfig, seed: int, exchange: Exchange
    ) -> Trained:
        """As `train`."""


@dataclass(frozen=True)
class Column:
    """Weights of the pool's pairs that lie in a column of a Parquet file."""

    path: Path
    name: str

    def __call__(self) -> FloatArray:
        return read_columns(self.path, self.name)[self.name].astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One proxy to be trained."""

    name: str
    weights: Callable[[], FloatArray]
    """Gives the weight of each pair of the pool (n,) where it is trained: how often the pair is met in an epoch."""
    seed: int
    steps: int
    bank: tuple[int, int, int] | None = None
    """Size, number and seed of the negative batches to draw."""
    measure: Measure | None = None
    """Of the trained heads, for the record."""
    trainer: Trainer | None = None


def beginning(
    pool: PairSet, weights: FloatArray, config: HeadsConfig, seed: int
) -> tuple[Heads, Iterator[IntArray]]:
    """Heads before the first step, and the rows of the pool in every batch: with these a training can be replayed."""
    heads = initial_heads(pool.table.images.shape[1], pool.table.texts.shape[1], config.dimension, seed)
    return heads, training_batches(weights, pool.image, config.batch_size, config.steps, seed)


def train(
    pool: PairSet, weights: FloatArray, config: HeadsConfig, seed: int, exchange: Exchange | None = None
) -> Trained:
    """A proxy trained on the pool by weight (n,), alone or as one of the workers of an exchange."""
    heads, batches = beginning(pool, weights, config, seed)
    return train_heads(pool.inputs, batches, heads, config, exchange=exchange)


@lru_cache(maxsize=1)
def _warm(pool: PairSet, config: HeadsConfig) -> None:
    """Imports, threads and caches, once a process: they are no part of the time of whatever happens to be trained first."""
    train(pool, np.ones(len(pool)), replace(config, steps=1), 0)


@dataclass(frozen=True, kw_only=True)
class TrainProxy:
    """Task: train one proxy into its file, unless that is there; the record of its training."""

    pool: PairSet
    config: HeadsConfig
    training: Training
    folder: Path

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
        weights = training.weights()
        _warm(self.pool, self.config)
        began = time.monotonic()
        trained = (training.trainer or train)(self.pool, weights, config, training.seed, exchange)
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
                bank = disjoint_batches(self.pool.image, size, count, seed, weights)
            self.proxy.save(trained, bank, record, seconds)
        return record | {"seconds": seconds}


def train_many(
    pool: PairSet,
    config: HeadsConfig,
    trainings: Sequence[Training],
    workers: Workers,
    *,
    label: str = "",
    resources: Resources | None = None,
) -> list[dict[str, Any]]:
    """Train proxies into `workers.folder`, one file each, those aside that lie there; their records in the order given."""
    tasks = [TrainProxy(pool=pool, config=config, training=one, folder=workers.folder) for one in trainings]
    records = workers.map(tasks, unit="proxies", label=label, resources=resources)
    by_name = {record["name"]: record for record in records}
    return [by_name[training.name] for training in trainings]
