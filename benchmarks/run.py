"""The runner of all benchmarks: `python benchmarks/run.py curation/quality --parts recall`, or `--list` for what there is.

Results go to benchmarks/results as JSON with the commit and a digest of the code; `benchmarks/render.py` makes tables and figures
of them. A killed run goes on from the cache; Ctrl-C keeps what was measured before.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # a script's own folder comes first, where `data` would hide other packages
    sys.path[0] = str(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from benchmarks import cache  # noqa: E402
from benchmarks.bench import RESULTS, Benchmark, Results, real_data, run_parts  # noqa: E402

NAMES = (
    *(
        f"curation/{name}"
        for name in ("quality", "rivals", "scenarios", "transfer", "redundancy", "ablations")
    ),
    *(f"attribution/{name}" for name in ("attribution", "peers", "calibration", "cleaning")),
    "fairness/fairness",
    "speed/survival",
    "speed/ingest",
    "speed/towers",
    "speed/scale",
    "speed/cores",
    "speed/kmeans",
    "speed/reader",
)


def load(name: str) -> Benchmark:
    """The benchmark of a name such as `curation/quality`."""
    benchmark: Benchmark = import_module(f"benchmarks.{name.replace('/', '.')}").BENCHMARK
    return benchmark


def listing() -> str:
    """Every benchmark with its parts."""
    return "\n".join(f"{name}: {' '.join(load(name).parts)}" for name in NAMES)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as curation/quality; `all` for all")
    parser.add_argument("--list", action="store_true", help="list benchmarks and their parts")
    parser.add_argument("--parts", nargs="+", help="measure these anew, keep the others; of one benchmark")
    parser.add_argument(
        "--quick", action="store_true", help="a small version in a few minutes, not for documents"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of results (default: benchmarks/results; quick: the cache)"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache", help="embeddings and results, by content"
    )
    parser.add_argument("--minutes", type=float, help="begin nothing new after this; run it again to go on")
    options = parser.parse_args(arguments)
    options.names = list(NAMES) if options.names == ["all"] else options.names
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.parts:
        if len(options.names) != 1:
            parser.error("--parts are of one benchmark: name it alone")
        if unknown := [part for part in options.parts if part not in (parts := load(options.names[0]).parts)]:
            parser.error(f"{options.names[0]} has no part {', '.join(unknown)}; it has {', '.join(parts)}")
    if not options.names and not options.list:
        parser.error("name a benchmark, or ask for --list")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_arguments(arguments)
    if options.list:
        print(listing())
        return 0
    if options.minutes is not None:
        cache.deadline = time.monotonic() + 60 * options.minutes
    out = options.out or (options.cache / "quick" if options.quick else RESULTS)
    for name in options.names:
        benchmark = load(name)
        data = real_data()
        if benchmark.data and not (data / benchmark.data).is_dir():
            print(f"{name} skipped: set INFLUENCESPACE_DATA to a folder that holds {benchmark.data}/")
            continue
        seeds = benchmark.quick_seeds if options.quick else benchmark.seeds
        results = Results(out / f"{name.rpartition('/')[2]}.json", name, options.quick, seeds)
        try:
            run_parts(
                results,
                benchmark,
                options.parts or tuple(benchmark.parts),
                options.cache,
                data if data.is_dir() else None,
            )
        except KeyboardInterrupt:
            print(f"interrupted; {results.path} holds what was measured before")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
