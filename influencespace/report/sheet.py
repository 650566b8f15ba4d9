"""A contact sheet: pairs with their pictures and captions on one page that needs no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from influencespace.data.artifacts import atomic_path
from influencespace.report.page import environment
from influencespace.report.pictures import find_pairs, picture, shortened


@dataclass(frozen=True, kw_only=True)
class Card:
    """One pair; `picture` is a data URI, None where there is none to show."""

    caption: str
    picture: str | None
    facts: Sequence[str]
    """Lines of small print."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cards below a heading and sentences."""

    cards: Sequence[Card]
    heading: str = ""
    told: Sequence[str] = ()


def cards(pairs: Path, wanted: Sequence[tuple[str, str]]) -> list[Card]:
    """Cards of pairs by uid, each with a line of facts, in their order; `pairs` is a pairs.parquet, what it lacks is left out."""
    found = find_pairs(pairs, {uid for uid, _ in wanted})
    return [
        Card(caption=shortened(found[uid]["caption"]), picture=picture(found[uid]), facts=(facts, uid))
        for uid, facts in wanted
        if uid in found
    ]


def write_sheet(path: Path, title: str, told: Sequence[str], sections: Sequence[Section]) -> None:
    """Write a page of sections below a title and sentences that tell what they are."""
    html = environment().get_template("sheet.html.j2").render(title=title, told=told, sections=sections)
    with atomic_path(path) as aside:
        aside.write_text(html, encoding="utf-8")
