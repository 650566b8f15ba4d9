"""What proxies retrained on each method's subset come to: recall by test image, paired between methods."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from common import COMPARING, cached
from curation import Curation

from influencespace.core.metrics import bootstrap_means, interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class Retrained:
    """Recall of every method's proxies, by test image."""

    shares: Mapping[str, np.ndarray]
    """Each test image's share of the mean recall, by method: (seeds, images)."""
    kept: Mapping[str, float]
    """The share of the pool that each method keeps."""

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """Bootstrapped means over images, the same images for every method."""
        return {method: bootstrap_means(values) for method, values in self.shares.items()}

    def mean(self, method: str) -> float:
        return float(self.shares[method].mean())

    def around(self, method: str) -> Interval:
        return interval(self.draws[method])

    def compared(self, to: str, ours: str = "curated") -> tuple[float, Interval]:
        """How far one method's mean recall is above another's, with its paired interval."""
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


def retrained(curations: Sequence[Curation], seeds: Sequence[int]) -> Retrained:
    """The proxies of one pool's curations, which differ in what is target and what is test: their test images together."""
    found = [
        cached(
            each.world.cache,
            ["by method", str(each.folder.relative_to(each.world.cache)), each.about, tuple(seeds)],
            partial(each.by_method, tuple(seeds)),
            COMPARING,
        )
        for each in curations
    ]
    methods = list(found[0]["shares"])
    return Retrained(
        shares={
            name: np.concatenate([np.array(each["shares"][name]) for each in found], 1) for name in methods
        },
        kept={name: float(np.mean([each["kept"][name] for each in found])) for name in methods},
    )


def mean_of(each: Sequence[Retrained]) -> Retrained:
    """The mean over pools that have one test set, of the methods that all of them have."""
    methods = [name for name in each[0].shares if all(name in one.shares for one in each)]
    return Retrained(
        shares={name: np.mean([one.shares[name] for one in each], axis=0) for name in methods},
        kept={name: float(np.mean([one.kept[name] for one in each])) for name in methods},
    )
