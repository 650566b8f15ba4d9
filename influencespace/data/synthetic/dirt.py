"""Which dirt is planted where: the kind of each image and caption, and from where they are taken.

Nothing here looks at the size of a split, so a larger one begins with the pairs of a smaller one, and nothing
needs more memory for more pairs.
"""

from itertools import count
from typing import Literal

from influencespace.data.synthetic.captions import agrees, choose_view, write_caption
from influencespace.data.synthetic.config import DIRTY_SPLITS, Place
from influencespace.data.synthetic.scenes import Scene, draw_scene

ORIGINAL_DRAWS = 200  # at least one place in twenty is clean, so all of them fail with chance 0.95^200 = 4e-5

ImageKind = Literal["scene", "duplicate", "irrelevant"]
CaptionKind = Literal["clean", "wrong", "boilerplate"]


def scene_at(place: Place) -> Scene:
    """The scene that belongs here, shown unless the image is a duplicate or irrelevant."""
    rng, config = place.rng("scene"), place.config
    share = config.rare_group if place.split in DIRTY_SPLITS else config.rare_group_clean
    return draw_scene(rng, rare=rng.random() < share)


def view_at(place: Place, position: int) -> Scene:
    """What the caption at `position` mentions of the scene."""
    return choose_view(scene_at(place), place.rng(f"view {position}"))


def own_caption(place: Place, position: int) -> str:
    """The right caption at `position` of the scene."""
    return write_caption(view_at(place, position), place.rng(f"words {position}"))


def image_kind(place: Place) -> ImageKind:
    """What the image here shows."""
    if place.split not in DIRTY_SPLITS:
        return "scene"
    chance, config = place.rng("kind").random(), place.config
    if chance < config.near_duplicates:
        return "duplicate"
    return "irrelevant" if chance < config.near_duplicates + config.irrelevant else "scene"


def caption_kind(place: Place, position: int) -> CaptionKind:
    """The dirt of one caption of a "scene": its rate among the pairs of *all* images is as configured."""
    if place.split not in DIRTY_SPLITS:
        return "clean"
    config = place.config
    scenes = 1.0 - config.near_duplicates - config.irrelevant
    chance = scenes * place.rng(f"dirt {position}").random()
    if chance < config.wrong_captions:
        return "wrong"
    return "boilerplate" if chance < config.wrong_captions + config.boilerplate else "clean"


def find_lender(place: Place, position: int) -> Place:
    """Where a wrong caption comes from: the next wrong pair whose caption is false of the scene here.

    So the captions of wrong pairs are permuted, except for the rare caption that would be true and is skipped.
    The last wrong pairs of a split borrow from indices just beyond its end.
    """
    scene = scene_at(place)
    for lender in map(place.at, count(place.index + 1)):
        wrong = image_kind(lender) == "scene" and caption_kind(lender, position) == "wrong"
        if wrong and not agrees(view_at(lender, position), scene):
            return lender
    raise AssertionError("there is always a next pair")


def find_original(place: Place) -> Place | None:
    """What a near duplicate repeats: an earlier scene with correct captions; None at the very beginning."""
    rng = place.rng("original")
    for _ in range(ORIGINAL_DRAWS if place.index else 0):
        candidate = place.at(rng.randrange(place.index))
        positions = range(place.config.captions_per_image)
        if image_kind(candidate) == "scene" and all(caption_kind(candidate, k) == "clean" for k in positions):
            return candidate
    return None
