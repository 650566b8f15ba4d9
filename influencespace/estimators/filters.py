"""Filters that need no target, behind the same contract: by the proxy's CLIP score, negCLIPLoss, or chance."""

from functools import partial

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as options

from influencespace.core.contrastive import contrastive
from influencespace.estimators.problem import Batch, Fit, FloatArray, Problem, immediately
from influencespace.estimators.similarity import clip_score, neg_clip_loss, random_score


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ClipScore:
    """Cosine of image and caption by the proxy (Hessel et al. 2021)."""

    def fit(self, problem: Problem) -> Fit:
        contrastive(problem.objective, "clip_score")
        return immediately(partial(_clip_score, problem))


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class NegClipLoss:
    """Minus the contrastive loss of a pair against the bank, by the proxy (Wang et al. 2024)."""

    def fit(self, problem: Problem) -> Fit:
        contrastive(problem.objective, "neg_clip_loss")
        return immediately(partial(_neg_clip_loss, problem))


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Random:
    """Chance, by a hash of the uid: the same for a pair in any set and order."""

    def fit(self, problem: Problem) -> Fit:
        return immediately(partial(_random, problem.seed))


@torch.no_grad()
def _clip_score(problem: Problem, batch: Batch) -> FloatArray:
    u, t = problem.space.embed(batch.inputs)
    return clip_score(u, t)


@torch.no_grad()
def _neg_clip_loss(problem: Problem, batch: Batch) -> FloatArray:
    space = problem.space
    contexts = [(*space.embed(context.inputs), context.image) for context in problem.bank]
    u, t = space.embed(batch.inputs)
    scale = contrastive(problem.objective, "neg_clip_loss").scale
    return neg_clip_loss(u, t, batch.image, contexts, scale)


def _random(seed: int, batch: Batch) -> FloatArray:
    return random_score(batch.uid, seed)
