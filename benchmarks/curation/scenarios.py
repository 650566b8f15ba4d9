"""Pools of real pairs that are corrupted as web data is, each with its planted truth, which judges only.

What the default settings prune of each kind, and proxies retrained at equal steps on what they and others keep: the
others get the share of wrong pairs, ours gets nothing. Parts are the scenarios.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.curation.curation import Curation, joined, retrained
from benchmarks.curation.rare_group import rare_group
from benchmarks.curation.retrain_eval import Retrained, mean_of
from benchmarks.curation.scenario_curation import SIZED, ScenarioCuration, curations
from benchmarks.data.corruptions import UNFORESEEN
from benchmarks.data.datasets import Dataset, SyntheticDataset
from benchmarks.data.scenario_pools import SCENARIOS
from benchmarks.methods.seed_baseline import seed_baseline

BENCHMARK = Benchmark(data="flickr8k")
FILTERS = ("clip_score", "early_clip_score", "proxy_clip_score", "neg_clip_loss", "proxy_neg_clip_loss")
LED = ("hard wrong", "boilerplate", "irrelevant", "blurred", "web", *UNFORESEEN)
"""Where the best of the simple filters is to be beaten significantly."""
QUICKER = ("wrong 30", "web")
"""Where the full set's quality is asked for in half of its steps."""


def scenario_part(name: str, bench: Bench) -> None:
    judge(bench, name, curations(bench, name))


def judge(
    bench: Bench, name: str, pools: Sequence[ScenarioCuration], column: str = "scenario", of: str = ""
) -> None:
    """What becomes of each kind of pair by the default settings, and what a proxy retrained on the rest is worth.

    Rows name in `column` the scenario that they are of, so that each family has its tables.
    """
    kinds = [each.cached("kinds", each.judge_kinds) for each in pools]
    for kind in kinds[0]:
        pruned = float(np.mean([each[kind]["pruned"] for each in kinds]))
        bench.row(**{column: name}, kind=kind, pairs=kinds[0][kind]["pairs"], pruned=pruned)
    judged = [each.judged() for each in pools]
    if pools[0].scenario.corruption in ("clean", "wrong"):
        farthest = max(judged, key=lambda each: float(abs(each["pruned"] - each["wrong"])))
        asked = wanted.within(0.04, farthest["wrong"]) if farthest["wrong"] else wanted.at_most(0.05)
        what = "fraction pruned by the method itself, by the target for which it is farther off"
        bench.target(f"{of}{name}: {what}", asked, farthest["pruned"])
    else:
        precision = min((each["precision"] for each in judged if each["pruned"]), default=None)
        what = "share of what was pruned as harmful that is dirt, by the target for which it is lower"
        bench.target(f"{of}{name}: {what}", wanted.at_least(0.9), precision)
    result = retrained(pools, bench.seeds)
    for method in result.shares:
        bench.row(**{column: name}, **result.row(method))
    compare(bench, f"{of}{name}: mean recall of", name, result)
    if name in QUICKER:
        in_fewer_steps(bench, pools, result, {column: name}, f"{of}{name}")


def compare(bench: Bench, what: str, name: str, result: Retrained) -> None:
    """Ours with the oracle, with the best simple filter, and with others of a given size."""
    bench.target(f"{what} curated minus the oracle's", wanted.at_least(-0.5), *result.compared("oracle"))
    best = result.best(FILTERS)
    asked = wanted.significantly_above(0) if name in LED else wanted.not_significantly_below(0)
    bench.target(
        f"{what} curated minus that of the best simple filter, {best}", asked, *result.compared(best)
    )
    if SIZED in result.shares:
        share = result.mean(SIZED) / result.mean("everything")
        bench.target(f"{what} {SIZED}, as a share of everything's", wanted.at_least(0.99), share)
        for other in ("random", "clip_score"):
            bench.target(
                f"{what} {SIZED} minus {other} of that size", wanted.above(0), *result.compared(other, SIZED)
            )


def in_fewer_steps(
    bench: Bench, pools: Sequence[ScenarioCuration], result: Retrained, label: dict[str, str], what: str
) -> None:
    """What our subset comes to in a part of the steps, beside everything in all of them."""
    for part in (2, 4):
        ours, steps = f"curated, 1/{part} of the steps", pools[0].setting.steps // part
        recalls = partial(ours_alone, name=ours, seeds=bench.seeds, steps=steps)
        quicker = joined(pools, recalls)
        both = Retrained(shares={**result.shares, **quicker.shares}, kept={**result.kept, **quicker.kept})
        bench.row(**label, **both.row(ours))
        if part == 2:
            name = f"{what}: mean recall of curated after half of the steps minus everything's after all"
            bench.target(name, wanted.at_least(0), *both.compared("everything", ours))


def ours_alone(curation: Curation, name: str, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Recall of our subset by a name, in so many steps."""
    return curation.recalls({name: curation.decide().weight}, seeds, steps)


for _name in SCENARIOS:
    BENCHMARK.parts[_name.replace(" ", "_")] = partial(scenario_part, _name)
BENCHMARK.part(seed_baseline)


@BENCHMARK.part
def every_kind(bench: Bench) -> None:
    """The mean over all scenarios with the usual target: one test set and one number, so that small leads add up."""
    names = [name for name, one in SCENARIOS.items() if one.usual]
    names = bench.pick(names, names[:2])
    result = mean_of([retrained(curations(bench, name), bench.seeds) for name in names])
    for method in result.shares:
        bench.row(scenarios=len(names), **result.row(method))
    best = result.best([method for method in result.shares if method not in ("curated", "oracle")])
    for other in (best, "oracle"):
        what = f"mean over {len(names)} scenarios: recall of curated minus that of {other}"
        bench.target(what, wanted.significantly_above(0), *result.compared(other))


@BENCHMARK.part
def unforeseen(bench: Bench) -> None:
    """Kinds of corruption that nothing was developed on."""
    for name in bench.pick(tuple(UNFORESEEN), tuple(UNFORESEEN)[:1]):
        judge(bench, name, curations(bench, name), column="unforeseen")


BENCHMARK.part(rare_group)


@BENCHMARK.part
def synthetic(bench: Bench) -> None:
    """Some scenarios on synthetic scenes, embedded by the same encoder, which has never seen any."""
    real = Dataset.of(bench)
    scenes = SyntheticDataset(real.data, real.cache / "synthetic")
    for name in bench.pick(("clean", "wrong 30", "web"), ("wrong 30",)):
        pools = [replace(each, dataset=scenes) for each in curations(bench, name)]
        judge(bench, name, pools, column="scenes", of="scenes, ")
