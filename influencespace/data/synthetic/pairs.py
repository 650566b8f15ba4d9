"""The images of the world with their captions, and the truth about them."""

import io
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
Planted = tuple[str, Kind, str | None]
"""A caption, its kind, and the pair that it or its image comes from."""


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
    positions = range(config.captions_per_image)
    kind = image_kind(place)
    if kind == "irrelevant":
        rng = place.rng("document")
        document = draw_document(rng)
        captions = [write_document_caption(document, rng) for _ in positions]
        return _plan(place, document, [(caption, "irrelevant", None) for caption in captions])
    if kind == "duplicate" and (original := find_original(place)):
        return _plan_duplicate(place, original)
    return _plan(place, scene_at(place), [_scene_caption(place, k) for k in positions])


def _plan(place: Place, content: Scene | Document, pairs: list[Planted], **look: Any) -> Plan:
    truth = (
        PairTruth(_pair_uid(place, k), kind == "wrong", kind, original)
        for k, (_, kind, original) in enumerate(pairs)
    )
    captions = tuple(caption for caption, _, _ in pairs)
    look = {"painted": place} | look
    return Plan(uid=place.uid, content=content, captions=captions, truth=tuple(truth), **look)


def _scene_caption(place: Place, position: int) -> Planted:
    kind = caption_kind(place, position)
    if kind == "wrong":
        lender = find_lender(place, position)
        return own_caption(lender, position), kind, _pair_uid(lender, position)
    if kind == "boilerplate":
        return write_boilerplate(place.rng(f"boilerplate {position}")), kind, None
    return own_caption(place, position), kind, None


def _plan_duplicate(place: Place, original: Place) -> Plan:
    """The same scene slightly moved and brighter or darker, or only compressed more; half of the captions reworded."""
    scene, rng = scene_at(original), place.rng("duplicate")
    moved = rng.random() < 0.5
    pairs: list[Planted] = []
    for k in range(place.config.captions_per_image):
        own = rng.random() < 0.5
        caption = own_caption(original, k) if own else write_caption(choose_view(scene, rng), rng)
        pairs.append((caption, "duplicate", _pair_uid(original, k)))
    shift = complex(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)) if moved else 0j
    gain = rng.uniform(0.95, 1.05) if moved else 1.0
    return _plan(place, scene, pairs, painted=original, shift=shift, gain=gain, quality=rng.randint(60, 85))


def _pair_uid(place: Place, position: int) -> str:
    return pair_uid(place.uid, position, only=place.config.captions_per_image == 1)
