"""What proxies retrained on each method's subset come to: recall by test image, paired between methods."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.contrastive import Contrastive
from influencespace.core.metrics import bootstrap_means, interval, mean_recall_by_image, retrieval_ranks
from influencespace.data.joined import TrainingPairs
from influencespace.data.pair_set import PairSet
from influencespace.models.training import HeadsConfig
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.proxies.train_many import Given, train

Interval = tuple[float, float]
Embed = Callable[[PairSet], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """Recall (or another mean over test samples) of every method's proxies."""

    shares: Mapping[str, FloatArray]
    """Each test image's share of the mean recall, by method: (seeds, images)."""
    kept: Mapping[str, float] = field(default_factory=dict)
    """The share of the pool that each method keeps."""

    @cached_property
    def draws(self) -> dict[str, FloatArray]:
        """Bootstrapped means over images, the same images for every method."""
        return {method: bootstrap_means(values) for method, values in self.shares.items()}

    def mean(self, method: str) -> float:
        return float(self.shares[method].mean())

    def around(self, method: str) -> Interval:
        return interval(self.draws[method])

    def compared(self, to: str, ours: str = "curated") -> tuple[float, Interval]:
        """How far one method's mean is above another's, with its paired interval."""
        return self.mean(ours) - self.mean(to), interval(self.draws[ours] - self.draws[to])

    def row(self, method: str) -> dict[str, Any]:
        """What a table says of a method beside ours."""
        gap, around = self.compared(method)
        return {
            "method": method,
            "mean_recall": self.mean(method),
            "interval": list(self.around(method)),
            "kept": self.kept.get(method),
            "curated_minus_this": gap,
            "paired_interval": list(around),
        }

    def best(self, methods: Iterable[str]) -> str:
        return max(methods, key=self.mean)

    def of_images(self, chosen: Any) -> "Retrained":
        """The same of some test images."""
        return replace(self, shares={name: values[:, chosen] for name, values in self.shares.items()})


def together(folds: Sequence[Sequence[Mapping[str, Any]]]) -> Retrained:
    """Results of one scenario: its test sets side by side, and of each the repeats, which differ in what was corrupted."""
    parts = [part for fold in folds for part in fold]
    return Retrained(
        shares={
            name: np.concatenate(
                [np.concatenate([np.array(part["shares"][name]) for part in fold]) for fold in folds], 1
            )
            for name in parts[0]["shares"]
        },
        kept={name: float(np.mean([part["kept"][name] for part in parts])) for name in parts[0]["kept"]},
    )


def mean_of(each: Sequence[Retrained]) -> Retrained:
    """The mean over pools that have one test set, of the methods that all of them have."""
    methods = [name for name in each[0].shares if all(name in one.shares for one in each)]
    return Retrained(
        shares={name: np.mean([one.shares[name] for one in each], axis=0) for name in methods},
        kept={name: float(np.mean([one.kept[name] for one in each])) for name in methods},
    )


@torch.no_grad()
def judged(
    embed: Embed, target: PairSet, test: PairSet, objective: Contrastive, batch_size: int
) -> dict[str, Any]:
    """Loss on the half of the target that makes choices, and each test image's share of the mean recall."""
    u, t = embed(target)
    halves = TargetHalves(target, 0)
    batches = map(torch.from_numpy, halves.batches(halves.choosing, batch_size))
    loss = float(torch.cat([objective.terms(u[rows], t[rows]) for rows in batches]).mean())
    return {"choosing_loss": loss, "shares": recall_by_image(*embed(test), test.image).tolist()}


def retrain(
    pool: TrainingPairs, weight: FloatArray, config: HeadsConfig, seed: int, target: PairSet, test: PairSet
) -> dict[str, Any]:
    """A proxy of the pool, or of other pairs, by weight (n,), judged."""
    heads = train(pool, Given(weight), config, seed).heads

    def embed(pairs: PairSet) -> tuple[Tensor, Tensor]:
        u, t = heads(*pairs.inputs(slice(None)))
        return u, t

    return judged(embed, target, test, config.objective, config.batch_size)


def recall_by_image(u: Tensor, t: Tensor, image: IntArray) -> FloatArray:
    """Each image's share of the mean recall, from the embeddings of pairs (n, d) and the image of each (n,): (images,)."""
    _, first, own = np.unique(image, return_index=True, return_inverse=True)
    ranks = retrieval_ranks(u[torch.from_numpy(first)], t, torch.from_numpy(own))
    shares: FloatArray = mean_recall_by_image(*ranks, torch.from_numpy(own)).numpy()
    return shares
