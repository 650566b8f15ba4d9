"""Pictures of the documents, drawn from the benchmarks' JSON as SVG."""

from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, ROW, TOP = 720, 225, 90, 34, 46
LABELS = {
    "curated": "curated (InfluenceSpace)",
    "oracle": "only the right pairs (oracle)",
    "clip_score": "CLIP score, given encoder",
    "proxy_clip_score": "CLIP score, proxy",
    "neg_clip_loss": "negCLIPLoss",
    "everything": "everything",
    "random": "random",
}


def recall_picture(result: dict[str, Any], path: Path) -> None:
    """Mean recall of every method with its interval, best first; drawn only from a whole measurement."""
    rows = sorted(
        (row for row in result["table"] if row.get("part") == "recall"), key=lambda row: -row["mean_recall"]
    )
    low = min(row["interval"][0] for row in rows)
    high = max(row["interval"][1] for row in rows)

    def x(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    height = TOP + ROW * len(rows) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="26" font-size="15" fill="#1b1f24">Mean recall, %, after retraining at equal steps '
        f"({result['seeds'][-1] + 1} seeds, 95 % intervals over images)</text>",
    ]
    for number, row in enumerate(rows):
        y = TOP + ROW * number + ROW // 2
        colour = "#0b6e4f" if row["method"] == "curated" else "#6b7480"
        name = escape(LABELS.get(row["method"], row["method"]))
        start, end = (x(value) for value in row["interval"])
        parts += [
            f'<text x="{LEFT - 14}" y="{y + 5}" text-anchor="end" fill="{colour}" font-size="13">{name}</text>',
            f'<line x1="{start}" x2="{end}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{x(row["mean_recall"])}" cy="{y}" r="6" fill="{colour}"/>',
            f'<text x="{WIDTH - 12}" y="{y + 5}" text-anchor="end" fill="{colour}">{row["mean_recall"]:.1f}</text>',
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


SIDE, MARGIN, GAP = 320, 58, 40
DOTS = {0.0: "#b3261e", 0.5: "#d98e04", 2.0: "#0b6e4f"}
"""Colour of each weight of a stratum."""


def calibration_picture(result: dict[str, Any], path: Path) -> None:
    """Predicted against real change of the target loss, one dot a stratum and weight, a panel for each estimator."""
    rows = [row for row in result["table"] if row["part"] == "points" and row["truth"] == "sampling_weights"]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    values = [value for row in rows for value in (*row["predicted"], *row["real"])]
    low, high = min(values), max(values)
    width = MARGIN + len(names) * SIDE + (len(names) - 1) * GAP + 20
    height = SIDE + 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="24" font-size="15" fill="#1b1f24">Change of the target loss when a stratum is weighted anew</text>',
    ]
    for number, name in enumerate(names):
        panel = [row for row in rows if row["estimator"] == name]
        parts += _panel(name, panel, MARGIN + number * (SIDE + GAP), 48, low, high)
    x = MARGIN
    for weight, colour in DOTS.items():
        parts += [
            f'<circle cx="{x + 5}" cy="{height - 12}" r="4" fill="{colour}"/>',
            f'<text x="{x + 15}" y="{height - 8}" fill="#1b1f24">weight {weight:g}</text>',
        ]
        x += 95
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(name: str, rows: list[dict[str, Any]], left: int, top: int, low: float, high: float) -> list[str]:
    """One estimator's dots on equal axes, with the line on which every prediction is right."""

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * SIDE, 1)

    def y(value: float) -> float:
        return round(top + (high - value) / (high - low) * SIDE, 1)

    bottom = top + SIDE
    parts = [
        f'<rect x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#c4c9d0"/>',
        f'<line x1="{left}" y1="{bottom}" x2="{left + SIDE}" y2="{top}" stroke="#6b7480" stroke-dasharray="4 4"/>',
        f'<text x="{left + 10}" y="{top + 20}" fill="#1b1f24">{escape(name)}</text>',
        f'<text x="{left + SIDE / 2}" y="{bottom + 32}" text-anchor="middle" fill="#6b7480">predicted</text>',
        f'<text x="{left - 8}" y="{top + 40}" text-anchor="end" fill="#6b7480">real</text>',
    ]
    for tick in [k / 20 for k in range(-40, 41) if low <= k / 20 <= high]:
        parts += [
            f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle" fill="#6b7480" font-size="11">{tick:g}</text>',
            f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end" fill="#6b7480" font-size="11">{tick:g}</text>',
        ]
    for row in rows:
        parts += [
            f'<circle cx="{x(a)}" cy="{y(b)}" r="4" fill="{DOTS[row["weight"]]}" fill-opacity="0.75"/>'
            for a, b in zip(row["predicted"], row["real"])
        ]
    return parts


SERIES = {
    "single_pairs": ("#b3261e", "single pairs"),
    "strata": ("#d98e04", "means of strata"),
    "quality_alone": ("#6b7480", "curve along quality"),
    "all_axes": ("#0b6e4f", "all axes (default)"),
}
COLUMNS, PANEL = 4, 150


def ablation_picture(result: dict[str, Any], path: Path) -> None:
    """AUROC against the value of every setting, a panel for each, a line for each way to pool."""
    rows = [row for row in result["table"] if "setting" in row]
    names = list(dict.fromkeys(row["setting"] for row in rows))
    found = [row[series] for row in rows for series in SERIES]
    low, high = min(found), max(found)
    height = 70 + -(-len(names) // COLUMNS) * (PANEL + 70)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * (PANEL + 50) + 30} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="22" font-size="15" fill="#1b1f24">AUROC for wrong captions, one setting changed at a time</text>',
    ]
    for number, (colour, label) in enumerate(SERIES.values()):
        parts.append(f'<text x="{12 + 150 * number}" y="44" fill="{colour}">{label}</text>')
    for number, name in enumerate(names):
        left = 45 + number % COLUMNS * (PANEL + 50)
        top = 70 + number // COLUMNS * (PANEL + 70)
        parts += _lines(name, [row for row in rows if row["setting"] == name], left, top, low, high)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _lines(name: str, rows: list[dict[str, Any]], left: int, top: int, low: float, high: float) -> list[str]:
    """One setting's panel: its values side by side."""
    parts = [
        f'<rect x="{left}" y="{top}" width="{PANEL}" height="{PANEL}" fill="none" stroke="#c4c9d0"/>',
        f'<text x="{left}" y="{top - 6}" fill="#1b1f24">{escape(name.replace("_", " "))}</text>',
        f'<text x="{left - 5}" y="{top + 10}" text-anchor="end" fill="#6b7480" font-size="10">{high:.2f}</text>',
        f'<text x="{left - 5}" y="{top + PANEL}" text-anchor="end" fill="#6b7480" font-size="10">{low:.2f}</text>',
    ]
    places = [left + PANEL * (i + 0.5) / len(rows) for i in range(len(rows))]
    for x, row in zip(places, rows):
        label = escape(str(row["value"]).replace("_", " ").split(" ")[0])
        parts.append(
            f'<text x="{x:.1f}" y="{top + PANEL + 14}" text-anchor="middle" fill="#6b7480" font-size="10">{label}</text>'
        )
    for series, (colour, _) in SERIES.items():
        heights = [top + PANEL * (high - row[series]) / (high - low) for row in rows]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(places, heights))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in zip(places, heights)
        ]
    return parts
