"""The plan as a table, and below it what does not fit and what is not known."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influencespace.engine.progress import duration
from influencespace.plan.needs import Need
from influencespace.plan.planning import Plan

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
UNKNOWN = "?"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what will run: the stages, their sum, and notes."""
    console = console or Console()
    console.print(plan_table(plan))
    for line in sentences(plan):
        console.print(Text(line))
    for note in plan.notes:
        console.print(Text(f"Note: {note}", "yellow"))


def plan_table(plan: Plan) -> Table:
    """The stages as a rich table for 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("Stage", "Together", style="bold", no_wrap=True)
    footers = {
        "Pairs": "",
        "Reads": size(plan.read),
        "Writes": size(plan.written),
        "Workers": "",
        "Memory": "",
        "Driver": "",
        "Time": time_of(plan.seconds),
    }
    for heading, footer in footers.items():
        table.add_column(heading, footer, justify="right")
    for need in plan.stages:
        table.add_row(need.stage, *_cells(need))
    return table


def sentences(plan: Plan) -> list[str]:
    """Where the figures come from, and what the machines must have."""
    largest = max(plan.stages, key=lambda need: need.workers * need.worker)
    counted = ", ".join(
        f"{role} {found.pairs:,}{'' if found.exact else f' (estimated: {found.indexed} of {found.shards} shards read)'}"
        for role, found in plan.sizes.surveys.items()
    )
    times = "Times are unknown until calibrated: --limit 10000 really runs that many pairs and extrapolates."
    if plan.calibrated is not None:
        times = f"Times were extrapolated from {plan.calibrated:,} pairs that went through every stage."
    return [
        f"Pairs in the data: {counted}; embeddings of {plan.sizes.dimension} numbers.",
        f"Disk: {size(plan.written)} stay, {size(plan.peak_disk)} at most meanwhile.",
        f"Memory is that of one worker. {largest.stage} takes most: {size(largest.workers * largest.worker)} "
        f"for {largest.workers} worker(s), of {size(plan.memory)} there are.",
        times,
    ]


def size(count: float) -> str:
    """Bytes as people read them: `512 B`, `1.5 GB`."""
    unit = 0
    while round(count) >= 1000 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.1f} {UNITS[unit]}" if unit and count < 10 else f"{count:.0f} {UNITS[unit]}"


def time_of(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else duration(seconds)


def _cells(need: Need) -> list[str]:
    return [
        f"{need.pairs:,}",
        size(need.read),
        size(need.written),
        str(need.workers),
        size(need.worker),
        size(need.driver),
        time_of(need.seconds),
    ]
