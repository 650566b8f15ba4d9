"""Who is what in the benchmarks of curation: which images are curated, which are the target, and which judge.

Roles rotate over the images of one pool, by a hash of their content: each image is a test image in one turn, and what is curated,
the target and the test set are exchangeable, to each other and to the encoder. Nothing is chosen on test images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench import Bench
from influencespace.core.arrays import IntArray
from influencespace.core.hashing import fold_of, hashed

FOLDS = 4
TARGET_IMAGES = 500
NOISE_SEEDS = (1, 2, 3)
CURATED, TARGET, SPARE, TEST = "curated", "target", "spare", "test"
"""Roles; spare images are left out where the target is smaller than usual, so that the curated ones stay the same."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of the rotation."""

    fold: int = 0
    """Of the images, which is the test set."""
    noise: int = 1
    """Seed of what is corrupted, and of which images are the target."""

    def roles(self, image: IntArray, target_images: int = TARGET_IMAGES) -> NDArray[np.str_]:
        """The role of each pair by the number of its image (n,): (n,). All pairs of an image have one.

        Of a data set with few images the target has no more than a third of those that are not tested.
        """
        images, own = np.unique(image, return_inverse=True)
        role = np.full(len(images), CURATED)
        role[fold_of(images, FOLDS, 0) == self.fold] = TEST
        others = np.flatnonzero(role != TEST)
        drawn = others[np.argsort(hashed(images[others], self.noise))][: min(TARGET_IMAGES, len(others) // 3)]
        role[drawn] = SPARE
        role[drawn[:target_images]] = TARGET
        by_pair: NDArray[np.str_] = role[own]
        return by_pair


def rotation(bench: Bench, noise_seeds: Sequence[int] = NOISE_SEEDS) -> list[Turn]:
    """Every fold with every seed of noise; one turn in a quick run."""
    turns = [Turn(fold=fold, noise=noise) for fold in range(FOLDS) for noise in noise_seeds]
    return bench.pick(turns, turns[:1])
