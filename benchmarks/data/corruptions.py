"""Puts what is wrong with web data into a pool of real pairs, and remembers which pairs are wrong."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.data.shuffle import shuffle_captions
from benchmarks.data.sources import BOILERPLATE, PLACEHOLDERS, Sources
from influencespace.core.arrays import BoolArray, IntArray

CLEAN, COPY = "", "copy"


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A pool while it is corrupted: the picture and the caption of each pair, and what is wrong with it."""

    image: IntArray  # (n,) row of the sources' images
    text: IntArray  # (n,) row of the sources' captions
    kind: NDArray[np.str_]  # (n,) "" for a good pair, "copy" for one that the pool holds, else what was done

    @classmethod
    def of(cls, sources: Sources, captions: int, chosen: BoolArray) -> "Draft":
        """Chosen pairs of the pool (m,) as they are, with some captions of each picture."""
        number = np.array([int(str(uid).rsplit("#", 1)[1]) for uid in sources.pool.pairs.column("uid")])
        rows = np.flatnonzero(chosen & (number < captions))
        kind = np.full(len(rows), CLEAN, "U16")
        return cls(image=sources.pool.image[rows], text=sources.pool.text[rows], kind=kind)

    def __len__(self) -> int:
        return len(self.image)

    def good(self, share: float, rng: np.random.Generator) -> IntArray:
        """Random rows of good pairs, `share` of all."""
        rows = np.flatnonzero(self.kind == CLEAN)
        return rng.choice(rows, min(len(rows), round(share * len(self))), replace=False)

    def changed(self, rows: IntArray, kind: str, **columns: IntArray) -> "Draft":
        """Other pictures or captions in some rows, which are of this kind now."""

        def put(name: str, column: Any) -> Any:
            values = getattr(self, name).copy()
            values[rows] = column
            return values

        new: dict[str, Any] = {**columns, "kind": kind}
        return replace(self, **{name: put(name, column) for name, column in new.items()})

    def with_more(self, image: IntArray, text: IntArray, kind: str) -> "Draft":
        return Draft(
            image=np.concatenate([self.image, image]),
            text=np.concatenate([self.text, text]),
            kind=np.concatenate([self.kind, np.full(len(image), kind, dtype="U16")]),
        )


Corruption = Callable[[Draft, float, np.random.Generator, Sources], Draft]


def wrong(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Captions moved between pictures."""
    rows = draft.good(share, rng)
    seed = int(rng.integers(2**31))
    moved, _ = shuffle_captions([str(t) for t in draft.text[rows]], draft.image[rows].tolist(), 1.0, seed)
    return draft.changed(rows, "wrong", text=np.array([int(text) for text in moved]))


def hard_wrong(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """The caption of one of the ten pictures that look most alike."""
    rows = draft.good(share, rng)
    shown = np.unique(draft.image[draft.image < sources.count])
    images = torch.from_numpy(sources.pool.images[shown])
    alike = [
        (part @ images.T).topk(min(11, len(shown)), 1).indices[:, 1:] for part in torch.split(images, 1024)
    ]
    near = shown[torch.cat(alike).numpy()][np.searchsorted(shown, draft.image[rows])]
    by_image = {int(image): np.flatnonzero(draft.image == image) for image in shown}
    texts = [draft.text[rng.choice(by_image[int(rng.choice(ten))])] for ten in near]
    return draft.changed(rows, "hard_wrong", text=np.array(texts))


def boilerplate(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Captions that stand under any picture."""
    rows = draft.good(share, rng)
    text = sources.text("boilerplate", rng.integers(len(BOILERPLATE), size=len(rows)))
    return draft.changed(rows, "boilerplate", text=text)


def irrelevant(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Pairs of another domain added until they are `share` of the pool."""
    scenes = sources.scenes
    there = len(scenes.pairs)
    extra = rng.choice(there, min(there, round(share / (1 - share) * len(draft))), replace=False)
    image, text = sources.picture("scenes", scenes.image[extra]), sources.text("scenes", scenes.text[extra])
    return draft.with_more(image, text, "irrelevant")


def duplicates(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """A tenth of the good pairs again and again, as they are or compressed anew, until copies are `share` of the pool."""
    originals = draft.good(0.1, rng)
    copies = originals[rng.integers(len(originals), size=round(share / (1 - share) * len(draft)))]
    image = draft.image[copies]
    anew = (rng.random(len(copies)) < 0.5) & (image < sources.count)
    compressed = sources.picture("recompressed", image % sources.count)
    return draft.with_more(np.where(anew, compressed, image), draft.text[copies], COPY)


def placeholders(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Pages' few signs of a missing picture, each with many captions of what was there."""
    rows = draft.good(share, rng)
    image = sources.picture("placeholders", rng.integers(len(PLACEHOLDERS), size=len(rows)))
    return draft.changed(rows, "placeholder", image=image)


def other_pictures(kind: str) -> Corruption:
    """All good pairs of `share` of the pictures, altered."""

    def corrupt(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
        spoiled = rng.random(sources.count) < share
        rows = np.flatnonzero((draft.kind == CLEAN) & (draft.image < sources.count))
        rows = rows[spoiled[draft.image[rows]]]
        return draft.changed(rows, kind, image=sources.picture(kind, draft.image[rows]))

    return corrupt


def other_captions(kind: str) -> Corruption:
    """Captions altered, each in its way."""

    def corrupt(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
        rows = draft.good(share, rng)
        return draft.changed(rows, kind, text=sources.text(kind, draft.text[rows]))

    return corrupt


def web(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """All of it together; `share` scales every part."""
    for name, part in WEB.items():
        draft = CORRUPTIONS[name](draft, share * part, rng, sources)
    return draft


WEB = {
    "wrong": 0.15,
    "boilerplate": 0.07,
    "blurred": 0.07,
    "hard wrong": 0.05,
    "irrelevant": 0.1,
    "duplicates": 0.1,
}
UNFORESEEN: dict[str, Corruption] = {
    "file names": other_captions("file_name"),
    "cut": other_captions("cut"),
    "garbled": other_captions("garbled"),
    "doubled": other_captions("doubled"),
    "placeholders": placeholders,
    "covered": other_pictures("covered"),
    "upside down": other_pictures("upside_down"),
}
"""What nothing was developed on. (After some were seen the rule's margin was changed, for what hard wrong captions and
boilerplate said of it. Of names of files two were among the captions of boilerplate.)"""
CORRUPTIONS: dict[str, Corruption] = {
    "clean": lambda draft, share, rng, sources: draft,
    "wrong": wrong,
    "hard wrong": hard_wrong,
    "boilerplate": boilerplate,
    "irrelevant": irrelevant,
    "blurred": other_pictures("blurred"),
    "duplicates": duplicates,
    "web": web,
    **UNFORESEEN,
}
