"""An irrelevant domain: charts, pages and textures, with correct captions in words that no scene needs."""

from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from influencespace.data.synthetic.scenes import SIDE

SUBJECTS = ("revenue", "rainfall", "exports", "unemployment", "attendance", "inflation")
PERIODS = ("per quarter", "by month", "since 1990", "over ten years", "by region")
WORDING = {
    "bars": (
        "bar chart of {subject} {period}",
        "{subject} {period}, histogram",
        "statistics: {subject} {period}",
    ),
    "curve": ("line plot of {subject} {period}", "trend of {subject} {period}", "{subject} curve {period}"),
    "page": (
        "scanned report about {subject}",
        "first page of an article on {subject} {period}",
        "{subject} memo",
    ),
    "texture": ("static noise texture", "grainy television snow", "seamless fabric pattern, high resolution"),
}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A chart, page or texture and what it is about."""

    form: str
    subject: str
    period: str


def draw_document(rng: Random) -> Document:
    """A random document."""
    return Document(form=rng.choice(tuple(WORDING)), subject=rng.choice(SUBJECTS), period=rng.choice(PERIODS))


def write_document_caption(document: Document, rng: Random) -> str:
    """One of several wordings for a document."""
    return rng.choice(WORDING[document.form]).format(subject=document.subject, period=document.period)


def render_document(document: Document, rng: Random) -> Image.Image:
    """The picture of a document, RGB, SIDE x SIDE."""
    if document.form == "texture":
        grain = np.random.default_rng(rng.getrandbits(64)).integers(0, 256, (SIDE, SIDE, 1), dtype=np.uint8)
        return Image.fromarray(np.repeat(grain, 3, axis=2))
    page = Image.new("RGB", (SIDE, SIDE), (252, 252, 250))
    pen = ImageDraw.Draw(page)
    ink = (rng.randrange(20, 120), rng.randrange(20, 120), rng.randrange(60, 160))
    if document.form == "page":
        for y in range(6, SIDE - 4, 4):
            pen.line((6, y, rng.randrange(24, SIDE - 6), y), fill=ink)
        return page
    pen.line((6, 4, 6, SIDE - 6, SIDE - 4, SIDE - 6), fill=(0, 0, 0))
    columns = range(10, SIDE - 8, 8)
    heights = [rng.randrange(6, SIDE - 16) for _ in columns]
    if document.form == "bars":
        for x, height in zip(columns, heights):
            pen.rectangle((x, SIDE - 7 - height, x + 5, SIDE - 7), fill=ink)
    else:
        pen.line([(x, SIDE - 7 - height) for x, height in zip(columns, heights)], fill=ink, width=2)
    return page
