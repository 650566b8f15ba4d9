"""The images and captions of a set of pairs, each once: benchmarks draw, alter and compare them by dense numbers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influencespace.core.arrays import IntArray
from influencespace.data.pair_set import PairSet

RealArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Distinct:
    """Each image and each caption of a set of n pairs once, numbered from 0 in an order that depends on their content alone."""

    pairs: PairSet

    @cached_property
    def _images(self) -> tuple[IntArray, IntArray]:
        return _numbered(self.pairs.image)

    @cached_property
    def _texts(self) -> tuple[IntArray, IntArray]:
        return _numbered(self.pairs.text)

    @property
    def image(self) -> IntArray:
        """Number of each pair's image, 0 .. Ni - 1 (n,)."""
        return self._images[1]

    @property
    def text(self) -> IntArray:
        """Number of each pair's caption, 0 .. Nt - 1 (n,)."""
        return self._texts[1]

    @property
    def first_of_image(self) -> IntArray:
        """The first pair with each image (Ni,)."""
        return self._images[0]

    @property
    def first_of_text(self) -> IntArray:
        """The first pair with each caption (Nt,)."""
        return self._texts[0]

    @cached_property
    def images(self) -> RealArray:
        """Unit embeddings of the images (Ni, D)."""
        embeddings: RealArray = self.pairs.inputs(self.first_of_image)[0].numpy()
        return embeddings

    @cached_property
    def texts(self) -> RealArray:
        """Unit embeddings of the captions (Nt, D)."""
        embeddings: RealArray = self.pairs.inputs(self.first_of_text)[1].numpy()
        return embeddings


def _numbered(content: IntArray) -> tuple[IntArray, IntArray]:
    """The first place of each value, and the number of the value at each place."""
    _, first, number = np.unique(content, return_index=True, return_inverse=True)
    return first, number
