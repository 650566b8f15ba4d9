"""Writes the tables and pictures of the documents from the benchmarks' JSON; refuses figures of a quick run."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from common import ROOT
from pictures import ablation_picture, calibration_picture, recall_picture

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
PICTURES = (
    (recall_picture, "quality", ROOT / "docs" / "recall.svg"),
    (calibration_picture, "calibration", ROOT / "docs" / "calibration.svg"),
    (ablation_picture, "ablations", ROOT / "docs" / "ablations.svg"),
)
# a table of all targets, of the rows of a part, or of those of its rows that have a column
MARK = re.compile(
    r"(<!-- table: (?P<name>[\w-]+)(?: (?P<part>[\w-]+))?(?: (?P<having>\w+))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
# one value by two columns: <!-- pivot: scenarios method scenario mean_recall -->
PIVOT = re.compile(
    r"(<!-- pivot: (?P<name>[\w-]+) (?P<rows>\w+) (?P<columns>\w+) (?P<value>\w+) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


def read(name: str) -> dict[str, Any]:
    """A benchmark's result; raises SystemExit where it is missing or quick."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path} is missing: run python benchmarks/{name}.py first")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if result["quick"]:
        sys.exit(f"{path} is of a quick run; a document shows full runs only")
    return result


def targets_table(result: dict[str, Any]) -> str:
    rows = [("target", "wanted", "measured", "status")]
    for target in result["targets"]:
        measured = "-" if target["measured"] is None else f"{target['measured']:.3f}"
        if target["interval"] is not None:
            measured += " [{:.3f}, {:.3f}]".format(*target["interval"])
        rows.append((target["name"], target["target"], measured, target["status"]))
    return markdown(rows)


def part_table(result: dict[str, Any], part: str, having: str | None) -> str:
    lines = [
        {k: v for k, v in row.items() if k != "part"}
        for row in result["table"]
        if row.get("part") == part and (having is None or having in row)
    ]
    if not lines:
        return f"(no rows of part {part})\n"
    names = sorted(
        lines[0], key=lambda name: not isinstance(lines[0][name], str)
    )  # what a row is about first
    rows = [tuple(name.replace("_", " ") for name in names)]
    rows += [tuple(cell(line.get(name)) for name in names) for line in lines]
    return markdown(rows)


def pivot_table(lines: list[dict[str, Any]], rows: str, columns: str, value: str) -> str:
    names = list(dict.fromkeys(line[columns] for line in lines))
    table: dict[str, dict[str, Any]] = {}
    for line in lines:
        table.setdefault(str(line[rows]), {})[line[columns]] = line[value]
    body = [(name, *(cell(values.get(column)) for column in names)) for name, values in table.items()]
    return markdown([(rows.replace("_", " "), *map(str, names)), *body])


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return "[" + ", ".join(cell(item) for item in value) + "]"
    return "-" if value is None else str(value)


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"


def render(match: re.Match[str]) -> str:
    result = read(match["name"])
    part = match["part"]
    table = part_table(result, part, match["having"]) if part else targets_table(result)
    return match[1] + table + origin(result, {part} if part else None) + match[5]


def render_pivot(match: re.Match[str]) -> str:
    result = read(match["name"])
    cells = (match["rows"], match["columns"], match["value"])
    lines = [row for row in result["table"] if set(cells) <= row.keys()]
    return match[1] + pivot_table(lines, *cells) + origin(result, {row["part"] for row in lines}) + match[6]


def origin(result: dict[str, Any], only: set[str] | None) -> str:
    """What is missing, and where the figures of some parts, or of all, come from."""
    missing = [part for part in result["incomplete"] if only is None or part in only]
    text = f"\nNot all was measured yet: {', '.join(missing)}.\n" if missing else ""
    commits: dict[str, list[str]] = {}
    for part, sha in result["commits"].items():
        if only is None or part in only:
            commits.setdefault(sha[:10], []).append(part)
    measured = "; ".join(f"{', '.join(parts)} at commit {sha}" for sha, parts in commits.items())
    cores = result["machine"]["cpus"]
    return text + f"\nMeasured on {cores} CPU cores, seeds {result['seeds']}; {measured}.\n"


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(PIVOT.sub(render_pivot, MARK.sub(render, text)), encoding="utf-8")
        print(f"written: {document}")
    for draw, name, path in PICTURES:
        draw(read(name), path)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
