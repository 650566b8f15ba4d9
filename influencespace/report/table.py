"""The table of methods and the sentences above it, from `summary.json`: for terminals, documents and the page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influencespace.engine.progress import duration
from influencespace.errors import InputError

Summary = Mapping[str, Any]
Verdict = Literal["ahead", "behind", "unclear"]

LABELS = {
    "curated": "Curated",
    "dynamic": "Dynamic",
    "everything": "Everything",
    "random": "Random",
    "clip_score": "CLIP score",
    "proxy_clip_score": "Proxy CLIP",
    "neg_clip_loss": "negCLIPLoss",
}
DIRECTIONS = {"image_to_text": "Image to text", "text_to_image": "Text to image"}
CUTS = ("1", "5", "10")
MISSING = "–"

# The columns of recall@1, 5 and 10 both ways need this many characters.
WIDE_TERMINAL = 145


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One line of the table, as text; `difference` is curated minus this method, in points of mean recall."""

    name: str
    label: str
    mean_recall: str
    interval: str
    difference: str
    difference_interval: str
    verdict: Verdict | None
    recall: dict[str, tuple[str, ...]]
    """For each of DIRECTIONS recall at each of CUTS."""
    zero_shot: str
    kept: str
    steps: str
    seconds: str


def read_summary(run: Path | str) -> dict[str, Any]:
    """`summary.json` of a finished run; raises InputError when there is none."""
    path = Path(run) / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run} holds no finished run (no summary.json). Is it mistyped? "
            "A run that was interrupted is finished by the command that began it."
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it and run again") from None
    if not isinstance(summary, dict):
        raise InputError(f"{path} is damaged (an object is expected): remove it and run again")
    return summary


def method_rows(summary: Summary) -> list[MethodRow]:
    """The methods of `summary`, curated first, then the baselines in a fixed order."""
    methods: Mapping[str, Any] = summary.get("methods", {})
    order = [name for name in LABELS if name in methods]
    return [_row(name, methods[name], summary) for name in [*order, *sorted(set(methods) - set(LABELS))]]


def _row(name: str, method: Mapping[str, Any], summary: Summary) -> MethodRow:
    compared = summary.get("comparisons", {}).get(name, {})
    recall = method.get("recall") or {}
    return MethodRow(
        name=name,
        label=LABELS.get(name, name),
        mean_recall=number(method.get("mean_recall")),
        interval=interval(method.get("mean_recall_ci")),
        difference=signed(compared.get("difference")) if compared else "",
        difference_interval=interval(compared.get("ci"), sign=True) if compared else "",
        verdict=verdict(compared.get("ci")) if compared else None,
        recall={
            direction: tuple(number((recall.get(direction) or {}).get(cut), 1) for cut in CUTS)
            for direction in DIRECTIONS
        },
        zero_shot=number(method.get("zero_shot_accuracy"), 1),
        kept=percent(method.get("kept_fraction")),
        steps=count(method.get("steps")),
        seconds=seconds(method.get("seconds")),
    )


def verdict(ci: Sequence[float] | None) -> Verdict:
    """Where curated stands by the interval of its difference; `unclear` when that includes zero."""
    if not ci or not all(map(is_number, ci)):
        return "unclear"
    if ci[0] > 0:
        return "ahead"
    return "behind" if ci[1] < 0 else "unclear"


def title(summary: Summary) -> str:
    """What happened, in one line."""
    kept = f"{percent(summary.get('kept_fraction'))} of the pairs were kept"
    compared = summary.get("comparisons", {}).get("everything")
    if not compared:
        return kept
    ending = {
        "ahead": "and retrieval got better",
        "behind": "and retrieval got worse",
        "unclear": "and retrieval did not clearly change",
    }
    return f"{kept}, {ending[verdict(compared.get('ci'))]}"


def findings(summary: Summary) -> list[str]:
    """What was gained or lost, in sentences with intervals."""
    rows = {row.name: row for row in method_rows(summary)}
    if "curated" not in rows:
        return ["Nothing was retrained, so it is not known whether this helped."]
    curated = rows["curated"]
    sentences = [
        f"Trained on the kept pairs, the proxy reaches a mean recall of {curated.mean_recall} % "
        f"(95 % interval {curated.interval})."
    ]
    if (everything := rows.get("everything")) and everything.verdict:
        points = f"{everything.difference} points, 95 % interval {everything.difference_interval}"
        told = {
            "ahead": f"The curated set beats training on everything ({everything.mean_recall} %): {points}.",
            "behind": f"The curated set is worse than training on everything ({everything.mean_recall} %): {points}. "
            "For this pool and target, do not use the curated set.",
            "unclear": f"Training on everything reaches {everything.mean_recall} %: the difference of {points}, "
            "includes zero, so neither is shown to be better.",
        }
        sentences.append(told[everything.verdict])
    others = [row for row in rows.values() if row.name not in ("curated", "everything") and row.verdict]
    parts = {
        "ahead": "ahead of",
        "unclear": "not clearly different from",
        "behind": "behind",
    }
    said = [
        f"{words} {_listed([f'{row.label} ({row.difference} points, {row.difference_interval})' for row in group])}"
        for wanted, words in parts.items()
        if (group := [row for row in others if row.verdict == wanted])
    ]
    if said:
        sentences.append(f"Among the other methods it is {'; '.join(said)}.")
    return sentences + weights_told(summary)


def weights_told(summary: Summary) -> list[str]:
    """Which weights the kept pairs have and what retraining said of them, in a sentence, where there was a choice."""
    chosen = summary.get("weights") or {}
    trials = chosen.get("trials")
    if not trials:
        return []
    uniform, *weighted = trials
    before = number(uniform["target_loss"], 3)
    if chosen["weights"] == "uniform":
        best = number(min(trial["target_loss"] for trial in weighted), 3)
        return [
            "The kept pairs have equal weights: no weights by influence were better when retrained "
            f"(target loss {before} with equal ones, {best} with the best others)."
        ]
    (taken,) = (trial for trial in weighted if trial["confirmed"])
    loss = number(taken["target_loss"], 3)
    by = "influence"
    if share := taken.get("clip_score_share"):
        by += f" and, {share:g} times as much, by the given encoder's CLIP score"
    sentences = [
        f"The kept pairs are weighted by {by}, at a temperature of {chosen['temperature']:g} standard deviations: "
        f"retraining likes it best (target loss {loss} instead of {before} with equal weights)."
    ]
    if taken.get("group_share"):
        worst = [number(trial["worst_group_loss"], 3) for trial in (taken, uniform)]
        sentences.append(
            f"They serve the target's groups that are worse off too: the worst group's loss is {worst[0]} instead of {worst[1]}."
        )
    return sentences


def summary_table(summary: Summary, *, wide: bool = False) -> Table:
    """The methods as a rich table for 80 columns; a `wide` one adds recall@1/5/10 both ways."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Method", style="bold", no_wrap=True)
    for heading in ("Mean recall, %", "Curated is ahead by"):
        table.add_column(heading, justify="right")
    for heading in _recall_headings() if wide else ():
        table.add_column(heading, justify="right")
    for heading in ("Kept", "Steps", "Time"):
        table.add_column(heading, justify="right", no_wrap=True)
    between = " " if wide else "\n"
    colours = {"ahead": "green", "behind": "red", "unclear": "", None: ""}
    for row in method_rows(summary):
        table.add_row(
            Text(row.label),
            _with_interval(row.mean_recall, row.interval, between),
            Text(_with_interval(row.difference, row.difference_interval, between), colours[row.verdict]),
            *(" / ".join(row.recall[direction]) for direction in (DIRECTIONS if wide else ())),
            row.kept,
            row.steps,
            row.seconds,
        )
    return table


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the title, the table, the notes and the paths; names and notes are printed as they are."""
    console = console or Console()

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style))

    say(title(summary), "bold")
    if summary.get("methods"):
        console.print(summary_table(summary, wide=console.width >= WIDE_TERMINAL))
    for sentence in findings(summary)[1:] if summary.get("methods") else findings(summary):
        say(sentence)
    rejected = sum(summary.get("rejected", {}).values())
    say(
        f"Pairs: {_named_counts(summary.get('rows', {}))}; rejected {count(rejected)}; "
        f"captions cut by the tokenizer {count(summary.get('truncated_captions', 0))}."
    )
    for note in summary.get("notes", []):
        say(f"Note: {note}", "yellow")
    for name, path in summary.get("paths", {}).items():
        console.print(Text(f"{name}: {path}"), soft_wrap=True)


def markdown_table(summary: Summary) -> str:
    """The methods as a GitHub table, with recall@1/5/10 both ways."""
    headings = [
        "Method",
        "Mean recall, %",
        "Curated is ahead by",
        *_recall_headings(),
        "Kept",
        "Steps",
        "Time",
    ]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for row in method_rows(summary):
        label = row.label.replace("\\", "\\\\").replace("|", "\\|")
        lines.append(
            [
                f"**{label}**" if row.name == "curated" else label,
                _with_interval(row.mean_recall, row.interval),
                _with_interval(row.difference, row.difference_interval),
                *(" / ".join(row.recall[direction]) for direction in DIRECTIONS),
                row.kept,
                row.steps,
                row.seconds,
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# Numbers as people read them; MISSING for what is not known


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None, digits: int = 2) -> str:
    return f"{value:,.{digits}f}" if value is not None and is_number(value) else MISSING


def signed(value: float | None, digits: int = 2) -> str:
    """With its sign, a real minus; what rounds to zero has none."""
    text = number(value, digits)
    if text == MISSING or not float(text.replace(",", "")):
        return text.removeprefix("-")
    return f"−{text[1:]}" if text.startswith("-") else f"+{text}"


def interval(ci: Sequence[float] | None, *, sign: bool = False, digits: int = 2) -> str:
    if not ci:
        return MISSING
    show = signed if sign else number
    return f"{show(ci[0], digits)} to {show(ci[1], digits)}"


def percent(fraction: float | None) -> str:
    return f"{100 * fraction:.1f} %" if fraction is not None and is_number(fraction) else MISSING


def count(value: float | None) -> str:
    return f"{value:,.0f}" if value is not None and is_number(value) else MISSING


def seconds(value: float | None) -> str:
    if value is None or not is_number(value):
        return MISSING
    return f"{value:.1f}s" if value < 60 else duration(value)


def _with_interval(value: str, bounds: str, between: str = " ") -> str:
    return f"{value}{between}({bounds})" if bounds not in ("", MISSING) else value


def _recall_headings() -> list[str]:
    return [f"{name}, R@{'/'.join(CUTS)}" for name in DIRECTIONS.values()]


def _named_counts(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count(value)}" for name, value in rows.items()) or MISSING


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
