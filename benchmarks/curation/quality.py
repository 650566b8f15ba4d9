"""How well curation works on real pairs: Flickr8k with captions shuffled on purpose, judged by the planted truth alone."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.cache import code_digest
from benchmarks.curation.curation import Curation, Setting, joined, retrained, rotated
from benchmarks.data.datasets import ENGINE, Dataset
from benchmarks.data.scenario_pools import Scenario
from influencespace.core.arrays import FloatArray
from influencespace.core.strata import means_by
from influencespace.data.artifacts import fingerprint
from influencespace.demo import run_demo

BENCHMARK = Benchmark(data="flickr8k")
DECILES = 10


def wrong(share: float, captions: int, steps: int) -> Setting:
    """Captions moved between pictures."""
    return Setting(scenario=Scenario(corruption="wrong", share=share, captions=captions), steps=steps)


@BENCHMARK.part
def detection(bench: Bench) -> None:
    """AUROC of the pooled score for wrong captions."""
    for captions, bound in bench.pick(((5, 0.96), (1, 0.90)), ((1, 0.90),)):
        setting = wrong(0.3, captions, steps=200)
        result = Curation(Dataset.of(bench), setting).judged()
        bench.row(captions=captions, steps=200, **result)
        name = f"AUROC of the pooled score, 30% wrong, {captions} caption(s) an image"
        bench.target(name, wanted.at_least(bound), result["auroc"])


def dirty(bench: Bench) -> list[Curation]:
    """A pool with 30 % wrong captions, in every turn."""
    return rotated(bench, wrong(0.3, bench.pick(5, 2), bench.pick(200, 100)), Curation)


@BENCHMARK.part
def recall(bench: Bench) -> None:
    """Retraining at equal steps, in every turn, paired over images and seeds."""
    curations = dirty(bench)
    result, captions = retrained(curations, bench.seeds), curations[0].scenario.captions
    for name in result.shares:
        bench.row(**result.row(name))
    for name in ("clip_score", "neg_clip_loss"):
        what = f"mean recall of curated minus {name} at the true fraction, 30% wrong, {captions} captions"
        bench.target(what, wanted.not_significantly_below(0), *result.compared(name))


@BENCHMARK.part
def other_steps(bench: Bench) -> None:
    """The same subsets at other numbers of steps: how much of a lead is left where a proxy is not trained too long."""
    curations = dirty(bench)
    for count in bench.pick((25, 50, 100, 200, 400), (25, 50)):
        result = joined(curations, partial(at_steps, seeds=bench.seeds, steps=count))
        for name in result.shares:
            bench.row(steps=count, **result.row(name))


def at_steps(curation: Curation, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Recall of every method's proxies in so many steps."""
    return curation.recalls(curation.weights(), seeds, steps)


def removals(curation: Curation, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Predicted influence and real change of the target loss for each quality decile of the pool, removed for real."""
    evidence = curation.evidence
    decile = curation.strata["quantile"] * DECILES // evidence.quantiles

    def loss(weight: FloatArray) -> float:
        return float(np.mean([curation.retrained(weight, seed)["choosing_loss"] for seed in seeds]))

    whole, rows = loss(np.ones(len(decile))), evidence.influence["pair"]
    predicted = means_by(decile[rows], evidence.influence["influence"], DECILES).mean
    change = [loss((decile != group).astype(np.float64)) - whole for group in range(DECILES)]
    are_wrong = means_by(decile, curation.wrong.astype(np.float64), DECILES).mean
    return {"predicted": predicted.tolist(), "change_of_loss": change, "wrong": are_wrong.tolist()}


@BENCHMARK.part
def removal(bench: Bench) -> None:
    """Strata really removed: the change of the target loss has the sign that the pooled influence T predicts."""
    curation = Curation(Dataset.of(bench), wrong(0.3, bench.pick(5, 2), steps=100))
    result = curation.cached(["removals", bench.seeds], partial(removals, curation, bench.seeds))
    for group in range(DECILES):
        bench.row(decile=group, **{key: values[group] for key, values in result.items()})
    predicted, change = np.array(result["predicted"]), np.array(result["change_of_loss"])
    crossings = [
        int(np.argmax(values > 0)) if (values > 0).any() else DECILES for values in (predicted, change)
    ]
    apart = float(abs(crossings[0] - crossings[1]))
    bench.target("crossing of T against real removal of deciles, 30% wrong", wanted.one_quantile, apart)
    name = "correlation of T with the real change of the target loss, by decile"
    bench.target(name, wanted.above(0), float(np.corrcoef(predicted, change)[0, 1]))


@BENCHMARK.part
def fraction(bench: Bench) -> None:
    """The fraction that the method chooses, against the planted one."""
    for captions in bench.pick((2, 5), (2,)):
        for steps in bench.pick((100, 200, 600), (100,)):
            for share in bench.pick((0.0, 0.1, 0.2, 0.3), (0.0, 0.3)):
                result = Curation(Dataset.of(bench), wrong(share, captions, steps)).judged()
                bench.row(captions=captions, steps=steps, **result)
                name = f"fraction pruned, {share:.0%} wrong, {captions} captions, {steps} steps"
                bench.target(name, wanted.within(0.05, result["wrong"]), result["pruned"])


def demo_summary(folder: Path, seed: int) -> dict[str, Any]:
    return run_demo(folder, ENGINE, seed=seed).summary()


@BENCHMARK.part
def demo(bench: Bench) -> None:
    """What `make demo` ends in, for several synthetic worlds with 25 % wrong captions."""
    for seed in bench.seeds:
        folder = bench.cache / "demo" / fingerprint([seed, code_digest("influencespace.demo")])
        summary = bench.cached(["demo", seed], partial(demo_summary, folder, seed))
        for method, result in summary["methods"].items():
            compared = summary["comparisons"].get(method, {})
            bench.row(
                world=seed,
                method=method,
                mean_recall=result["mean_recall"],
                kept=result["kept_fraction"],
                curated_minus_this=compared.get("difference"),
                paired_interval=compared.get("ci"),
            )
        for method in ("everything", "random", "clip_score"):
            compared = summary["comparisons"][method]
            name = f"synthetic world {seed}: mean recall of curated minus {method}"
            bench.target(name, wanted.above(0), compared["difference"], tuple(compared["ci"]))
