"""The size and the dirt of a synthetic world, and the seed of everything at a place in it."""

from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random
from typing import Annotated, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

Split = Literal["pretrain", "pool", "target", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
DIRTY_SPLITS: tuple[Split, ...] = ("pretrain", "pool")

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@pydantic_dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """A synthetic world: how many images each split has and how much of it is dirt.

    Rates of dirt hold for `pretrain` and `pool`; `target` and `test` are clean.
    """

    seed: int = 0
    pretrain: Count = 4000
    """Images for pre-training an encoder; each has `captions_per_image` pairs."""
    pool: Count = 4000
    """Images to curate."""
    target: Count = 1000
    """Clean images whose loss is to fall."""
    test: Count = 1000
    """Clean images held out for retrieval."""
    captions_per_image: Positive = 1
    wrong_captions: Fraction = 0.25
    """Fraction of pairs that carry a caption written for another image, and false of their own."""
    near_duplicates: Fraction = 0.05
    """Fraction of images that show an earlier clean scene again, slightly moved or compressed anew."""
    boilerplate: Fraction = 0.03
    """Fraction of pairs with a caption that describes nothing."""
    irrelevant: Fraction = 0.05
    """Fraction of images from another domain (charts, pages, textures), correctly captioned."""
    rare_group: Fraction = 0.04
    """Fraction of scenes of the group "rare" in `pretrain` and `pool`."""
    rare_group_clean: Fraction = 0.15
    """The same in `target` and `test`: the rare group matters more than its share of the pool."""
    shard_size: Positive = 500
    """Images in a shard."""

    def __post_init__(self) -> None:
        dirt = self.wrong_captions + self.near_duplicates + self.boilerplate + self.irrelevant
        if dirt > 0.95:
            raise ValueError(
                f"wrong_captions + near_duplicates + boilerplate + irrelevant = {dirt:.2f}: leave at least "
                "0.05 clean (near duplicates need clean originals); lower one of the four rates."
            )

    def size(self, split: Split) -> int:
        """Images in the split."""
        return int(getattr(self, split))


@dataclass(frozen=True)
class Place:
    """One index of one split: the seed of whatever is there, so that any stretch can be made on its own."""

    config: WorldConfig
    split: Split
    index: int

    def at(self, index: int) -> "Place":
        """Another place of the same split."""
        return replace(self, index=index)

    def seed(self, purpose: str) -> int:
        """A seed of 64 bits; independent for each purpose."""
        return int.from_bytes(self._digest(purpose)[:8], "big")

    def rng(self, purpose: str) -> Random:
        """A fresh generator; independent for each purpose."""
        return Random(self.seed(purpose))

    @property
    def uid(self) -> str:
        """Name of the image here: 32 hex digits."""
        return self._digest("uid").hex()

    def _digest(self, purpose: str) -> bytes:
        key = f"{self.config.seed}/{self.split}/{self.index}/{purpose}"
        return blake2b(key.encode(), digest_size=16).digest()
