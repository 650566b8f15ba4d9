"""The renderer: writes the tables and figures of README and docs from the benchmarks' JSON.

A page says where a table goes: `<!-- table: quality -->` (all promises), `<!-- table: quality recall -->` (the rows of a part),
`<!-- table: quality recall steps -->` (those of its rows that have a column), `<!-- pivot: quality method steps mean_recall -->`
(one value by two columns), `<!-- short: quality method world mean_recall -->` (the same to one decimal), or
`<!-- claim: quality AUROC of the pooled score -->` (what was measured of the one promise whose name begins so, within a line);
each up to `<!-- end -->`. Nothing is shown of a quick run, nor of what is withdrawn.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from matplotlib.figure import Figure  # noqa: E402

from benchmarks import figures  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
MARK = re.compile(r"(<!-- (table|pivot|short): ([\w -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
CLAIM = re.compile(r"(<!-- claim: (\w+) (.+?) -->).*?(<!-- end -->)")
FIGURES: tuple[tuple[Callable[[dict[str, Any]], Figure | None], str, str], ...] = (
    (figures.recall, "quality", "recall.svg"),
    (figures.calibration, "calibration", "calibration.svg"),
    (figures.ablations, "ablations", "ablations.svg"),
)


def read(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """A benchmark's result; raises SystemExit where it is missing or of a quick run."""
    path = results / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path} is missing: run benchmarks/run.py with the benchmark's name first")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if result["quick"]:
        sys.exit(f"{path} is of a quick run; a document shows full runs only")
    return result


def rendered(text: str, results: Path = RESULTS) -> str:
    """A page with every marked table made anew."""

    def replace(match: re.Match[str]) -> str:
        name, *columns = match[3].split()
        make: Callable[..., str] = part_table if columns else targets_table
        if match[2] != "table":
            make = partial(pivot_table, digits=1 if match[2] == "short" else 3)
        return match[1] + make(read(name, results), *columns) + match[4]

    def claimed(match: re.Match[str]) -> str:
        return match[1] + claim(read(match[2], results), match[3]) + match[4]

    return CLAIM.sub(claimed, MARK.sub(replace, text))


def claim(result: dict[str, Any], name: str) -> str:
    """What was measured of the promise whose name begins so; raises SystemExit where there is not exactly one."""
    outcome = [target for target in result["targets"] if target["name"].startswith(name)]
    if len(outcome) != 1:
        sys.exit(f"{len(outcome)} promises of {result['benchmark']} begin with {name!r}: a claim needs one")
    return f"**{outcome[0]['measured']:.3g}** (wanted: {outcome[0]['target']}; {outcome[0]['status']})"


def targets_table(result: dict[str, Any]) -> str:
    """All promises of a benchmark."""
    rows = [("target", "wanted", "measured", "status")]
    for target in result["targets"]:
        measured = cell(target["measured"])
        if target["interval"] is not None:
            measured += " " + cell(target["interval"])
        rows.append((target["name"], target["target"], measured, target["status"]))
    every = {*result["commits"], *result["incomplete"]}
    return (markdown(rows) if result["targets"] else "") + origin(result, every)


def part_table(result: dict[str, Any], part: str, having: str | None = None) -> str:
    """The rows of a part, or those of them that have a column."""
    lines = [
        {key: value for key, value in row.items() if key != "part"}
        for row in result["table"]
        if row["part"] == part and (having is None or having in row)
    ]
    if not lines:
        return origin(result, {part}) if part in result["commits"] else f"(no rows of part {part})\n"
    names = sorted(
        lines[0], key=lambda name: not isinstance(lines[0][name], str)
    )  # what a row is about first
    head = tuple(name.replace("_", " ") for name in names)
    return markdown([head, *(tuple(cell(line.get(name)) for name in names) for line in lines)]) + origin(
        result, {part}
    )


def pivot_table(result: dict[str, Any], rows: str, columns: str, value: str, *, digits: int = 3) -> str:
    """One value of all rows that have it, by two of their columns."""
    lines = [row for row in result["table"] if {rows, columns, value} <= row.keys()]
    if not lines:
        return origin(result | {"table": [], "targets": []}, set(result["withdrawn"]))
    names = list(dict.fromkeys(line[columns] for line in lines))
    table: dict[str, dict[str, Any]] = {}
    for line in lines:
        table.setdefault(str(line[rows]), {})[line[columns]] = line[value]
    body = [(name, *(cell(values.get(column), digits) for column in names)) for name, values in table.items()]
    head = (rows.replace("_", " "), *map(str, names))
    return markdown([head, *body]) + origin(result, {line["part"] for line in lines})


def cell(value: Any, digits: int = 3) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    if isinstance(value, list):
        return "[" + ", ".join(cell(item, digits) for item in value) + "]"
    return "-" if value is None else str(value)


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"


def origin(result: dict[str, Any], parts: set[str]) -> str:
    """Of some parts: what is withdrawn or missing, and which commit and code measured the rest."""
    return "".join(f"\n{line}\n" for line in _origin(result, parts))


def _origin(result: dict[str, Any], parts: set[str]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for part, reason in result["withdrawn"].items():
        if part in parts:
            reasons.setdefault(reason, []).append(part)
    yield from (f"Withdrawn ({', '.join(of)}): {reason}." for reason, of in reasons.items())
    if missing := [part for part in result["incomplete"] if part in parts]:
        yield f"Not all was measured yet: {', '.join(missing)}."
    shown = {line["part"] for line in (*result["table"], *result["targets"])} & parts
    versions: dict[str, list[str]] = {}
    for part in (part for part in result["commits"] if part in shown):
        code = result["code"].get(part, "")[:10]
        versions.setdefault(result["commits"][part][:10] + (f", code {code}" if code else ""), []).append(
            part
        )
    if versions:
        measured = "; ".join(f"{', '.join(of)} at commit {version}" for version, of in versions.items())
        yield f"Measured on {result['machine']['cpus']} CPU cores, seeds {result['seeds']}; {measured}."


def main() -> None:
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page}")
    for draw, name, file in FIGURES:
        figure, path = draw(read(name)), DOCS / file
        if figure is None:
            path.unlink(missing_ok=True)
            print(f"not drawn: {path}, its figures are withdrawn or not measured")
        else:
            figures.save(figure, path)
            print(f"written: {path}")


if __name__ == "__main__":
    main()
