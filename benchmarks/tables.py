"""Writes the tables and pictures of the documents from the benchmarks' JSON; refuses figures of a quick run."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from common import ROOT
from pictures import calibration_picture, recall_picture

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
PICTURES = (
    (recall_picture, "quality", ROOT / "docs" / "recall.svg"),
    (calibration_picture, "calibration", ROOT / "docs" / "calibration.svg"),
)
MARK = re.compile(r"(<!-- table: (?P<name>[\w-]+)(?: (?P<part>[\w-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


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


def part_table(result: dict[str, Any], part: str) -> str:
    lines = [
        {k: v for k, v in row.items() if k != "part"} for row in result["table"] if row.get("part") == part
    ]
    if not lines:
        return f"(no rows of part {part})\n"
    names = sorted(
        lines[0], key=lambda name: not isinstance(lines[0][name], str)
    )  # what a row is about first
    rows = [tuple(name.replace("_", " ") for name in names)]
    rows += [tuple(cell(line.get(name)) for name in names) for line in lines]
    return markdown(rows)


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
    table = part_table(result, match["part"]) if match["part"] else targets_table(result)
    missing = [part for part in result["incomplete"] if match["part"] in (None, part)]
    if missing:
        table += f"\nNot all was measured yet: {', '.join(missing)}.\n"
    cores = result["machine"]["cpus"]
    commits = {part: sha[:10] for part, sha in result["commits"].items() if match["part"] in (None, part)}
    measured = ", ".join(
        f"{part} at commit {sha}" if part else f"commit {sha}" for part, sha in commits.items()
    )
    origin = f"\nMeasured on {cores} CPU cores, seeds {result['seeds']}; {measured}.\n"
    return match[1] + table + origin + match[4]


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(MARK.sub(render, text), encoding="utf-8")
        print(f"written: {document}")
    for draw, name, path in PICTURES:
        draw(read(name), path)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
