"""What the pairs of a set were embedded from: pictures and captions, read again from where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from influencespace.core.arrays import IntArray
from influencespace.data.buckets import Columns
from influencespace.data.exports.pictures import read_pictures
from influencespace.data.pair_set import PairSet
from influencespace.data.schema import PLACE, ImageRef


@dataclass(frozen=True)
class RawMedia:
    """Pictures and captions of some pairs of a set at a time; cheap to pickle."""

    pairs: PairSet

    def pictures(self, rows: IntArray) -> list[bytes]:
        """The encoded picture of each pair (m,); raises InputError where a file is gone or has changed."""
        return pictures_at(self.pairs.read(rows, *PLACE))

    def captions(self, rows: IntArray) -> list[str]:
        """The caption of each pair (m,)."""
        captions: list[str] = self.pairs.read(rows, "caption")["caption"].tolist()
        return captions


def pictures_at(places: Columns) -> list[bytes]:
    """The encoded pictures at some places, columns of PLACE (m,); raises InputError where a file is gone or has changed."""
    refs = refs_of(places)
    order = in_order_of_files(refs)
    read = dict(zip(order, read_pictures([refs[i] for i in order])))
    return [read[i] for i in range(len(refs))]


def refs_of(places: Columns) -> list[ImageRef]:
    """Places of pictures, from columns of PLACE (m,)."""
    return [ImageRef.of(dict(zip(PLACE, row))) for row in zip(*(places[name].tolist() for name in PLACE))]


def in_order_of_files(refs: Sequence[ImageRef]) -> list[int]:
    """The numbers of pictures in the order in which they lie in their files."""
    return sorted(range(len(refs)), key=lambda i: (refs[i].path, refs[i].offset, refs[i].row))
