"""Pools of real pairs with the kinds of dirt that web data has, each with its planted truth, which judges only.

What the default settings prune of each kind, and students retrained at equal steps on what they and others keep: the
others are told how much of the pool is dirt, ours is told nothing. Parts are the scenarios. Needs the real data; see
docs/benchmarks.md.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from common import Benchmark, cached
from curation import Setting, SyntheticWorld, World, measure_on_real_pairs
from dirt import clean, wrong
from pools import SCENARIOS, SIZED, UNFORESEEN, DirtyCuration
from prototype import prototype
from rare_group import rare_group

from influencespace.core.metrics import bootstrap_means, interval

FILTERS = ("clip_score", "early_clip_score", "student_clip_score", "neg_clip_loss")
QUICKER = ("wrong 30", "web")
"""Where the full set's quality is asked for in half of its steps."""


def judged(name: str, bench: Benchmark, world: World, quick: bool, of: str = "") -> None:
    """What becomes of each kind of pair by the default settings, and what a student retrained on the rest is worth."""
    scenario = (SCENARIOS | UNFORESEEN)[name]
    setting = setting_of(name, quick)
    curation = DirtyCuration(world, setting, name)
    found = cached(world.cache, ["harmful", name, setting], curation.judge)
    kinds = cached(world.cache, ["kinds", name, setting], curation.judge_kinds)
    for kind, values in kinds.items():
        bench.row(scenario=of + name, kind=kind, **values)
    has_dirt = bool(found["wrong"])
    if scenario.dirt in (clean, wrong):
        bench.target(
            name=f"{of}{name}: fraction pruned by the method itself",
            target=f"within 0.04 of {found['wrong']:.3f}" if has_dirt else "at most 0.05",
            measured=found["pruned"],
            reached=abs(found["pruned"] - found["wrong"]) <= (0.04 if has_dirt else 0.05),
        )
    if found["precision"] is not None and scenario.dirt not in (clean, wrong):
        bench.target(
            name=f"{of}{name}: share of what was pruned as harmful that is dirt",
            target="at least 0.9",
            measured=found["precision"],
            reached=found["precision"] >= 0.9,
        )
    retrained_part(name, bench, curation, of)


def retrained_part(name: str, bench: Benchmark, curation: DirtyCuration, of: str) -> None:
    """Mean recall of students retrained at equal steps, ours paired with every other."""
    seeds = tuple(bench.seeds)
    key = [name, curation.setting, seeds]
    result = retrained(curation, seeds)
    shares = {method: np.array(values) for method, values in result["shares"].items()}
    draws = {method: bootstrap_means(values) for method, values in shares.items()}
    for method in shares:
        bench.row(
            scenario=of + name,
            method=method,
            mean_recall=float(shares[method].mean()),
            interval=list(interval(draws[method])),
            kept=result["kept"][method],
            curated_minus_this=float(shares["curated"].mean() - shares[method].mean()),
            paired_interval=list(interval(draws["curated"] - draws[method])),
        )

    def compared(to: str, ours: str = "curated") -> tuple[float, tuple[float, float]]:
        gap = float(shares[ours].mean() - shares[to].mean())
        return gap, interval(draws[ours] - draws[to])

    best = max(FILTERS, key=lambda method: float(shares[method].mean()))
    gap, around = compared("oracle")
    bench.target(
        name=f"{of}{name}: mean recall of curated minus the oracle's",
        target="at least -0.5",
        measured=gap,
        interval=around,
        reached=gap >= -0.5,
    )
    gap, around = compared(best)
    bench.target(
        name=f"{of}{name}: mean recall of curated minus that of the best simple filter, {best}",
        target="surely above 0, or not surely below where the filter beats the oracle",
        measured=gap,
        interval=around,
        reached=around[0] > 0 or bool(around[1] >= 0 and shares[best].mean() >= shares["oracle"].mean()),
    )
    if SIZED in shares:
        share = float(shares[SIZED].mean() / shares["everything"].mean())
        bench.target(
            name=f"{of}{name}: mean recall of {SIZED}, as a share of everything's",
            target="at least 0.99",
            measured=share,
            reached=share >= 0.99,
        )
        for other in ("random", "clip_score"):
            gap, around = compared(other, SIZED)
            bench.target(
                name=f"{of}{name}: mean recall of {SIZED} minus {other} of that size",
                target="above 0",
                measured=gap,
                interval=around,
                reached=gap > 0,
            )
    if name in QUICKER:
        quicker = cached(curation.world.cache, ["fewer steps", *key], partial(curation.in_fewer_steps, seeds))
        for part, values in quicker.items():
            some = bootstrap_means(np.array(values)) - draws["everything"]
            bench.row(
                scenario=of + name,
                method=f"curated, 1/{part} of the steps",
                mean_recall=float(np.mean(values)),
                interval=list(interval(bootstrap_means(np.array(values)))),
                kept=result["kept"]["curated"],
                curated_minus_this=None,
                paired_interval=None,
            )
            if part == "2":
                bench.target(
                    name=f"{of}{name}: mean recall of curated after half of the steps minus everything's after all",
                    target="at least 0",
                    measured=float(np.mean(values) - shares["everything"].mean()),
                    interval=interval(some),
                    reached=bool(np.mean(values) >= shares["everything"].mean()),
                )


def retrained(curation: DirtyCuration, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Recall by test image of students retrained on each method's subset, (seeds, images) for each; computed once."""
    key = ["scenario retrained", curation.name, curation.setting, seeds]
    return cached(curation.world.cache, key, partial(curation.retrained, seeds))


def every_kind(bench: Benchmark, world: World, quick: bool) -> None:
    """The mean over all scenarios with the whole target: one test set and one number, so that small leads add up."""
    names = [
        name
        for name, scenario in SCENARIOS.items()
        if scenario.target_pairs is None and not scenario.shifted and not scenario.own_target
    ]
    found = [
        retrained(DirtyCuration(world, setting_of(name, quick), name), tuple(bench.seeds))["shares"]
        for name in (names[:2] if quick else names)
    ]
    methods = [method for method in found[0] if all(method in shares for shares in found)]
    means = {method: np.mean([shares[method] for shares in found], axis=0) for method in methods}
    draws = {method: bootstrap_means(values) for method, values in means.items()}
    for method, values in means.items():
        bench.row(
            method=method,
            scenarios=len(found),
            mean_recall=float(values.mean()),
            curated_minus_this=float(means["curated"].mean() - values.mean()),
            paired_interval=list(interval(draws["curated"] - draws[method])),
        )
    others = [method for method in methods if method not in ("curated", "oracle")]
    best = max(others, key=lambda method: float(means[method].mean()))
    for other in (best, "oracle"):
        around = interval(draws["curated"] - draws[other])
        bench.target(
            name=f"mean over {len(found)} scenarios: recall of curated minus that of {other}",
            target="surely above 0",
            measured=float(means["curated"].mean() - means[other].mean()),
            interval=around,
            reached=around[0] > 0,
        )


def unforeseen(bench: Benchmark, world: World, quick: bool) -> None:
    """Kinds of dirt that nothing was developed on."""
    for name in list(UNFORESEEN)[:1] if quick else UNFORESEEN:
        judged(name, bench, world, quick)


def setting_of(name: str, quick: bool) -> Setting:
    scenario = (SCENARIOS | UNFORESEEN)[name]
    return Setting(wrong=scenario.share, captions=scenario.captions, steps=50 if quick else 200)


def synthetic(bench: Benchmark, world: World, quick: bool) -> None:
    """Some scenarios on synthetic scenes, embedded by the same encoder, which has never seen any."""
    scenes = SyntheticWorld(world.data, world.cache / "synthetic")
    for name in ("wrong 30",) if quick else ("clean", "wrong 30", "web"):
        judged(name, bench, scenes, quick, of="scenes, ")


PARTS: dict[str, Callable[[Benchmark, World, bool], None]] = {
    **{name.replace(" ", "_"): partial(judged, name) for name in SCENARIOS},
    "prototype": prototype,
    "every_kind": every_kind,
    "unforeseen": unforeseen,
    "rare_group": rare_group,
    "synthetic": synthetic,
}


def main() -> int:
    return measure_on_real_pairs(__doc__ or "", "scenarios", ((0,), (0, 1, 2)), PARTS)


if __name__ == "__main__":
    sys.exit(main())
