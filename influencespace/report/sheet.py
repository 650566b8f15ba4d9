"""A contact sheet: pairs with their pictures and captions on one page that needs no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from influencespace.report.page import write_page
from influencespace.report.pictures import find_pairs, picture, shortened


@dataclass(frozen=True, kw_only=True)
class Card:
    """One pair; `picture` is a data URI, None where there is none to show; `facts` are lines of small print."""

    caption: str
    picture: str | None
    facts: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cards below a heading and sentences."""

    cards: Sequence[Card]
    heading: str = ""
    sentences: Sequence[str] = ()


def cards(artifact: Path, wanted: Sequence[tuple[str, str]]) -> list[Card]:
    """Cards of (uid, a line of facts), in their order; what the embedding artifact lacks is left out."""
    rows = find_pairs(artifact, {uid for uid, _ in wanted})
    return [
        Card(caption=shortened(rows[uid]["caption"]), picture=picture(rows[uid]), facts=(facts, uid))
        for uid, facts in wanted
        if uid in rows
    ]


def write_sheet(path: Path, title: str, sentences: Sequence[str], sections: Sequence[Section]) -> None:
    """Write a page of sections below a title and sentences that say what they are."""
    write_page(path, "sheet", {"title": title, "sentences": sentences, "sections": sections})
