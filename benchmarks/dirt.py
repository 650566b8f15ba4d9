"""Puts the kinds of dirt that web data has into a pool of real pairs, and remembers what is dirt."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sources import BOILERPLATE, PLACEHOLDERS, Sources

from benchmarks.data.shuffle import shuffle_captions

CLEAN, COPY = "", "copy"


@dataclass(frozen=True)
class Draft:
    """A pool while dirt is put into it: what each pair shows and says, and what is wrong with it."""

    image: np.ndarray  # (n,) row of the sources' images
    text: np.ndarray  # (n,) row of the sources' captions
    kind: (
        np.ndarray
    )  # (n,) "" for a good pair, else the kind of dirt; "copy" for one that the pool already holds

    @classmethod
    def of(cls, sources: Sources, captions: int) -> "Draft":
        """The pool as it is, with some captions of each picture."""
        number = np.array([int(str(uid).rsplit("#", 1)[1]) for uid in sources.pool.column("uid")])
        rows = np.flatnonzero(number < captions)
        image, text = sources.pool.image[rows], sources.pool.text[rows]
        return cls(image=image, text=text, kind=np.full(len(rows), CLEAN, "U16"))

    def __len__(self) -> int:
        return len(self.image)

    def good(self, share: float, rng: np.random.Generator) -> np.ndarray:
        """Random rows of good pairs, `share` of all."""
        rows = np.flatnonzero(self.kind == CLEAN)
        return rng.choice(rows, min(len(rows), round(share * len(self))), replace=False)

    def changed(self, rows: np.ndarray, kind: str, **columns: np.ndarray) -> "Draft":
        values = {name: getattr(self, name).copy() for name in ("image", "text", "kind")}
        for name, column in columns.items():
            values[name][rows] = column
        values["kind"][rows] = kind
        return Draft(**values)

    def with_more(self, image: np.ndarray, text: np.ndarray, kind: str) -> "Draft":
        return Draft(
            image=np.concatenate([self.image, image]),
            text=np.concatenate([self.text, text]),
            kind=np.concatenate([self.kind, np.full(len(image), kind, dtype="U16")]),
        )


Dirt = Callable[[Draft, float, np.random.Generator, Sources], Draft]


def clean(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return draft


def wrong(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Captions moved between pictures."""
    rows = draft.good(share, rng)
    seed = int(rng.integers(2**31))
    moved, _ = shuffle_captions([str(t) for t in draft.text[rows]], draft.image[rows].tolist(), 1.0, seed)
    return draft.changed(rows, "wrong", text=np.array([int(text) for text in moved]))


def hard_wrong(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """The caption of one of the ten pictures that look most alike."""
    rows = draft.good(share, rng)
    base = torch.from_numpy(np.asarray(sources.pool.table.images))
    alike = torch.cat(
        [(part @ base.T).topk(11, 1).indices[:, 1:] for part in torch.split(base, 1024)]
    ).numpy()
    by_image = [np.flatnonzero(draft.image == i) for i in range(sources.count)]
    texts = []
    for row in rows:
        near = [i for i in alike[draft.image[row]] if len(by_image[i])]
        texts.append(draft.text[rng.choice(by_image[rng.choice(near)])])
    return draft.changed(rows, "hard_wrong", text=np.array(texts))


def boilerplate(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    rows = draft.good(share, rng)
    text = sources.text("boilerplate", rng.integers(len(BOILERPLATE), size=len(rows)))
    return draft.changed(rows, "boilerplate", text=text)


def irrelevant(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Pairs of another domain added until they are `share` of the pool."""
    scenes = sources.scenes
    extra = rng.choice(len(scenes), min(len(scenes), round(share / (1 - share) * len(draft))), replace=False)
    image, text = sources.picture("scenes", scenes.image[extra]), sources.text("scenes", scenes.text[extra])
    return draft.with_more(image, text, "irrelevant")


def other_pictures(
    draft: Draft, share: float, rng: np.random.Generator, sources: Sources, kind: str
) -> Draft:
    """All good pairs of `share` of the pictures, altered."""
    spoiled = rng.random(sources.count) < share
    rows = np.flatnonzero((draft.kind == CLEAN) & (draft.image < sources.count))
    rows = rows[spoiled[draft.image[rows]]]
    return draft.changed(rows, kind, image=sources.picture(kind, draft.image[rows]))


def blurred(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return other_pictures(draft, share, rng, sources, "blurred")


def duplicates(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """A tenth of the good pairs again and again, as they are or compressed anew, until copies are `share` of the pool."""
    originals = draft.good(0.1, rng)
    copies = originals[rng.integers(len(originals), size=round(share / (1 - share) * len(draft)))]
    image = draft.image[copies]
    anew = (rng.random(len(copies)) < 0.5) & (image < sources.count)
    compressed = sources.picture("recompressed", image % sources.count)
    return draft.with_more(np.where(anew, compressed, image), draft.text[copies], COPY)


def web(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """All of it together; `share` scales every part."""
    parts = (
        (wrong, 0.15),
        (boilerplate, 0.07),
        (blurred, 0.07),
        (hard_wrong, 0.05),
        (irrelevant, 0.1),
        (duplicates, 0.1),
    )
    for dirt, part in parts:
        draft = dirt(draft, share * part, rng, sources)
    return draft


def placeholders(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    """Pages' few signs of a missing picture, each with many captions of what was there."""
    rows = draft.good(share, rng)
    image = sources.picture("placeholders", rng.integers(len(PLACEHOLDERS), size=len(rows)))
    return draft.changed(rows, "placeholder", image=image)


def covered(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return other_pictures(draft, share, rng, sources, "covered")


def upside_down(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return other_pictures(draft, share, rng, sources, "upside_down")


def other_captions(
    draft: Draft, share: float, rng: np.random.Generator, sources: Sources, kind: str
) -> Draft:
    """Captions altered, each in its way."""
    rows = draft.good(share, rng)
    return draft.changed(rows, kind, text=sources.text(kind, draft.text[rows]))


def cut(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return other_captions(draft, share, rng, sources, "cut")


def garbled(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return other_captions(draft, share, rng, sources, "garbled")


def doubled(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return other_captions(draft, share, rng, sources, "doubled")


def file_names(draft: Draft, share: float, rng: np.random.Generator, sources: Sources) -> Draft:
    return other_captions(draft, share, rng, sources, "file_name")
