"""The plan as a table, and below it what its figures mean."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influencespace.engine.placement import Resources
from influencespace.engine.progress import duration
from influencespace.planning.cluster import CORE_TFLOPS, SHARE_OF_PEAK, Cluster
from influencespace.planning.cost_model import Cost
from influencespace.planning.planning import Plan

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
UNKNOWN, NOT_COUNTED = "?", "–"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what will run: the stages, their sum, and what the figures mean."""
    console = console or Console()
    console.print(plan_table(plan))
    for line in sentences(plan):
        console.print(Text(line))


def plan_table(plan: Plan) -> Table:
    """The stages as a rich table for 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    seconds = [cost.seconds for cost in plan.costs]
    total = sum(filter(None, seconds)) if None not in seconds else None
    footers = {"Pairs": "", "Reads": "", "Writes": size(plan.written), "Worker": "", "Memory": ""}
    if plan.cluster:
        busy = sum(cost.gpu_seconds or 0.0 for cost in plan.costs)
        footers = {
            **{name: footers[name] for name in ("Reads", "Writes")},
            "Memory": "",
            "GPU time": time(busy),
            "Time": time(total),
            "Bound by": "",
        }
    table.add_column("Stage", "Together", style="bold", no_wrap=True)
    for heading, footer in (footers | {"Time": time(total)}).items():
        table.add_column(heading, footer, justify="right")
    for cost in plan.costs:
        table.add_row(*(_cells_on_cluster(cost) if plan.cluster else _cells(cost)))
    return table


def _cells(cost: Cost) -> list[str]:
    return [
        cost.stage.replace("/", " "),
        NOT_COUNTED if cost.pairs is None else f"{cost.pairs:,}",
        size(cost.read),
        size(cost.written),
        worker(cost.worker),
        NOT_COUNTED if cost.memory is None else size(cost.memory),
        time(cost.seconds),
    ]


def _cells_on_cluster(cost: Cost) -> list[str]:
    return [
        cost.stage.replace("/", " "),
        size(cost.read),
        size(cost.written),
        NOT_COUNTED if cost.memory is None else size(cost.memory),
        time(cost.gpu_seconds) if cost.gpu_seconds else NOT_COUNTED,
        time(cost.seconds),
        cost.bound,
    ]


def sentences(plan: Plan) -> list[str]:
    """Where the figures come from."""
    counted = ", ".join(
        f"{role} {size.pairs:,}{'' if size.exact else f' (estimated: {size.shards_read} of {size.shards} shards read)'}"
        for role, size in plan.sizes.items()
    )
    lines = [f"Pairs in the data: {counted}; embeddings of {plan.sizes['pool'].dimension} numbers."]
    if not plan.measured:
        lines.append(
            "Nothing was measured: without --limit 0, all stages run on slices, and what they take is scaled."
        )
        return lines
    times = plan.sizes["pool"].pairs / plan.measured
    measured = f"{plan.measured:,} pairs of the pool"
    if plan.embedded:
        measured = f"{plan.measured:,} pairs, made of the embeddings of {plan.embedded:,} pairs of the pool"
    lines.append(
        f"Times, files and memory were measured on {measured}, and on fewer. Times and files "
        f"are scaled to the whole pool, which is {times:,.1f} times as large. Memory is that of one worker, as measured or "
        "declared."
    )
    if plan.cluster:
        lines += _assumptions(plan, plan.cluster)
    if plan.rounds > 1:
        lines.append(
            f"The figures are for all {plan.rounds} rounds; a run ends earlier when the target loss stops falling."
        )
    return lines


def _assumptions(plan: Plan, cluster: Cluster) -> list[str]:
    """What of a plan for a cluster nobody has seen."""
    lines = [
        f"The cluster: {len(cluster.machines):,} machines, {cluster.cores:,} cores, {cluster.gpus:,} GPUs. Assumed: its cores "
        "are as quick as those here, all of them find work, and disks and network keep up. While embeddings are merged, the disk "
        f"holds them twice: {size(2 * plan.sizes['pool'].embedding_bytes)} for the pool."
    ]
    if cluster.gpus:
        seconds = sum(cost.seconds or 0.0 for cost in plan.costs)
        lines.append(
            f"No GPU was measured: one is taken to do the work of {cluster.cores_per_gpu:,.0f} cores, {SHARE_OF_PEAK:.0%} of its "
            f"peak over {1000 * CORE_TFLOPS:g} GFLOP/s of a core. The run holds {seconds / 3600 * cluster.gpus:,.1f} GPU-hours."
        )
    return lines


def worker(resources: Resources) -> str:
    """What one worker has: `2 CPU, 1 GPU`."""
    gpus = f", {resources.gpus:g} GPU" if resources.gpus else ""
    return f"{resources.cpus:g} CPU{gpus}"


def size(count: float | None) -> str:
    """Bytes as people read them: `512 B`, `1.5 GB`."""
    if count is None:
        return UNKNOWN
    unit = 0
    while round(count) >= 1000 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.1f} {UNITS[unit]}" if unit and count < 10 else f"{count:.0f} {UNITS[unit]}"


def time(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else duration(seconds)
