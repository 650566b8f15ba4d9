"""Names of pairs, made from their content alone: never from a shard's name or a position in it."""

import hashlib

from influencespace.data.schema import Sample


def digest(data: bytes) -> bytes:
    """The 16-byte BLAKE2b digest of `data`."""
    return hashlib.blake2b(data, digest_size=16).digest()


def pair_uid(uid: str, position: int, *, only: bool) -> str:
    """Name of the pair of image `uid` and its caption at `position`: the plain uid for an `only` caption."""
    return uid if only else f"{uid}#{position}"


def pair_uids(sample: Sample) -> list[str]:
    """One uid for each chosen caption of `sample`.

    With a uid of its own, an image that came with one caption keeps it; the pairs of an image that came with
    several are `uid#i`, i the place among all its captions, so that leaving some out renames no other.
    Without one, a uid is 32 hex digits of image bytes and caption; exact copies share it, and get
    endings when all are merged.
    """
    if sample.uid is None:
        image = digest(sample.image)
        return [digest(image + caption.encode()).hex() for caption in sample.captions]
    only = sample.positions is None and len(sample.captions) == 1
    positions = sample.positions or range(len(sample.captions))
    return [pair_uid(sample.uid, position, only=only) for position in positions]
