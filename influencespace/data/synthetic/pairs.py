"""Which image the world holds at each index, its captions, and the dirt planted there.

Everything is a pure function of (config, split, index), so any stretch of any split can be made anywhere, in any order, and a
larger split begins with the pairs of a smaller one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from random import Random
from typing import Annotated, Literal, NamedTuple, get_args

from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from influencespace.data.synthetic.captions import agrees, choose_view, write_boilerplate, write_caption
from influencespace.data.synthetic.documents import (
    Document,
    draw_document,
    render_document,
    write_document_caption,
)
from influencespace.data.synthetic.scenes import RARE_SHAPE, Scene, draw_scene, render
from influencespace.errors import InputError

Split = Literal["pretrain", "pool", "target", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
DIRTY_SPLITS: tuple[Split, ...] = ("pretrain", "pool")
Kind = Literal["clean", "wrong", "duplicate", "boilerplate", "irrelevant"]

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
    """Fraction of pairs with a caption that says nothing."""
    irrelevant: Fraction = 0.05
    """Fraction of images from another domain (charts, pages, textures), rightly captioned."""
    rare_group: Fraction = 0.04
    """Fraction of scenes of the group "rare" in `pretrain` and `pool`."""
    rare_group_clean: Fraction = 0.15
    """The same in `target` and `test`: what is rare in the pool matters more than its share there."""
    shard_size: Positive = 500
    """Images in a shard."""

    def __post_init__(self) -> None:
        dirt = self.wrong_captions + self.near_duplicates + self.boilerplate + self.irrelevant
        if dirt > 0.95:
            raise InputError(
                f"wrong_captions + near_duplicates + boilerplate + irrelevant = {dirt:.2f}: leave at least 0.05 clean "
                "(near duplicates need clean originals); lower one of the four rates."
            )

    def size(self, split: Split) -> int:
        """Images in the split."""
        return int(getattr(self, split))


class PairTruth(NamedTuple):
    """What was planted in one pair; `original` is the pair from which a wrong caption or a near duplicate came."""

    uid: str
    wrong: bool
    kind: Kind
    original: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One image of the world before it is rendered: cheap to make."""

    uid: str
    group: str
    content: Scene | Document
    brush: int
    """Seed of what the content leaves open: places, shades."""
    shift: complex
    gain: float
    quality: int
    """Of the JPEG."""
    captions: tuple[str, ...]
    truth: tuple[PairTruth, ...]

    def render(self) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        rng = Random(self.brush)
        if isinstance(self.content, Document):
            return render_document(self.content, rng)
        return render(self.content, rng, shift=self.shift, gain=self.gain)

    def jpeg(self) -> bytes:
        """The picture as an encoded JPEG."""
        buffer = io.BytesIO()
        self.render().save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


class WorldImage(NamedTuple):
    """One rendered image of the world; `truth` has one entry a caption."""

    image: Image.Image
    captions: tuple[str, ...]
    uid: str
    truth: tuple[PairTruth, ...]
    group: str


def scene_pairs(config: WorldConfig, split: Split, start: int, stop: int) -> Iterator[WorldImage]:
    """Images start <= index < stop of a split, rendered in memory (before JPEG compression)."""
    for index in range(start, stop):
        plan = plan_image(config, split, index)
        yield WorldImage(plan.render(), plan.captions, plan.uid, plan.truth, plan.group)


def plan_image(config: WorldConfig, split: Split, index: int) -> Plan:
    """What the world holds at this index of the split."""
    kind = _image_kind(config, split, index)
    original = _find_original(config, split, index) if kind == "duplicate" else None
    if original is not None:
        return _plan_duplicate(config, split, index, original)
    if kind == "irrelevant":
        return _plan_document(config, split, index)
    return _plan_scene(config, split, index)


def _plan_scene(config: WorldConfig, split: Split, index: int) -> Plan:
    uid, scene = _uid(config, split, index), _scene(config, split, index)
    captions, truth = [], []
    for position in range(config.captions_per_image):
        kind, text, origin = _caption_kind(config, split, index, position), "", None
        if kind == "wrong":
            text, origin = _borrow_caption(config, split, index, position)
        elif kind == "boilerplate":
            text = write_boilerplate(_rng(config, split, index, f"boilerplate {position}"))
        else:
            text = _own_caption(config, split, index, position)
        captions.append(text)
        truth.append(PairTruth(_pair_uid(config, uid, position), kind == "wrong", kind, origin))
    return Plan(
        uid=uid,
        group=_group_name(scene),
        content=scene,
        brush=_brush(config, split, index),
        shift=0j,
        gain=1.0,
        quality=90,
        captions=tuple(captions),
        truth=tuple(truth),
    )


def _plan_duplicate(config: WorldConfig, split: Split, index: int, original: int) -> Plan:
    """The original's scene again: moved by a pixel and re-lit, or only compressed harder; half the captions reworded."""
    uid, first_uid = _uid(config, split, index), _uid(config, split, original)
    scene, rng = _scene(config, split, original), _rng(config, split, index, "duplicate")
    moved = rng.random() < 0.5
    captions = tuple(
        _own_caption(config, split, original, position)
        if rng.random() < 0.5
        else write_caption(choose_view(scene, rng), rng)
        for position in range(config.captions_per_image)
    )
    return Plan(
        uid=uid,
        group=_group_name(scene),
        content=scene,
        brush=_brush(config, split, original),
        shift=complex(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)) if moved else 0j,
        gain=rng.uniform(0.95, 1.05) if moved else 1.0,
        quality=rng.randint(60, 85),
        captions=captions,
        truth=tuple(
            PairTruth(_pair_uid(config, uid, k), False, "duplicate", _pair_uid(config, first_uid, k))
            for k in range(len(captions))
        ),
    )


def _plan_document(config: WorldConfig, split: Split, index: int) -> Plan:
    uid, rng = _uid(config, split, index), _rng(config, split, index, "document")
    document = draw_document(rng)
    captions = tuple(write_document_caption(document, rng) for _ in range(config.captions_per_image))
    return Plan(
        uid=uid,
        group="common",
        content=document,
        brush=_brush(config, split, index),
        shift=0j,
        gain=1.0,
        quality=90,
        captions=captions,
        truth=tuple(
            PairTruth(_pair_uid(config, uid, k), False, "irrelevant", None) for k in range(len(captions))
        ),
    )


def _image_kind(
    config: WorldConfig, split: Split, index: int
) -> Literal["scene", "duplicate", "irrelevant"]:
    if split not in DIRTY_SPLITS:
        return "scene"
    chance = _rng(config, split, index, "kind").random()
    if chance < config.near_duplicates:
        return "duplicate"
    return "irrelevant" if chance < config.near_duplicates + config.irrelevant else "scene"


def _caption_kind(
    config: WorldConfig, split: Split, index: int, position: int
) -> Literal["clean", "wrong", "boilerplate"]:
    """The dirt of one caption of an image of kind "scene", so that its rate among *all* pairs is as configured."""
    if split not in DIRTY_SPLITS:
        return "clean"
    scenes = 1.0 - config.near_duplicates - config.irrelevant
    chance = scenes * _rng(config, split, index, f"dirt {position}").random()
    if chance < config.wrong_captions:
        return "wrong"
    return "boilerplate" if chance < config.wrong_captions + config.boilerplate else "clean"


def _borrow_caption(config: WorldConfig, split: Split, index: int, position: int) -> tuple[str, str]:
    """The caption a wrong pair gets and the uid of the pair that should have had it.

    Wrong pairs hand their captions down the line: each takes that of the next wrong pair whose caption is false here. So
    captions are permuted among the wrong pairs (but for the rare skip), with nothing to hold in memory.
    """
    scene = _scene(config, split, index)
    for other in count(index + 1):
        lender = _image_kind(config, split, other) == "scene"
        if lender and _caption_kind(config, split, other, position) == "wrong":
            view = _view(config, split, other, position)
            if not agrees(view, scene):
                uid = _pair_uid(config, _uid(config, split, other), position)
                return _own_caption(config, split, other, position), uid
    raise AssertionError("unreachable: the line of pairs has no end")


def _find_original(config: WorldConfig, split: Split, index: int) -> int | None:
    """An earlier scene with clean captions; None where chance finds none (at the very beginning of a split)."""
    rng = _rng(config, split, index, "original")
    for candidate in (rng.randrange(index) for _ in range(200 if index else 0)):
        if _image_kind(config, split, candidate) == "scene" and all(
            _caption_kind(config, split, candidate, position) == "clean"
            for position in range(config.captions_per_image)
        ):
            return candidate
    return None


def _scene(config: WorldConfig, split: Split, index: int) -> Scene:
    rng = _rng(config, split, index, "scene")
    share = config.rare_group if split in DIRTY_SPLITS else config.rare_group_clean
    return draw_scene(rng, rare=rng.random() < share)


def _view(config: WorldConfig, split: Split, index: int, position: int) -> Scene:
    return choose_view(_scene(config, split, index), _rng(config, split, index, f"view {position}"))


def _own_caption(config: WorldConfig, split: Split, index: int, position: int) -> str:
    return write_caption(
        _view(config, split, index, position), _rng(config, split, index, f"words {position}")
    )


def _group_name(scene: Scene) -> str:
    return "rare" if any(group.shape == RARE_SHAPE for group in scene.groups) else "common"


def _digest(config: WorldConfig, split: Split, index: int, purpose: str) -> bytes:
    return blake2b(f"{config.seed}/{split}/{index}/{purpose}".encode(), digest_size=16).digest()


def _rng(config: WorldConfig, split: Split, index: int, purpose: str) -> Random:
    return Random(_brush(config, split, index, purpose))


def _brush(config: WorldConfig, split: Split, index: int, purpose: str = "brush") -> int:
    return int.from_bytes(_digest(config, split, index, purpose)[:8], "big")


def _uid(config: WorldConfig, split: Split, index: int) -> str:
    return _digest(config, split, index, "uid").hex()


def _pair_uid(config: WorldConfig, uid: str, position: int) -> str:
    """As `data.uids.pair_uids` names pairs: an image with one caption lends it its own uid."""
    return uid if config.captions_per_image == 1 else f"{uid}#{position}"
