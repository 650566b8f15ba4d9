"""The cost model as a page: `python benchmarks/scaling.py` writes docs/scaling.md from benchmarks/results/scale.json.

Unit costs are those that `python benchmarks/run.py speed/scale --parts runs cost` measured; what is assumed is marked.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.render import RESULTS, markdown, origin, read  # noqa: E402
from influencespace.config import load_config  # noqa: E402
from influencespace.engine.placement import Resources  # noqa: E402
from influencespace.planning.cluster import CORE_TFLOPS, SHARE_OF_PEAK, Cluster, parse_cluster  # noqa: E402
from influencespace.planning.cost_model import Cost, Timing, scaled  # noqa: E402
from influencespace.planning.forecast import UnitCosts, on_cluster  # noqa: E402
from influencespace.planning.growth import growth_of  # noqa: E402
from influencespace.planning.table import size, time  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
POOLS = {"12.8 M": 12_800_000, "128 M": 128_000_000, "1.28 B": 1_280_000_000}
NODE = "(64 cores, 512 GB, 8xA100)"
NODES = (1, 8, 64)
"""Machines of 8 GPUs each."""
COMMAND = "python benchmarks/run.py speed/scale --parts runs cost"


@dataclass(frozen=True)
class Measured:
    """Each stage on the two largest pools that were run."""

    pairs: tuple[int, int]
    stages: Mapping[str, tuple[Timing, Timing]]
    cores: int

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Measured":
        """From the rows of the benchmark; raises SystemExit where it has fewer than two sizes."""
        rows = [row for row in result["table"] if row["part"] == "runs" and "stage" in row]
        sizes = sorted({int(row["pairs"]) for row in rows})
        if len(sizes) < 2:
            sys.exit(f"scale.json has {len(sizes)} size(s) of the pool, and a line needs two: {COMMAND}")
        by = {(row["stage"], int(row["pairs"])): _timing(row) for row in rows}
        few, many = sizes[-2:]
        names = [stage for stage, pairs in by if pairs == many]
        stages = {name: (by[name, few], by[name, many]) for name in names}
        return cls((few, many), stages, int(result["machine"]["cpus"]))

    def cost(self, stage: str, cluster: Cluster, pairs: int) -> Cost:
        """Of a stage on a cluster, for a pool of so many pairs with the same target and test set."""
        config = load_config(None, {"data.embeddings": "stored"})
        growth = growth_of(stage, config)
        if stage in ("embed/target", "embed/test"):
            pairs = self.pairs[1]  # they are as large as they were
        few, many, whole = (growth.units(config, count) for count in (*self.pairs, pairs))
        small, large = self.stages[stage]
        worker = Resources()
        cost = scaled(small, large, (*self.pairs, pairs), worker=worker, units=(few, many, whole))
        widths = growth.most(config, self.pairs[0]), growth.most(config, self.pairs[1])
        costs = UnitCosts.of(small, large, (few, many), self.cores, widths)
        return on_cluster(cost, costs, cluster, config, pairs)


def _timing(row: Mapping[str, Any]) -> Timing:
    """A stage of a run; CPU seconds of all processes are its work, since no core waits for another there."""
    return Timing(
        stage=row["stage"],
        pairs=row["rows"],
        read=round(1e6 * row["reads_mb"]),
        written=round(1e6 * row["disk_mb"]),
        memory=round(1e6 * (row["peak_mb"] or 0)),
        seconds=row["seconds"],
        working=row["cpu_seconds"] or 0.0,
    )


def page(result: Mapping[str, Any]) -> str:
    """The whole page; raises SystemExit where too little was measured."""
    measured = Measured.of(result)
    lines = [
        "# How far does a run scale?",
        "",
        f"Generated: `python benchmarks/scaling.py` writes this page from `benchmarks/results/scale.json` (`{COMMAND}`).",
        "",
        f"**Measured**: whole runs from stored embeddings of {measured.pairs[0]:,} and {measured.pairs[1]:,} pairs on "
        f"{measured.cores} CPU cores. They give the seconds, the CPU seconds and the bytes of each stage, as a constant and "
        "a part in proportion to its work, and the largest unshared memory of a process.",
        "",
        f"**Assumed, not measured**: clusters of machines `{NODE}` whose cores are as quick as those measured and all find "
        f"work; a GPU does the work of {_cluster(1).cores_per_gpu:,.0f} cores ({SHARE_OF_PEAK:.0%} of its peak over "
        f"{1000 * CORE_TFLOPS:g} GFLOP/s of a core); disks and network keep up; memory of a worker stays as it was. Embedding "
        "itself is not in these tables: embeddings are there. `the driver` stands for all seconds in which the measured cores "
        "were not all busy, also those that reading or one slow training took: they are taken for work that nothing divides, "
        "which makes these times an upper bound.",
        "",
        "",
    ]
    return (
        "\n".join(lines)
        + "".join(_tables(measured))
        + _embedding(result)
        + origin(dict(result), {"runs", "cost"})
    )


def _tables(measured: Measured) -> Iterator[str]:
    yield "## The whole run\n\n" + markdown(_whole(measured))
    yield "\nThe last column names the stage that takes most of the time, and what bounds it: that stops scaling first.\n"
    names = [name for name in measured.stages if name not in ("embed/target", "embed/test")]
    for label, pairs in POOLS.items():
        head = (
            "stage",
            *(f"{8 * nodes} GPUs" for nodes in NODES),
            "bound by",
            "writes",
            "reads",
            "memory of a process",
        )
        rows: list[tuple[str, ...]] = [head]
        for name in names:
            costs = [measured.cost(name, _cluster(nodes), pairs) for nodes in NODES]
            last = costs[-1]
            times = [time(cost.seconds) for cost in costs]
            rows.append((name, *times, last.bound, size(last.written), size(last.read), size(last.memory)))
        yield f"\n## {label} pairs\n\n" + markdown(rows)


def _whole(measured: Measured) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            "pairs",
            "GPUs",
            "time",
            "GPUs busy",
            "bytes written",
            "most memory of a process",
            "stops scaling first",
        )
    ]
    for label, pairs in POOLS.items():
        for nodes in NODES:
            cluster = _cluster(nodes)
            costs = [measured.cost(name, cluster, pairs) for name in measured.stages]
            seconds = sum(cost.seconds or 0.0 for cost in costs)
            busy = sum(cost.gpu_seconds or 0.0 for cost in costs) / (cluster.gpus * seconds)
            slowest = max(costs, key=lambda cost: cost.seconds or 0.0)
            rows.append(
                (
                    label,
                    str(cluster.gpus),
                    time(seconds),
                    f"{busy:.1%}",
                    size(sum(cost.written or 0 for cost in costs)),
                    size(max(cost.memory or 0 for cost in costs)),
                    f"{slowest.stage}: {slowest.bound}",
                )
            )
    return rows


def _cluster(nodes: int) -> Cluster:
    return parse_cluster(f"{nodes}x{NODE}")


def _embedding(result: Mapping[str, Any]) -> str:
    """What embedding would take beside, where it was measured."""
    rows = [row for row in result["table"] if row["part"] == "cost"]
    if not rows:
        return ""
    last = rows[-1]
    share = last["ms_a_pair"] / last["embedding_ms_a_pair"]
    return (
        f"\n## Embedding\n\nA CLIP ViT-B/32 takes {last['embedding_ms_a_pair']:.1f} ms a pair on the same cores, and all after "
        f"embedding {last['ms_a_pair']:.2f} ms, {share:.1%} of that ({last['pairs']:,} pairs).\n"
    )


def main() -> None:
    PAGE.write_text(page(read("scale", RESULTS)), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
