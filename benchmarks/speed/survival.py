"""Runs by the command line that are killed at seeded moments and finished, and stored files that are damaged.

However often the driver, a worker, an actor or a node is lost, all files have the digests of a run that nobody disturbed; and
every damage of a stored file is noticed.
"""

import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.speed.damage import FAULTS, targets_of
from benchmarks.speed.killing import KINDS, Command, Lost, Nodes, Strike, environment, two_nodes
from influencespace.data.artifacts import MANIFEST, read_manifest
from influencespace.data.integrity import describe
from influencespace.data.results import CURATED
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.demo import SMALL_PROXY
from influencespace.stages.ingest.fit_encoder import FitEncoder
from influencespace.stages.ingest.shards import ROLES
from influencespace.tasks.verify import verify_run

BENCHMARK = Benchmark(seeds=(0,))
QUICK: dict[str, Any] = {
    "proxy.train.batch_size": 48,
    "proxy.train.steps": 40,
    "proxy.train.dimension": 32,
    "proxy.choose_steps": "false",
    "proxy.folds": 2,
    "proxy.negative_batches": 2,
    "curvature.rank": 8,
    "influence.quantiles": 8,
    "influence.control_samples": 60,
    "train.seeds": "[0]",
    "train.methods": "[curated, everything]",
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """An undisturbed run: its arguments, its folder, how long it worked and the digests of its files."""

    arguments: tuple[str, ...]
    out: Path
    seconds: float
    digests: dict[str, str]


def digests(run: Path) -> dict[str, str]:
    """Of every file of every finished stage, and of the decision."""
    found = {CURATED: describe(run / CURATED).digest}
    for path in sorted(run.rglob(MANIFEST)):
        folder = path.parent
        name = folder.relative_to(run).as_posix()
        if folder != run and (manifest := read_manifest(folder)) is not None:
            found |= {f"{name}/{file}": describe(folder / file).digest for file in manifest.files}
    return found


def write_data(bench: Bench, folder: Path) -> tuple[str, ...]:
    """A world a third of the demo's, an encoder fitted on it, and the arguments of a run on them."""
    pairs = bench.pick(2000, 150)
    sizes = {"pool": pairs} | {role: max(80, pairs // 6) for role in ("pretrain", "target", "test")}
    write_world(folder, WorldConfig(seed=bench.seeds[0], wrong_captions=0.25, shard_size=100, **sizes))
    encoder = folder / "encoder"
    FitEncoder(shards=str(folder / "pretrain"), out=encoder, steps=bench.pick(300, 15), seed=0)()
    settings: dict[str, Any] = dict(QUICK if bench.quick else SMALL_PROXY)
    settings |= {f"data.{role}": str(folder / role) for role in ROLES} | {"embed.encoder": str(encoder)}
    return tuple(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))


@contextmanager
def undisturbed(bench: Bench, *more: str) -> Iterator[tuple[Truth, Path]]:
    """An undisturbed run, and a folder for others; `more` arguments are of all of them."""
    with tempfile.TemporaryDirectory() as temporary, environment():
        folder = Path(temporary)
        arguments = (*write_data(bench, folder / "world"), *more)
        out = folder / "truth"
        seconds = Command(("run", *arguments), out).finish()
        truth = Truth(arguments=arguments, out=out, seconds=seconds, digests=digests(out))
        bench.row(run="undisturbed", seconds=seconds, files=len(truth.digests))
        yield truth, folder


def strikes(chance: random.Random, seconds: float, count: int, kinds: Sequence[str]) -> list[Strike]:
    """Moments of the work of a run, in their order, as the seconds between them, and who is struck."""
    moments = sorted(chance.uniform(0, 0.9 * seconds) for _ in range(count))
    return [
        Strike(after=now - before, kind=chance.choice(list(kinds)))
        for before, now in zip([0.0, *moments], moments)
    ]


def compared(truth: Truth, out: Path, lost: Sequence[Lost]) -> dict[str, Any]:
    """Who was lost of a run, and whether it ended in the files of the undisturbed one."""
    mine = digests(out)
    different = sorted(name for name in truth.digests | mine if truth.digests.get(name) != mine.get(name))
    return {
        "lost": {kind: sum(one.kind == kind for one in lost) for kind in {one.kind for one in lost}},
        "names": [one.name for one in lost],
        "different": different[:5],
        "identical": not different,
        "verified": not verify_run(out),
    }


def end_of(command: Command, planned: Sequence[Strike]) -> list[Lost]:
    """Strike a command as planned, begin it again where that ended it, and let it finish; who was lost."""
    lost = []
    for strike in planned:
        if not command.work_for(strike.after):
            break  # finished before its time
        lost.append(command.strike(strike.kind))
    command.finish()
    return lost


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many runs are disturbed, how often each, and by what."""

    lost: str
    """What is counted."""
    runs: int
    strikes: int
    kinds: Sequence[str]
    enough: float
    """Share of the strikes that have to hit a run at work."""

    def carry_out(self, bench: Bench, *more: str, cluster: Nodes | None = None) -> None:
        """Disturb each run, let it finish and compare it; `more` arguments are of all runs."""
        identical = struck = 0
        with undisturbed(bench, *more) as (truth, folder):
            for run in range(self.runs):
                chance = random.Random(f"{bench.seeds[0]} {self.lost} {run}")
                command = Command(("run", *truth.arguments), folder / f"run-{run}", cluster)
                disturbed = partial(self._disturbed, truth, command, chance)
                found = bench.cached([self.lost, bench.quick, run], disturbed)
                bench.row(run=run, **found)
                struck += len(found["names"])
                identical += found["identical"] and found["verified"]
        expected = wanted.at_least(self.enough * self.runs * self.strikes)
        bench.target(f"{self.lost} in {self.runs} runs", expected, struck)
        same = f"runs of {self.runs} that end in the digests of an undisturbed run"
        bench.target(same, wanted.at_least(self.runs), identical)

    def _disturbed(self, truth: Truth, command: Command, chance: random.Random) -> dict[str, Any]:
        lost = end_of(command, strikes(chance, truth.seconds, self.strikes, self.kinds))
        found = compared(truth, command.out, lost)
        shutil.rmtree(command.out)
        return found


@BENCHMARK.part
def kills(bench: Bench) -> None:
    """The driver, a worker or an actor is killed."""
    plan = Plan(
        lost="kills",
        runs=bench.pick(10, 1),
        strikes=bench.pick(10, 2),
        kinds=KINDS,
        enough=bench.pick(0.8, 0.5),
    )
    plan.carry_out(bench)


@BENCHMARK.part
def nodes(bench: Bench) -> None:
    """A node of a cluster of two is lost, and another comes."""
    plan = Plan(
        lost="nodes lost",
        runs=bench.pick(10, 1),
        strikes=bench.pick(2, 1),
        kinds=["node"],
        enough=bench.pick(0.8, 1),
    )
    with environment(), two_nodes() as cluster:
        plan.carry_out(bench, "--address", cluster.address, cluster=cluster)


@BENCHMARK.part
def faults(bench: Bench) -> None:
    """Every kind of damage to a file of every stage; some of the damaged runs are carried on by the same command."""
    chance = random.Random(bench.seeds[0])
    with undisturbed(bench) as (truth, folder):
        out = shutil.copytree(truth.out, folder / "damaged")
        noticed, tried, again = 0, 0, []
        for path in targets_of(out):
            for name, damage in FAULTS.items():
                damage(path)
                found = path in {problem.fault.path for problem in verify_run(out)}
                noticed, tried = noticed + found, tried + 1
                if not found:
                    bench.row(missed=path.relative_to(out).as_posix(), fault=name)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                shutil.copyfile(truth.out / path.relative_to(out), path)
        for path in chance.sample(targets_of(out), bench.pick(12, 2)):
            name = chance.choice(list(FAULTS))
            FAULTS[name](path)
            Command(("run", *truth.arguments), out).finish()
            again.append(digests(out) == truth.digests and not verify_run(out))
            bench.row(damaged=path.relative_to(out).as_posix(), fault=name, identical=again[-1])
    bench.target(f"damages of {tried} that are noticed", wanted.at_least(tried), noticed)
    bench.target(
        f"damaged runs of {len(again)} that end in the same digests", wanted.at_least(len(again)), sum(again)
    )
