"""What a benchmark is: a module whose parts write rows and promises, which are kept as JSON with the code that made them."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.cache import ROOT, OutOfTimeError, cached, code_digest
from benchmarks.wanted import Interval, Wanted
from influencespace.data.artifacts import installed_versions, write_json

RESULTS = ROOT / "benchmarks" / "results"
T = TypeVar("T")


@dataclass(kw_only=True)
class Bench:
    """What a part is given: the kind of run, where data and cache are, and where rows and promises go."""

    quick: bool
    seeds: tuple[int, ...]
    cache: Path
    data: Path | None
    """The folder of real data, or None where there is none."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)

    def pick(self, full: T, quick: T) -> T:
        """One of the two, by the kind of run."""
        return quick if self.quick else full

    @cached_property
    def real(self) -> Path:
        """The folder of real data, where a part cannot do without."""
        assert self.data is not None, (
            "the runner leaves benchmarks out that need real data where there is none"
        )
        return self.data

    def cached(self, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """As `benchmarks.cache.cached`, in the benchmark's cache."""
        return cached(self.cache, key, make)

    def row(self, **cells: Any) -> None:
        self.rows.append(cells)
        print("  " + "  ".join(f"{key}={_short(value)}" for key, value in cells.items()), flush=True)

    def target(
        self, name: str, wanted: Wanted, measured: float | None, interval: Interval | None = None
    ) -> None:
        """Record one promise with what was measured of it; it is never an error that it fails."""
        passes = measured is not None and wanted.holds(measured, interval or (measured, measured))
        status = "passes" if passes else "fails"
        kept = {"measured": measured, "interval": None if interval is None else list(interval)}
        self.targets.append({"name": name, "target": wanted.words, **kept, "status": status})
        around = "" if interval is None else f" {_short(list(interval))}"
        value = "nothing" if measured is None else f"{measured:.4g}"
        print(f"{status:6} {name}: {value}{around} (target: {wanted.words})", flush=True)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


Part = Callable[[Bench], None]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Parts by name, in the order in which they are measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    quick_seeds: tuple[int, ...] = (0,)
    data: str = ""
    """Folder of the real data that is needed; without it nothing is measured."""
    parts: dict[str, Part] = field(default_factory=dict)

    def part(self, function: Part) -> Part:
        """Register a function as the part of its name, less `_part`."""
        self.parts[function.__name__.removesuffix("_part")] = function
        return function


@dataclass
class Results:
    """A benchmark's JSON: rows and promises of each part with the commit and the code that measured them."""

    path: Path
    benchmark: str
    quick: bool
    seeds: Sequence[int]
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By part: rows, targets, commit, code and whether it is complete, or why it is withdrawn."""

    def __post_init__(self) -> None:
        """Take over what an earlier run of the same kind and seeds measured."""
        if not self.path.is_file():
            return
        before = json.loads(self.path.read_text(encoding="utf-8"))
        if before["quick"] == self.quick and before["seeds"] == list(self.seeds):
            self.kept = {
                part: {
                    "rows": _of_part(before["table"], part),
                    "targets": _of_part(before["targets"], part),
                    "commit": commit,
                    "code": before["code"].get(part, ""),
                    "complete": part not in before["incomplete"],
                    "withdrawn": before["withdrawn"].get(part),
                }
                for part, commit in before["commits"].items()
            }

    def measure(self, part: str, work: Part, bench: Bench) -> None:
        """Measure a part anew and write it; what was measured before stays until then, also where the user interrupts."""
        complete = True
        try:
            work(bench)
        except OutOfTimeError:
            complete = False
            print(f"out of time in {part}", flush=True)
        result = {"rows": bench.rows, "targets": bench.targets, "complete": complete, "withdrawn": None}
        code = code_digest(f"benchmarks.{self.benchmark.replace('/', '.')}")
        self.kept[part] = {**result, "commit": commit(), "code": code}

    def write(self, parts: Sequence[str], seconds: float) -> None:
        """Write the JSON; of all `parts` it names those that are not measured, or not wholly."""
        of = self.kept.items()
        document = {
            "benchmark": self.benchmark,
            "quick": self.quick,
            "seeds": list(self.seeds),
            "machine": machine(),
            "seconds": round(seconds, 1),
            "incomplete": [part for part in parts if not self.kept.get(part, {}).get("complete")],
            "withdrawn": {part: kept["withdrawn"] for part, kept in of if kept["withdrawn"]},
            "commits": {part: kept["commit"] for part, kept in of},
            "code": {part: kept["code"] for part, kept in of},
            "targets": [{"part": part, **target} for part, kept in of for target in kept["targets"]],
            "table": [{"part": part, **row} for part, kept in of for row in kept["rows"]],
        }
        write_json(self.path, document)


def _of_part(lines: Sequence[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "part"} for line in lines if line["part"] == part
    ]


def run_parts(
    results: Results, benchmark: Benchmark, chosen: Sequence[str], cache: Path, data: Path | None
) -> None:
    """Measure the chosen parts one after another, and write after each."""
    began = time.monotonic()
    for part in chosen:
        bench = Bench(quick=results.quick, seeds=tuple(results.seeds), cache=cache, data=data)
        print(f"{results.benchmark} {part}", flush=True)
        results.measure(part, benchmark.parts[part], bench)
        results.write(tuple(benchmark.parts), time.monotonic() - began)
    print(f"written: {results.path}")


def quickest(work: Callable[[], object], times: int) -> float:
    """Seconds of the quickest of some calls, after one to warm up: the machines are shared."""
    work()
    seconds = []
    for _ in range(times):
        began = time.monotonic()
        work()
        seconds.append(time.monotonic() - began)
    return min(seconds)


def real_data() -> Path:
    """Where the real data are looked for."""
    return Path(os.environ.get("INFLUENCESPACE_DATA", ROOT.parent / "shared" / "data"))


def commit() -> str:
    """The commit that is measured, marked where the code differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "influencespace", "benchmarks/*.py")
    return (git("rev-parse", "HEAD") or "unknown") + ("-changed" if changed else "")


def machine() -> dict[str, Any]:
    return {"cpus": len(os.sched_getaffinity(0)), "processor": platform.machine(), **installed_versions()}
