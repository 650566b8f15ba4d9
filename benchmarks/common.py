"""What every benchmark shares: the command line, the content-addressed cache, targets, and the JSON it writes."""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from influencespace.data.artifacts import fingerprint, installed_versions, write_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One promise with what was measured of it."""

    part: str
    name: str
    target: str
    measured: float | None
    reached: bool
    interval: tuple[float, float] | None = None

    @property
    def status(self) -> str:
        return "reached" if self.reached else "short"


@dataclass
class Benchmark:
    """Collects targets and table rows, then prints and writes them. Never fails for being short."""

    name: str
    quick: bool
    out: Path
    seeds: Sequence[int]
    targets: list[Target] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    incomplete: list[str] = field(default_factory=list)
    """Parts that are not measured yet, or not wholly."""
    part: str = ""
    """What rows and targets belong to."""
    commits: dict[str, str] = field(default_factory=dict)
    """Of each part: the code that measured it."""

    def go_on(self, parts: Sequence[str]) -> None:
        """Take over what an earlier, equally thorough run wrote of all other parts."""
        if not self.out.is_file():
            return
        found = json.loads(self.out.read_text(encoding="utf-8"))
        if found["quick"] != self.quick or list(found["seeds"]) != list(self.seeds):
            return
        self.table = [row for row in found["table"] if row["part"] not in parts]
        self.targets = [
            Target(**{key: value for key, value in target.items() if key != "status"})
            for target in found["targets"]
            if target["part"] not in parts
        ]
        self.commits = {part: sha for part, sha in found["commits"].items() if part not in parts}
        self.incomplete += [part for part in found["incomplete"] if part not in parts]

    def measure(self, parts: Sequence[str], work: Callable[[str], None], every: Sequence[str]) -> None:
        """Measure these parts of `every` part anew, keep the others, and write after each."""
        self.incomplete = list(parts)
        self.go_on(parts)
        self.incomplete += [part for part in every if part not in {*self.incomplete, *self.commits}]
        for part in parts:
            try:
                self.begin(part)
                work(part)
                self.incomplete.remove(part)
            except OutOfTimeError:
                print(f"out of time in {part}", flush=True)
            self.write()
        print(f"written: {self.out}")

    def begin(self, part: str) -> None:
        self.part = part
        self.commits[part] = commit()

    def target(self, **given: Any) -> None:
        target = Target(part=self.part, **given)
        self.targets.append(target)
        measured = "nothing" if target.measured is None else f"{target.measured:.4g}"
        interval = "" if target.interval is None else f" [{target.interval[0]:.4g}, {target.interval[1]:.4g}]"
        print(f"{target.status:8} {target.name}: {measured}{interval} (target: {target.target})", flush=True)

    def row(self, **cells: Any) -> None:
        cells = {"part": self.part} | cells
        self.table.append(cells)
        print("  " + "  ".join(f"{key}={_short(value)}" for key, value in cells.items()), flush=True)

    def write(self) -> None:
        write_json(
            self.out,
            {
                "benchmark": self.name,
                "quick": self.quick,
                "incomplete": self.incomplete,
                "commit": commit(),
                "commits": self.commits,
                "seeds": list(self.seeds),
                "machine": machine(),
                "seconds": round(time.monotonic() - self.started, 1),
                "targets": [asdict(target) | {"status": target.status} for target in self.targets],
                "table": self.table,
            },
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def arguments(description: str, name: str, parts: tuple[str, ...] = ()) -> argparse.Namespace:
    """--quick, --out, --cache, --minutes, and --parts of those that there are."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="a small version in a few minutes; no table for the docs"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache", help="embeddings and results, by content"
    )
    parser.add_argument("--minutes", type=float, help="begin nothing new after this; run it again to go on")
    if parts:
        parser.add_argument(
            "--parts", nargs="+", choices=parts, default=parts, help="measure these anew, keep the others"
        )
    options = parser.parse_args()
    if options.minutes is not None:
        global deadline
        deadline = time.monotonic() + 60 * options.minutes
    return options


class OutOfTimeError(RuntimeError):
    """The minutes that were given are over; what is there is written, and marked as incomplete."""


deadline = float("inf")


def cached(
    cache: Path, key: Any, make: Callable[[], dict[str, Any]], code: Sequence[str] | None = None
) -> dict[str, Any]:
    """The JSON result of `make` for this key and this code, computed once: a killed benchmark goes on where it was."""
    path = cache / "results" / f"{fingerprint([key, code_version(DECIDING if code is None else code)])}.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if time.monotonic() > deadline:
        raise OutOfTimeError
    result = make()
    write_json(path, result)
    return result


def _files(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}.py" for name in names)


LOSSES = ("objective", "info_nce", "sigmoid", "bank")
SCORING = (
    *_files("core", *LOSSES, "linalg", "batches", "kmeans", "quality"),
    *_files("models", "heads", "space", "training"),
    *_files("estimators", "nystrom", "similarity"),
    *_files("stages", "proxy", "cluster", "curvature", "attribute"),
)
DECIDING = (
    *SCORING,
    *_files(
        "core",
        "additive",
        "strata",
        "select",
        "redundancy",
        "fairness",
        "ridge",
        "caption_control",
        "metrics",
    ),
    *_files("data", "pair_set", "dirt"),
    *_files("stages", "decide", "redundancy", "fairness", "confirm", "train", "evaluate"),
)
TRAINING = (
    *_files("core", *LOSSES, "batches"),
    *_files("models", "heads", "space", "training", "trajectory"),
    *_files("estimators", "proxy_problem"),
    *_files("data", "pair_set", "dirt"),
)
COMPARING = (
    *DECIDING,
    *_files("core", "coreset"),
    *_files("models", "fusion"),
    *_files("estimators", "norm_sim"),
    *_files("stages", "split"),
)
RETRAINING = (
    *_files("core", *LOSSES, "batches", "metrics"),
    *_files("models", "heads", "training"),
    *_files("data", "pair_set"),
    *_files("stages", "proxy"),
)
TUNING = (
    *_files("core", *LOSSES, "batches", "metrics"),
    *_files("models", "dual_encoder", "tower_parameters", "training", "tuning"),
    *_files("data", "pair_set"),
    *_files("stages", "proxy"),
)
ESTIMATING = (
    *TRAINING,
    *_files("core", "linalg", "projection"),
    *_files("models", "gradients", "projected"),
    *(f"estimators/{path.name}" for path in sorted((ROOT / "influencespace" / "estimators").glob("*.py"))),
)


def code_version(parts: Sequence[str] = DECIDING) -> str:
    """A digest of the code that results depend on, so that a cache never outlives it."""
    return fingerprint([(ROOT / "influencespace" / part).read_text(encoding="utf-8") for part in parts])


def real_data() -> Path | None:
    """The folder of real data, or None where there is none."""
    folder = Path(os.environ.get("INFLUENCESPACE_DATA", ROOT.parent / "shared" / "data"))
    return folder if (folder / "flickr8k").is_dir() else None


def commit() -> str:
    """The commit that is measured, marked where the package differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "influencespace", "benchmarks/*.py")
    return (git("rev-parse", "HEAD") or "unknown") + ("-changed" if changed else "")


def machine() -> dict[str, Any]:
    return {"cpus": len(os.sched_getaffinity(0)), "processor": platform.machine(), **installed_versions()}
