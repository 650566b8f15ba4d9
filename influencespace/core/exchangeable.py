"""Exchangeability: whether the encoder that embedded a pool knows a target better than the pool's good pairs.

A target that was in the encoder's training data looks like any other. But its pairs have higher cosines, and their partners are
found more easily among others; whatever follows the encoder's own opinion is then good on this target, and not elsewhere.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray

BATCH = 128
"""Pairs among which a partner is looked for."""
ENOUGH = 2048
"""Images of a set that say how well it is known."""
NOTABLE = 0.1
"""Standard deviations of the pool's cosines, by which a target's mean is surely higher where it is known better. Of Flickr8k's
`dev`, which its encoder knows, the mean is .33 to .37 higher, of 500 images of the pool -.04 to .03."""
SURE = 1.96  # standard errors


@dataclass(frozen=True, kw_only=True)
class Known:
    """How well an encoder knows some pairs of as many images."""

    cosine: FloatArray
    """Of each pair (n,)."""
    found: FloatArray
    """Whether image and caption are each other's nearest among BATCH pairs, as the mean of both directions (m,), m <= n."""

    @classmethod
    def of(cls, u: Tensor, t: Tensor) -> "Known":
        """Unit embeddings of the images and of the captions of n pairs of different images, in random order: two (n, d)."""
        parts = zip(torch.split(u, BATCH), torch.split(t, BATCH))
        found = [_found(images, texts) for images, texts in parts if len(images) == min(BATCH, len(u))]
        cosine: FloatArray = (u * t).sum(1).double().cpu().numpy()
        return cls(cosine=cosine, found=torch.cat(found).double().cpu().numpy())


def _found(images: Tensor, texts: Tensor) -> Tensor:
    cosines, own = images @ texts.T, torch.arange(len(images), device=images.device)
    return ((cosines.argmax(1) == own).double() + (cosines.argmax(0) == own).double()) / 2


@dataclass(frozen=True, kw_only=True)
class Exchangeability:
    """How far a target is above the pool's good pairs, each with its standard error."""

    cosine_gap: float
    """In standard deviations of the pool's cosines."""
    cosine_gap_se: float
    found_gap: float
    """Of the share of partners that are found."""
    found_gap_se: float
    chosen_by_encoder: bool = False
    """Whether the target's pairs were chosen by the encoder's score: it then knows them better by construction."""

    @classmethod
    def of(cls, target: Known, pool: Known, chosen_by_encoder: bool = False) -> "Exchangeability":
        spread = max(float(pool.cosine.std()), np.finfo(np.float64).tiny)
        (cosine, cosine_se), (found, found_se) = (
            _gap(getattr(target, name), getattr(pool, name)) for name in ("cosine", "found")
        )
        return cls(
            cosine_gap=cosine / spread,
            cosine_gap_se=cosine_se / spread,
            found_gap=found,
            found_gap_se=found_se,
            chosen_by_encoder=chosen_by_encoder,
        )

    @property
    def known_better(self) -> bool:
        """Whether the encoder surely knows the target better: it chose it, or by cosines and by ranks."""
        return self.chosen_by_encoder or (
            self.cosine_gap - SURE * self.cosine_gap_se > NOTABLE
            and self.found_gap - SURE * self.found_gap_se > 0
        )


def _gap(ours: FloatArray, theirs: FloatArray) -> tuple[float, float]:
    """The difference of two means, and its standard error."""
    return float(ours.mean() - theirs.mean()), float(
        np.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    )
