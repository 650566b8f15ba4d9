"""Pictures of the documents, drawn from the benchmarks' JSON as SVG."""

from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, ROW, TOP = 720, 225, 90, 34, 46
LABELS = {
    "curated": "curated (InfluenceSpace)",
    "oracle": "only the right pairs (oracle)",
    "clip_score": "CLIP score, given encoder",
    "student_clip_score": "CLIP score, student",
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
