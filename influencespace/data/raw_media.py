"""What the pairs of a set were embedded from: each picture and each caption once, read again from where they lie."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from influencespace.core.arrays import IntArray
from influencespace.data.exports.pictures import read_pictures
from influencespace.data.pair_set import PairSet
from influencespace.data.schema import PLACE, ImageRef


@dataclass(frozen=True)
class RawMedia:
    """The distinct images and captions of a set, by their numbers in the embedding artifact; cheap to pickle.

    Keeps where all of the set's images lie, and all captions, once they are asked for: one for each worker.
    """

    pairs: PairSet

    def __reduce__(self) -> tuple[type["RawMedia"], tuple[PairSet]]:
        return RawMedia, (self.pairs,)

    @cached_property
    def images(self) -> IntArray:
        """Distinct images (Ni,), in the order in which they lie in their files."""
        order: IntArray = self._places.to_pandas().sort_values(list(PLACE)).index.to_numpy()
        return self._image_numbers[order]

    @cached_property
    def texts(self) -> IntArray:
        """Distinct captions (Nt,), short ones first, so that little of a batch is padded."""
        length = pc.utf8_length(self._captions).to_numpy()
        return self._text_numbers[np.argsort(length, kind="stable")]

    def pictures(self, images: IntArray) -> list[bytes]:
        """Encoded pictures of some of `images`, in their order; raises InputError where a file is gone or has changed."""
        rows = self._places.take(np.searchsorted(self._image_numbers, images)).to_pylist()
        refs = list(map(ImageRef.of, rows))
        order = sorted(range(len(refs)), key=lambda i: (refs[i].path, refs[i].offset, refs[i].row))
        read = dict(zip(order, read_pictures([refs[i] for i in order])))
        return [read[i] for i in range(len(refs))]

    def captions(self, texts: IntArray) -> list[str]:
        """Some of the captions, in the order asked for."""
        captions: list[str] = self._captions.take(np.searchsorted(self._text_numbers, texts)).to_pylist()
        return captions

    @cached_property
    def _image_numbers(self) -> IntArray:
        return np.unique(self.pairs.image)

    @cached_property
    def _text_numbers(self) -> IntArray:
        return np.unique(self.pairs.text)

    @cached_property
    def _places(self) -> Any:
        """Where each of `_image_numbers` lies."""
        first = np.unique(self.pairs.image, return_index=True)[1]
        return self.pairs.table.pairs(*PLACE).take(self.pairs.rows[first])

    @cached_property
    def _captions(self) -> Any:
        """The caption of each of `_text_numbers`."""
        first = np.unique(self.pairs.text, return_index=True)[1]
        return self.pairs.table.pairs("caption")["caption"].take(self.pairs.rows[first])
