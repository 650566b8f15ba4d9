"""How well curation works on real pairs: Flickr8k with captions shuffled on purpose, judged by the planted truth.

The truth is used for judging only. `--scenario all`, or the name of one, is benchmarks/scenarios.py. Needs the real data
(INFLUENCESPACE_DATA or ../shared/data); see docs/benchmarks.md.
"""

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import scenarios
from common import DECIDING, Benchmark, cached, code_version
from curation import METHODS, Curation
from retrained import Retrained, retrained
from world import RUNTIME, Setting, World, measure_on_real_pairs

from influencespace.data.artifacts import fingerprint
from influencespace.demo import run_demo


def chosen_fraction(bench: Benchmark, world: World, quick: bool) -> None:
    """The fraction that the method chooses, against the planted one."""
    fractions = (0.0, 0.3) if quick else (0.0, 0.1, 0.2, 0.3)
    for captions in (2,) if quick else (2, 5):
        for steps in (100,) if quick else (100, 200, 600):
            for wrong in fractions:
                setting = Setting(wrong=wrong, captions=captions, steps=steps)
                key = ["harmful", setting]
                result = cached(world.cache, key, Curation(world, setting).judge)
                bench.row(captions=captions, steps=steps, **result)
                gap = result["pruned"] - result["wrong"]
                bench.target(
                    name=f"fraction pruned, {wrong:.0%} wrong, {captions} captions, {steps} steps",
                    target="at most 0.05" if wrong == 0 else f"within 0.05 of {result['wrong']:.3f}",
                    measured=result["pruned"],
                    reached=abs(gap) <= 0.05,
                )


def detection(bench: Benchmark, world: World, quick: bool) -> None:
    """AUROC of the pooled score for wrong captions."""
    for captions, least in ((5, 0.96), (1, 0.90)):
        if quick and captions == 5:
            continue
        setting = Setting(wrong=0.3, captions=captions, steps=200)
        result = cached(world.cache, ["harmful", setting], Curation(world, setting).judge)
        bench.row(captions=captions, steps=200, **result)
        bench.target(
            name=f"AUROC of the pooled score, 30% wrong, {captions} caption(s) an image",
            target=f"at least {least}",
            measured=result["auroc"],
            reached=result["auroc"] >= least,
        )


def recall(bench: Benchmark, world: World, quick: bool) -> None:
    """Retraining at equal steps, dev's two tars swapped and averaged, paired over images and seeds."""
    captions = 2 if quick else 5
    curations = [
        Curation(world, Setting(wrong=0.3, captions=captions, steps=100 if quick else 200, target=target))
        for target in ((0,) if quick else (0, 1))
    ]
    found = retrained(curations, bench.seeds)
    for name in METHODS:
        bench.row(**found.row(name))
    for name in ("clip_score", "proxy_clip_score"):
        gap, around = found.compared(name)
        bench.target(
            name=f"mean recall of curated minus {name} at the true fraction, 30% wrong, {captions} captions",
            target="not surely below 0",
            measured=gap,
            interval=around,
            reached=around[1] >= 0,
        )


def other_steps(bench: Benchmark, world: World, quick: bool) -> None:
    """The same subsets at other numbers of steps: how much of a lead is left where a proxy is not trained too long."""
    steps = (25, 50) if quick else (25, 50, 100, 200, 400)
    setting = Setting(wrong=0.3, captions=2 if quick else 5, steps=100 if quick else 200)
    targets = (0,) if quick else (0, 1)
    curations = [Curation(world, replace(setting, target=target)) for target in targets]
    weights = [curation.weights() for curation in curations]
    for count in steps:
        shares = {
            name: np.concatenate(
                [
                    np.array([curation.recall_of(weight[name], seed, count) for seed in bench.seeds])
                    for curation, weight in zip(curations, weights, strict=True)
                ],
                1,
            )
            for name in METHODS
        }
        found = Retrained(shares=shares, kept={})
        for name in METHODS:
            bench.row(steps=count, **found.row(name))


def removal(bench: Benchmark, world: World, quick: bool) -> None:
    """Strata really removed: the change of the target loss has the sign that T predicts."""
    groups = 10
    setting = Setting(wrong=0.3, captions=2 if quick else 5, steps=100)
    seeds = (0,) if quick else (0, 1, 2)
    curation = Curation(world, setting)
    result = cached(
        world.cache, ["removals", setting, groups, seeds], lambda: curation.removals(groups, seeds)
    )
    for group in range(groups):
        bench.row(decile=group, **{key: values[group] for key, values in result.items()})
    predicted, change = np.array(result["predicted"]), np.array(result["change_of_loss"])

    def crossing(values: np.ndarray) -> int:
        return int(np.argmax(values > 0)) if (values > 0).any() else groups

    apart = abs(crossing(predicted) - crossing(change))
    bench.target(
        name="crossing of T against real removal of deciles, 30% wrong",
        target="within one quantile",
        measured=float(apart),
        reached=apart <= 1,
    )
    correlation = float(np.corrcoef(predicted, change)[0, 1])
    bench.target(
        name="correlation of T with the real change of the target loss, by decile",
        target="report (positive)",
        measured=correlation,
        reached=correlation > 0,
    )


def demo(bench: Benchmark, world: World, quick: bool) -> None:
    """What `make demo` ends in, for several synthetic worlds with 25 % wrong captions."""
    for seed in (0,) if quick else (0, 1, 2):
        code = (*DECIDING, "demo.py")
        folder = world.cache / "demo" / fingerprint([seed, code_version(code)])
        summary = cached(world.cache, ["demo", seed], partial(run_demo, folder, RUNTIME, seed=seed), code)
        for method, found in summary["methods"].items():
            compared = summary["comparisons"].get(method, {})
            bench.row(
                world=seed,
                method=method,
                mean_recall=found["mean_recall"],
                kept=found["kept_fraction"],
                curated_minus_this=compared.get("difference"),
                paired_interval=compared.get("ci"),
            )
        for method in ("everything", "random", "clip_score"):
            compared = summary["comparisons"][method]
            bench.target(
                name=f"synthetic world {seed}: mean recall of curated minus {method}",
                target="above 0",
                measured=compared["difference"],
                interval=tuple(compared["ci"]),
                reached=compared["difference"] > 0,
            )


PARTS = {
    "detection": detection,
    "recall": recall,
    "other_steps": other_steps,
    "removal": removal,
    "fraction": chosen_fraction,
    "demo": demo,
}


if __name__ == "__main__":
    if "--scenario" in sys.argv:  # a benchmark of its own: its parts are the scenarios
        at = sys.argv.index("--scenario")
        chosen = scenarios.PARTS if sys.argv[at + 1] == "all" else sys.argv[at + 1 : at + 2]
        sys.argv[at : at + 2] = ["--parts", *chosen]
        sys.exit(scenarios.main())
    sys.exit(measure_on_real_pairs(__doc__ or "", "quality", ((0,), (0, 1, 2)), PARTS))
