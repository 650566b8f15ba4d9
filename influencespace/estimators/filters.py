"""Filters without a gradient, behind the same contract: CLIP score, negCLIPLoss, and chance."""

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.contrastive import contrastive
from influencespace.errors import STRICT
from influencespace.estimators.problem import (
    Batch,
    Fit,
    FloatArray,
    IntArray,
    Problem,
    immediately,
    mean_of_known,
)


def clip_score(u: Tensor, t: Tensor) -> FloatArray:
    """Cosine of image and caption: unit u, t (n, d) -> (n,) (Hessel et al. 2021)."""
    return (u * t).sum(-1).double().cpu().numpy()


def neg_clip_loss(
    u: Tensor, t: Tensor, image: IntArray, batches: Sequence[tuple[Tensor, Tensor, IntArray]], scale: float
) -> FloatArray:
    """Minus a pair's contrastive loss, averaged over negative batches: unit u, t (n, d) -> (n,), in units of the loss.

    Batches are unit embeddings of images and texts (M, d) and their images (M,). The normaliser runs over the negative batch
    alone, and batches that hold the pair's image are left out, so that no pair's own caption counts; nan where all do.
    It is InfoNCE's, whatever the loss was (Wang et al. 2024, negCLIPLoss).
    """
    own = scale * (u * t).sum(-1)
    values = []
    for batch_u, batch_t, batch_image in batches:
        images = (scale * u @ batch_t.T).logsumexp(1)
        texts = (scale * t @ batch_u.T).logsumexp(1)
        loss = (images + texts).double() / 2 - own.double()
        values.append(np.where(np.isin(image, batch_image), np.nan, -loss.cpu().numpy()))
    return mean_of_known(np.stack(values, 1))


def random_score(uids: Sequence[str], seed: int = 0) -> FloatArray:
    """Uniform in [0, 1) by a hash of uid and seed: the same for a pair in any set, order or shard."""
    salt = str(seed).encode()
    digests = (hashlib.blake2b(uid.encode(), digest_size=8, salt=salt[:16]).digest() for uid in uids)
    return np.fromiter((int.from_bytes(d, "big") / 2**64 for d in digests), np.float64, len(uids))


@options(frozen=True, kw_only=True, config=STRICT)
class ClipScore:
    """Cosine of image and caption by the proxy."""

    def fit(self, problem: Problem) -> Fit:
        contrastive(problem.objective, "clip_score")
        return immediately(partial(_clip_score, problem))


@options(frozen=True, kw_only=True, config=STRICT)
class NegClipLoss:
    """Minus the contrastive loss of a pair against the negative batches, by the proxy."""

    def fit(self, problem: Problem) -> Fit:
        contrastive(problem.objective, "neg_clip_loss")
        return immediately(partial(_neg_clip_loss, problem))


@options(frozen=True, kw_only=True, config=STRICT)
class Random:
    """Chance, by a hash of the uid: the same for a pair in any set and order."""

    def fit(self, problem: Problem) -> Fit:
        return immediately(partial(_random, problem.seed))


@torch.no_grad()
def _clip_score(problem: Problem, batch: Batch) -> FloatArray:
    return clip_score(*problem.space.embed(batch.inputs))


@torch.no_grad()
def _neg_clip_loss(problem: Problem, batch: Batch) -> FloatArray:
    bank = [(*problem.space.embed(negatives.inputs), negatives.image) for negatives in problem.bank]
    scale = contrastive(problem.objective, "neg_clip_loss").scale
    return neg_clip_loss(*problem.space.embed(batch.inputs), batch.image, bank, scale)


def _random(seed: int, batch: Batch) -> FloatArray:
    return random_score(batch.uid, seed)
