"""The images of the world with their captions, and the truth about them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from influencespace.data.synthetic.captions import choose_view, write_boilerplate, write_caption
from influencespace.data.synthetic.config import Place, Split, WorldConfig
from influencespace.data.synthetic.dirt import (
    caption_kind,
    find_lender,
    find_original,
    image_kind,
    own_caption,
    scene_at,
)
from influencespace.data.synthetic.documents import (
    Document,
    draw_document,
    render_document,
    write_document_caption,
)
from influencespace.data.synthetic.scenes import RARE_SHAPES, Scene, render
from influencespace.data.uids import pair_uid

Kind = Literal["clean", "wrong", "duplicate", "boilerplate", "irrelevant"]


class PairTruth(NamedTuple):
    """What was planted in one pair; `original` is where a wrong caption or a near duplicate came from."""

    uid: str
    wrong: bool
    kind: Kind
    original: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One image of the world before it is rendered: cheap to make. `truth` has one entry a caption."""

    uid: str
    content: Scene | Document
    captions: tuple[str, ...]
    truth: tuple[PairTruth, ...]
    painted: Place
    """Seeds what the content leaves open: places, shades."""
    shift: complex = 0j
    gain: float = 1.0
    quality: int = 90
    """Of the JPEG."""

    @property
    def group(self) -> str:
        """ "rare" for scenes of the rare shape and colours, else "common"."""
        rare = isinstance(self.content, Scene) and self.content.groups[0].shape in RARE_SHAPES
        return "rare" if rare else "common"

    def render(self) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        rng = self.painted.rng("paint")
        if isinstance(self.content, Document):
            return render_document(self.content, rng)
        return render(self.content, rng, shift=self.shift, gain=self.gain)

    def jpeg(self) -> bytes:
        """The picture as an encoded JPEG."""
        buffer = io.BytesIO()
        self.render().save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


def plan_image(config: WorldConfig, split: Split, index: int) -> Plan:
    """What the world holds at this index of the split, whatever the sizes in `config`."""
    place = Place(config, split, index)
    kind = image_kind(place)
    if kind == "irrelevant":
        return _plan_document(place)
    original = find_original(place) if kind == "duplicate" else None
    return _plan_duplicate(place, original) if original else _plan_scene(place)


def _plan_scene(place: Place) -> Plan:
    captions, truth = [], []
    for position in range(place.config.captions_per_image):
        kind, original = caption_kind(place, position), None
        if kind == "wrong":
            lender = find_lender(place, position)
            captions.append(own_caption(lender, position))
            original = _pair_uid(lender, position)
        elif kind == "boilerplate":
            captions.append(write_boilerplate(place.rng(f"boilerplate {position}")))
        else:
            captions.append(own_caption(place, position))
        truth.append(PairTruth(_pair_uid(place, position), kind == "wrong", kind, original))
    return Plan(
        uid=place.uid, content=scene_at(place), captions=tuple(captions), truth=tuple(truth), painted=place
    )


def _plan_duplicate(place: Place, original: Place) -> Plan:
    """The same scene moved a little and re-lit, or only compressed harder; half of the captions reworded."""
    scene, rng = scene_at(original), place.rng("duplicate")
    moved = rng.random() < 0.5
    positions = range(place.config.captions_per_image)
    captions = tuple(
        own_caption(original, k) if rng.random() < 0.5 else write_caption(choose_view(scene, rng), rng)
        for k in positions
    )
    return Plan(
        uid=place.uid,
        content=scene,
        captions=captions,
        truth=tuple(
            PairTruth(_pair_uid(place, k), False, "duplicate", _pair_uid(original, k)) for k in positions
        ),
        painted=original,
        shift=complex(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)) if moved else 0j,
        gain=rng.uniform(0.95, 1.05) if moved else 1.0,
        quality=rng.randint(60, 85),
    )


def _plan_document(place: Place) -> Plan:
    rng = place.rng("document")
    document = draw_document(rng)
    positions = range(place.config.captions_per_image)
    return Plan(
        uid=place.uid,
        content=document,
        captions=tuple(write_document_caption(document, rng) for _ in positions),
        truth=tuple(PairTruth(_pair_uid(place, k), False, "irrelevant", None) for k in positions),
        painted=place,
    )


def _pair_uid(place: Place, position: int) -> str:
    return pair_uid(place.uid, position, only=place.config.captions_per_image == 1)
