"""The table of methods for terminals, documents and the page. Its columns are declared once, in COLUMNS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influencespace.report.findings import Method, Summary, Verdict, findings, methods, title, verdict
from influencespace.report.numbers import MISSING, count, interval, number, percent, seconds, signed

CUTS = ("1", "5", "10")
# The columns of recall@1, 5 and 10 both ways need this many characters.
WIDE_TERMINAL = 145
STYLES = {"ahead": "green", "behind": "red"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one column shows of one method; the interval is shown smaller, the verdict as a colour."""

    text: str
    interval: str = ""
    verdict: Verdict | None = None

    def joined(self, between: str = " ") -> str:
        """The text with its interval in brackets, where there is one."""
        return f"{self.text}{between}({self.interval})" if self.interval not in ("", MISSING) else self.text


@dataclass(frozen=True)
class Column:
    """A column of the report; it is left out where nothing is known of any method."""

    heading: str
    cell: Callable[[Method], Cell]
    """From the record of a method in `summary.json`; see `methods`."""
    wide: bool = False
    """Left out in terminals narrower than WIDE_TERMINAL."""


def mean_recall(method: Method) -> Cell:
    return Cell(text=number(method.get("mean_recall")), interval=interval(method.get("mean_recall_ci")))


def lead(method: Method) -> Cell:
    compared = method["comparison"]
    if not compared:
        return Cell(text="")
    ci = compared.get("ci")
    return Cell(
        text=signed(compared.get("difference")), interval=interval(ci, sign=True), verdict=verdict(ci)
    )


def _recall(direction: str) -> Callable[[Method], Cell]:
    def cell(method: Method) -> Cell:
        recall = (method.get("recall") or {}).get(direction)
        return Cell(text=" / ".join(number(recall.get(cut), 1) for cut in CUTS) if recall else MISSING)

    return cell


COLUMNS = (
    Column("Mean recall, %", mean_recall),
    Column("Curated is ahead by", lead),
    Column("Image to text, R@1/5/10", _recall("image_to_text"), wide=True),
    Column("Text to image, R@1/5/10", _recall("text_to_image"), wide=True),
    Column("Zero-shot, %", lambda method: Cell(text=number(method.get("zero_shot_accuracy"), 1)), wide=True),
    Column("Kept", lambda method: Cell(text=percent(method.get("kept_fraction")))),
    Column("Steps", lambda method: Cell(text=count(method.get("steps")))),
    Column("Time", lambda method: Cell(text=seconds(method.get("seconds")))),
)
"""The columns of the report, in order: terminal, Markdown and page show these."""


def rows(
    summary: Summary, columns: Sequence[Column] = COLUMNS
) -> tuple[list[str], list[tuple[Method, list[Cell]]]]:
    """The headings of the columns of which something is known, and each method with its cells."""
    records = methods(summary)
    known = [c for c in columns if any(c.cell(method).text not in ("", MISSING) for method in records)]
    return [c.heading for c in known], [(method, [c.cell(method) for c in known]) for method in records]


def summary_table(summary: Summary, *, wide: bool = False) -> Table:
    """The methods as a rich table for 80 columns, or with all COLUMNS where it may be `wide`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Method", style="bold", no_wrap=True)
    headings, lines = rows(summary, [column for column in COLUMNS if wide or not column.wide])
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=" " not in heading)
    for method, cells in lines:
        texts = (Text(c.joined(" " if wide else "\n"), STYLES.get(c.verdict or "", "")) for c in cells)
        table.add_row(Text(method["label"]), *texts)
    return table


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the title, the table, the notes and the paths; names and notes are printed as they are."""
    console = console or Console()
    console.print(Text(title(summary), "bold"))
    sentences = findings(summary)
    if summary.get("methods"):
        console.print(summary_table(summary, wide=console.width >= WIDE_TERMINAL))
        sentences = sentences[1:]  # the first repeats the table
    pairs = ", ".join(f"{name} {count(value)}" for name, value in summary.get("rows", {}).items())
    sentences.append(
        f"Pairs: {pairs or MISSING}; rejected {count(sum(summary.get('rejected', {}).values()))}; "
        f"captions cut by the tokenizer {count(summary.get('truncated_captions', 0))}."
    )
    if stages := summary.get("stages"):
        times = (f"{name} {seconds(record.get('seconds'))}" for name, record in stages.items())
        sentences.append(f"Stages: {', '.join(times)}.")
    for sentence in sentences:
        console.print(Text(sentence))
    for note in summary.get("notes", []):
        console.print(Text(f"Note: {note}", "yellow"))
    for name, path in summary.get("paths", {}).items():
        console.print(Text(f"{name}: {path}"), soft_wrap=True)


def markdown_table(summary: Summary) -> str:
    """The methods as a GitHub table with all COLUMNS."""
    headings, lines = rows(summary)
    table = [["Method", *headings], ["---", *["---:"] * len(headings)]]
    for method, cells in lines:
        label = method["label"].replace("\\", "\\\\").replace("|", "\\|")
        bold = "**" if method["name"] == "curated" else ""
        table.append([f"{bold}{label}{bold}", *(cell.joined() for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"
