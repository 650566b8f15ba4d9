"""Whole runs from stored embeddings on one core and on two, beside bare processes: how much of a second core each stage uses.

A bare process is the plain loop without Ray, held to one core. Two of them, each on a core and a pool of its own, show what the
machine itself gives: cores share memory and caches. Each stage's speed-up is divided by that.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.cache import ROOT
from benchmarks.speed.scale import MIN_SECONDS, Origin, origin, stage_names
from influencespace import api
from influencespace.config import load_config
from influencespace.data.artifacts import read_manifest

BENCHMARK = Benchmark(seeds=(0,))
GOAL = 0.9


def begin(data: Path, of: Origin, out: Path, engine: str, cores: Sequence[int]) -> subprocess.Popen[bytes]:
    """A process of these cores that makes a run of the embeddings in a folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    arguments = (engine, data, of.target, of.test, of.encoder, out)
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.speed.cores", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        preexec_fn=partial(os.sched_setaffinity, 0, cores),
    )


def seconds(out: Path) -> dict[str, float]:
    """Of each stage, from its manifest."""
    found = {name: read_manifest(out / name) for name in stage_names(load_config(out / "config.yaml"))}
    return {name: manifest.seconds for name, manifest in found.items() if manifest is not None}


def timed(
    folder: Path, of: Origin, pairs: int, engine: str, cores: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Seconds of each stage, of runs that go on at once, one on each set of cores; the mean over them."""
    data = folder / f"embeddings-{pairs}"
    of.noisy.write(data, pairs)
    outs = [folder / f"run-{engine}-{len(cores)}-{len(one)}-{number}" for number, one in enumerate(cores)]
    processes = [begin(data, of, out, engine, one) for out, one in zip(outs, cores)]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"a run by {engine} of {pairs} pairs failed")
    each = [seconds(out) for out in outs]
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def measured(bench: Bench) -> dict[str, Any]:
    """The four runs."""
    pairs = bench.pick(500_000, 2_000)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory(prefix="cores-", dir=bench.cache) as name:
        folder = Path(name)
        of = origin(bench, folder)
        if of is None:
            return {}
        run = partial(timed, folder, of)
        return {
            "bare_alone": run(pairs // 2, "local", [[first]]),
            "bare_both": run(pairs // 2, "local", [[first], [second]]),
            "one": run(pairs, "ray", [[first]]),
            "two": run(pairs, "ray", [[first, second]]),
        }


def speedups(took: dict[str, dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Of each stage, by a second core: of a run (one core's seconds over those of two), and of bare processes, which do twice the
    work of one in the time of both."""
    return {
        stage: (took["one"][stage] / took["two"][stage], 2 * alone / took["bare_both"][stage])
        for stage, alone in took.get("bare_alone", {}).items()
    }


@BENCHMARK.part
def strong(bench: Bench) -> None:
    """One core against two, of every stage that takes some seconds."""
    bench.cache.mkdir(parents=True, exist_ok=True)
    took = bench.cached(["cores", bench.quick], partial(measured, bench))
    for stage, (ours, bare) in speedups(took).items():
        if took["two"][stage] < bench.pick(MIN_SECONDS, 0):
            continue
        bench.row(
            stage=stage,
            one_core_seconds=took["one"][stage],
            two_cores_seconds=took["two"][stage],
            speedup=ours,
            bare_speedup=bare,
        )
        what = f"speed-up of {stage} by a second core over that of bare processes"
        bench.target(what, wanted.at_least(GOAL), ours / bare)


if __name__ == "__main__":  # the process of one run
    _engine, _data, _target, _test, _encoder, _out = sys.argv[1:]
    api.curate(
        out=_out,
        embeddings=_data,
        target=_target,
        test=_test,
        encoder=_encoder,
        settings={"train.seeds": [0]},  # more would take longer and tell nothing of a second core
        engine="local" if _engine == "local" else "ray",
    )
