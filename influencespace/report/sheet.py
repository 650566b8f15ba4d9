"""A contact sheet: ranked pairs with their pictures and captions on one page that needs no network."""

from collections.abc import Sequence
from pathlib import Path

from influencespace.data.artifacts import atomic_path
from influencespace.report.page import environment
from influencespace.report.pictures import find_pairs, picture, shortened


def write_sheet(
    path: Path, run: Path, title: str, told: Sequence[str], ranked: Sequence[tuple[str, float]]
) -> None:
    """Write a page of the pairs `ranked` (uid, score) of a run, in their order, below sentences that tell what they are."""
    pairs = find_pairs(run / "embed" / "pool" / "pairs.parquet", {uid for uid, _ in ranked})
    shown = [
        {
            "uid": uid,
            "score": score,
            "caption": shortened(pairs[uid]["caption"]),
            "picture": picture(pairs[uid]),
        }
        for uid, score in ranked
        if uid in pairs
    ]
    html = environment().get_template("sheet.html.j2").render(title=title, told=told, pairs=shown)
    with atomic_path(path) as aside:
        aside.write_text(html, encoding="utf-8")
