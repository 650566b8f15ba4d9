"""The target cut in two by image: model choices on one half, the target gradient from the other."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import covering_batches, folds_by_image
from influencespace.core.quality import MAX_SHARED, shared_captions
from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.models.heads import Heads
from influencespace.models.training import HeadsConfig

MIN_TARGET_IMAGES = 8  # four for model choices, four for the gradient: two batches of two pairs each
MIN_GROUP_IMAGES = 16  # of a group in each half of the target: fewer do not say how well it is served


@dataclass(frozen=True)
class TargetHalves:
    """Rows of the two halves. Raises InputError, where they are asked for, if the target has too few images."""

    target: PairSet
    seed: int

    @cached_property
    def _fold(self) -> IntArray:
        images = len(np.unique(self.target.image))
        if images < MIN_TARGET_IMAGES:
            raise InputError(
                f"the target has {images} image(s); influence on it needs {MIN_TARGET_IMAGES} or more. Give more target pairs."
            )
        return folds_by_image(self.target.image, 2, self.seed)

    @cached_property
    def choosing(self) -> IntArray:
        return np.flatnonzero(self._fold == 0)

    @cached_property
    def gradient(self) -> IntArray:
        return np.flatnonzero(self._fold == 1)

    @cached_property
    def group(self) -> IntArray:
        """Group of each pair of the target (n,); -1 for one without, or of a group with too few images in a half.

        Where most captions are shared, as the names of classes are, there are none: a loss then shows how frequent a class is.
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

    def batches(self, half: IntArray, batch_size: int) -> list[IntArray]:
        """The half's pairs in batches of at most this size, at most one pair an image in each."""
        return [half[c] for c in covering_batches(self.target.image[half], batch_size, self.seed)]


@torch.no_grad()
def choosing_terms(heads: Heads, halves: TargetHalves, config: HeadsConfig) -> tuple[IntArray, FloatArray]:
    """The pairs of the choosing half of the target, and the loss of each (m,), (m,)."""
    batches = halves.batches(halves.choosing, config.batch_size)
    terms = []
    for rows in batches:
        u, t = heads(*halves.target.inputs(rows))
        terms.append(config.objective.terms(u, t).double().numpy())
    return np.concatenate(batches), np.concatenate(terms)


def choosing_loss(heads: Heads, halves: TargetHalves, config: HeadsConfig) -> float:
    """Mean loss on the choosing half of the target."""
    return float(choosing_terms(heads, halves, config)[1].mean())


def losses_by_fold(halves: TargetHalves, rows: IntArray, losses: FloatArray, folds: int) -> list[float]:
    """Mean loss of pairs `rows` of the target (m,) for each of `folds` folds of their images, or fewer where they have fewer."""
    image = halves.target.image[rows]
    folds = min(folds, len(np.unique(image)))
    fold = folds_by_image(image, folds, halves.seed)
    return [float(losses[fold == k].mean()) for k in range(folds)]
