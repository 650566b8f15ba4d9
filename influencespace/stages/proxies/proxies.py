"""The proxy stage: one proxy on all pairs, one for each fold by image, the bank of each, and every pair's quality."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as plain_field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.batches import covering_batches, disjoint_batches, folds_by_image, training_batches
from influencespace.core.quality import MAX_SHARED, shared_captions
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen, write_json
from influencespace.data.buckets import buckets_of, has_bucket, join_buckets, write_bucket
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, run_once, run_task
from influencespace.engine.progress import progress
from influencespace.errors import InputError
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.similarity import clip_score, neg_clip_loss
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.training import Exchange, HeadsConfig, Trained, train_heads
from influencespace.stages.finish import finish_stage, finished_stage

ALL = "all"
MIN_TARGET_IMAGES = 8  # four for model choices, four for the gradient: two contexts of two pairs each
MIN_GROUP_IMAGES = 16  # of a group in each half of the target: fewer do not say how well it is served


@options(frozen=True, kw_only=True)
class ProxyConfig:
    """The proxies whose training influence explains."""

    train: HeadsConfig = plain_field(default_factory=HeadsConfig)
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the pool that a proxy takes, in place of `train.steps`."""
    choose_steps: bool = True
    """Double the steps while that lowers the loss on the choosing half of the target by at least `min_gain`."""
    min_gain: float = Field(default=0.01, ge=0)
    """Relative fall of the loss that a doubling must bring."""
    max_doublings: int = Field(default=3, ge=0)
    folds: int = Field(default=5, ge=2)
    """K: proxies that hold out one fold of the images each."""
    contexts: int = Field(default=4, ge=2)
    """Contexts of the bank of each proxy, of batch_size - 1 pairs."""
    bucket_size: int = Field(default=16_384, ge=1)
    """Pairs scored in one task; no score depends on it."""
    seed: int = Field(default=0, ge=0)

    def first_steps(self, pairs: int) -> int:
        """Steps of the first proxy on a pool of so many pairs, before any doubling."""
        if self.epochs is None:
            return self.train.steps
        return max(1, round(self.epochs * pairs / self.train.batch_size))

    def min_images(self, images: int) -> int:
        """Images of a pool of so many that the proxy without the largest fold is trained on."""
        return images - -(-images // self.folds)

    def bank_batches(self, images: int) -> int:
        """Contexts in every proxy's bank: as many as the one with the fewest images can fill, two or more.

        Influence in training and held out is balanced context by context.
        """
        return max(2, min(self.contexts, self.min_images(images) // (self.train.batch_size - 1)))


@dataclass(frozen=True)
class Proxy:
    """A trained proxy on disk, opened where it is used."""

    folder: Path
    name: str

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"{self.name}.safetensors")

    @cached_property
    def heads(self) -> Heads:
        image, text = self._state["image"], self._state["text"]
        heads = Heads(image.shape[0], text.shape[0], image.shape[1])
        heads.load_state_dict({"image": image, "text": text})
        return heads

    @property
    def preconditioner(self) -> Tensor:
        return self._state["preconditioner"]

    @property
    def sum_of_learning_rates(self) -> float:
        return float(self._state["sum_of_learning_rates"])

    @property
    def bank(self) -> list[NDArray[np.int64]]:
        """Pairs of the pool in each context."""
        contexts = sorted(key for key in self._state if key.startswith("context_"))
        return [self._state[key].numpy() for key in contexts]

    def reference_bank(self, pool: PairSet) -> list[NegativeBatch]:
        return [NegativeBatch(inputs=pool.inputs(rows), image=pool.image[rows]) for rows in self.bank]

    @torch.no_grad()
    def embed(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        u, t = self.heads(*inputs)
        return u, t


def save_proxy(folder: Path, name: str, trained: Trained, bank: Sequence[NDArray[np.int64]]) -> None:
    """One file: heads, the trainer's response, the recorded bank."""
    state = {
        "image": trained.heads.image.detach(),
        "text": trained.heads.text.detach(),
        "preconditioner": trained.preconditioner,
        "sum_of_learning_rates": torch.tensor(trained.sum_of_learning_rates, dtype=torch.float64),
    }
    state |= {f"context_{k:03d}": torch.from_numpy(rows) for k, rows in enumerate(bank)}
    with atomic_path(folder / f"{name}.safetensors") as aside:
        save_file({key: value.cpu().contiguous() for key, value in state.items()}, aside)


@dataclass(frozen=True)
class TargetHalves:
    """The target cut in two by image: model choices on one half, the target gradient from the other."""

    target: PairSet
    seed: int

    @cached_property
    def _fold(self) -> NDArray[np.int64]:
        images = len(np.unique(self.target.image))
        if images < MIN_TARGET_IMAGES:
            raise InputError(
                f"the target has {images} image(s); influence on it needs {MIN_TARGET_IMAGES} or more. Give more target pairs."
            )
        return folds_by_image(self.target.image, 2, self.seed)

    @cached_property
    def choosing(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._fold == 0)

    @cached_property
    def gradient(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._fold == 1)

    @cached_property
    def group(self) -> NDArray[np.int64]:
        """Group of each pair of the target (n,); -1 for one without, or of a group with too few images in a half.

        Where most captions are shared, as the names of classes are, there are none: a loss then tells how frequent a class is.
        """
        group = self.target.group.copy()
        if shared_captions(self.target.image, self.target.text) > MAX_SHARED:
            return np.full_like(group, -1)
        enough = np.ones(int(group.max(initial=-1)) + 1, bool)
        for half in (self.choosing, self.gradient):
            images = np.unique(np.stack([group[half], self.target.image[half]]), axis=1)[0]
            enough &= np.bincount(images[images >= 0], minlength=len(enough)) >= MIN_GROUP_IMAGES
        named = group >= 0
        group[named] = np.where(enough[group[named]], group[named], -1)
        return group

    def contexts(self, half: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
        """The half's pairs in contexts of at most a batch, at most one pair an image in each."""
        return [half[c] for c in covering_batches(self.target.image[half], batch_size, self.seed)]


@torch.no_grad()
def choosing_terms(
    heads: Heads, halves: TargetHalves, config: HeadsConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The pairs of the choosing half of the target, and the loss of each (m,), (m,)."""
    contexts = halves.contexts(halves.choosing, config.batch_size)
    terms = []
    for rows in contexts:
        u, t = heads(*halves.target.inputs(rows))
        terms.append(config.objective.terms(u, t).double().numpy())
    return np.concatenate(contexts), np.concatenate(terms)


def losses_by_fold(
    halves: TargetHalves, rows: NDArray[np.int64], losses: NDArray[np.float64], folds: int
) -> list[float]:
    """Mean loss of pairs `rows` of the target (m,) for each of `folds` folds of their images, or fewer where they have fewer."""
    image = halves.target.image[rows]
    folds = min(folds, len(np.unique(image)))
    fold = folds_by_image(image, folds, halves.seed)
    return [float(losses[fold == k].mean()) for k in range(folds)]


def choosing_loss(heads: Heads, halves: TargetHalves, config: HeadsConfig) -> float:
    """Mean loss on the choosing half of the target."""
    return float(choosing_terms(heads, halves, config)[1].mean())


@dataclass(frozen=True, kw_only=True)
class TrainProxy:
    """Task: train the proxy that holds one fold out (or none), draw its bank, save both."""

    pool: PairSet
    target: PairSet
    config: ProxyConfig
    steps: int
    fold: int | None
    folder: Path
    mark: str

    @property
    def name(self) -> str:
        return proxy_name(self.fold)

    def __call__(self) -> dict[str, Any]:
        note = self.folder / f"{self.name}.json"
        done = read_note(note, self.mark)
        if done is not None:
            return done
        began = time.monotonic()
        weights = self.weights()
        config = self.config
        steps, tried = self.steps, {}
        note.unlink(missing_ok=True)  # of another config: never beside weights that are not its own
        trained = self.train(weights, steps)
        halves = TargetHalves(self.target, config.seed)
        loss = choosing_loss(trained.heads, halves, config.train)
        tried[steps] = loss
        if config.choose_steps and self.fold is None:
            for _ in range(config.max_doublings):
                longer = self.train(weights, 2 * steps)
                longer_loss = choosing_loss(longer.heads, halves, config.train)
                tried[2 * steps] = longer_loss
                if longer_loss > loss * (1 - config.min_gain):
                    break
                trained, loss, steps = longer, longer_loss, 2 * steps
        size, count = config.train.batch_size - 1, config.bank_batches(len(np.unique(self.pool.image)))
        bank = disjoint_batches(self.pool.image, size, count, config.seed + 1, weights)
        save_proxy(self.folder, self.name, trained, bank)
        result = {
            "mark": self.mark,
            "name": self.name,
            "steps": steps,
            "target_loss": loss,
            "target_loss_by_steps": {str(key): value for key, value in tried.items()},
            "training_loss": trained.losses[-1],
            "seconds": time.monotonic() - began,
        }
        write_json(note, result)
        return result

    def weights(self) -> NDArray[np.float64]:
        if self.fold is None:
            return np.ones(len(self.pool))
        return (image_folds(self.pool, self.config) != self.fold).astype(np.float64)

    def train(self, weights: NDArray[np.float64], steps: int) -> Trained:
        return train_subset(
            self.pool, weights, self.config.train, steps, self.config.seed + 1 + (self.fold or 0)
        )


def train_subset(
    pool: PairSet,
    weights: NDArray[np.float64],
    config: HeadsConfig,
    steps: int,
    seed: int,
    exchange: Exchange | None = None,
) -> Trained:
    """A proxy trained for `steps` on the pool by weight (n,), alone or as one of the workers of an exchange."""
    config = replace(config, steps=steps)
    heads, batches = beginning(pool, weights, config, seed)
    return train_heads(pool.inputs, batches, heads, config, exchange=exchange)


def beginning(
    pool: PairSet, weights: NDArray[np.float64], config: HeadsConfig, seed: int
) -> tuple[Heads, Iterator[NDArray[np.int64]]]:
    """Heads before the first step, and the rows of the pool in every batch: with these a training can be replayed."""
    heads = initial_heads(pool.table.images.shape[1], pool.table.texts.shape[1], config.dimension, seed)
    return heads, training_batches(weights, pool.image, config.batch_size, config.steps, seed)


def proxy_name(fold: int | None) -> str:
    return ALL if fold is None else f"without_fold_{fold}"


def image_folds(pool: PairSet, config: ProxyConfig) -> NDArray[np.int64]:
    """Fold of each pair of the pool, by image."""
    return folds_by_image(pool.image, config.folds, config.seed)


def read_note(path: Path, mark: str) -> dict[str, Any] | None:
    """What a finished task wrote about itself, if it was this task."""
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return note if note.get("mark") == mark else None


def proxy_steps(folder: Path) -> int:
    """Steps for which the proxies of a finished stage were trained."""
    note = json.loads((folder / f"{ALL}.json").read_text(encoding="utf-8"))
    return int(note["steps"])


@dataclass(frozen=True, kw_only=True)
class ScoreQuality:
    """Task: CLIP score and negCLIPLoss of a block of pairs by the proxy of all pairs and by the one that held each out."""

    pool: PairSet
    config: ProxyConfig
    folder: Path
    start: int
    stop: int
    mark: str

    @property
    def name(self) -> str:
        return f"quality of pairs {self.start} to {self.stop}"

    def __call__(self) -> int:
        rows = np.arange(self.start, self.stop)
        if has_bucket(self.folder, "quality", self.start, self.mark):
            return len(rows)
        fold = image_folds(self.pool, self.config)[rows]
        columns: dict[str, NDArray[Any]] = {
            key: np.empty(len(rows)) for key in ("clip_in", "clip_out", "neg_clip_in", "neg_clip_out")
        }
        columns["clip_in"], columns["neg_clip_in"] = self._scores(rows, None)
        for k in range(self.config.folds):
            held_out = fold == k
            if held_out.any():
                columns["clip_out"][held_out], columns["neg_clip_out"][held_out] = self._scores(
                    rows[held_out], k
                )
        write_bucket(self.folder, "quality", self.start, self.mark, columns)
        return len(rows)

    def _scores(
        self, rows: NDArray[np.int64], fold: int | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        proxy = Proxy(self.folder, proxy_name(fold))
        bank = proxy.reference_bank(self.pool)
        contexts = [(*proxy.embed(context.inputs), context.image) for context in bank]
        u, t = proxy.embed(self.pool.inputs(rows))
        scale = 1 / self.config.train.temperature
        return clip_score(u, t), neg_clip_loss(u, t, self.pool.image[rows], contexts, scale)


def proxies(
    pool: PairSet,
    target: PairSet,
    inputs: dict[str, str],
    config: ProxyConfig,
    out: Path,
    engine: Engine,
) -> Manifest:
    """Train the proxies and score the quality of every pair of the pool."""
    # quality is told by contexts that do not hold the pair's image; of older code by all
    mark = fingerprint({"stage": "proxy", "quality": "of strangers", "config": config, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    make = partial(TrainProxy, pool=pool, target=target, config=config, folder=out, mark=mark)
    rows = run_once(engine, partial(count_pairs, pool))
    with progress("proxy", 1 + config.folds, "proxies") as bar:
        (first,) = engine.map(
            run_task, [make(steps=config.first_steps(rows), fold=None)], num_cpus=engine.cores_per_task
        )
        bar.advance()
        notes = [first]
        tasks = [make(steps=first["steps"], fold=k) for k in range(config.folds)]
        for note in engine.map(run_task, tasks, num_actors=engine.cores):
            notes.append(note)
            bar.advance()
    score = partial(ScoreQuality, pool=pool, config=config, folder=out, mark=mark)
    blocks = [score(start=a, stop=b) for a, b in buckets_of(rows, config.bucket_size)]
    with progress("quality", rows, "pairs") as bar:
        for count in engine.map(run_task, blocks, num_actors=engine.cores):
            bar.advance(count)
    run_once(engine, partial(join_buckets, out, "quality", [b.start for b in blocks]))
    details = {"steps": first["steps"], "proxies": sorted(notes, key=lambda note: str(note["name"]))}
    return finish_stage(
        out,
        Manifest(
            stage="proxy", fingerprint=mark, inputs=inputs, rows_in=rows, rows_out=rows, details=details
        ),
        began,
    )


def count_pairs(pool: PairSet) -> int:
    return len(pool)
