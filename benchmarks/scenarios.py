"""Pools of real pairs with the kinds of dirt that web data has, each with its planted truth, which judges only.

What the default settings prune of each kind, and proxies retrained at equal steps on what they and others keep: the
others are told how much of the pool is dirt, ours is told nothing. Parts are the scenarios. Needs the real data; see
docs/benchmarks.md.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from common import Benchmark, cached
from dirt import clean, wrong
from pools import SCENARIOS, SIZED, UNFORESEEN, DirtyCuration
from prototype import prototype
from rare_group import rare_group
from retrained import Retrained, mean_of, retrained
from world import Setting, SyntheticWorld, World, measure_on_real_pairs

FILTERS = ("clip_score", "early_clip_score", "proxy_clip_score", "neg_clip_loss")
LED = ("hard wrong", "boilerplate", "irrelevant", "blurred", "web")
"""Where the best of the simple filters is to be surely beaten."""
QUICKER = ("wrong 30", "web")
"""Where the full set's quality is asked for in half of its steps."""


def curations(name: str, world: World, quick: bool) -> list[DirtyCuration]:
    """The pool curated for one tar of dev and tested on the other, and the other way round; once, and tested on both, where the
    target is from elsewhere."""
    scenario = (SCENARIOS | UNFORESEEN)[name]
    setting = Setting(wrong=scenario.share, captions=scenario.captions, steps=50 if quick else 200)
    targets = (0,) if quick or scenario.elsewhere else (0, 1)
    return [DirtyCuration(world, replace(setting, target=target), name) for target in targets]


def judged(
    name: str, bench: Benchmark, world: World, quick: bool, column: str = "scenario", of: str = ""
) -> None:
    """What becomes of each kind of pair by the default settings, and what a proxy retrained on the rest is worth.

    Rows say in `column` which scenario they are of, so that each family has its tables.
    """
    swapped = curations(name, world, quick)
    found = [cached(world.cache, ["harmful", name, each.setting], each.judge) for each in swapped]
    kinds = [cached(world.cache, ["kinds", name, each.setting], each.judge_kinds) for each in swapped]
    for kind in kinds[0]:
        pruned = float(np.mean([each[kind]["pruned"] for each in kinds]))
        bench.row(**{column: name}, kind=kind, pairs=kinds[0][kind]["pairs"], pruned=pruned)
    planted = swapped[0].scenario.dirt
    if planted in (clean, wrong):
        farthest = max(found, key=lambda each: abs(each["pruned"] - each["wrong"]))
        allowed = 0.04 if farthest["wrong"] else 0.05
        bench.target(
            name=f"{of}{name}: fraction pruned by the method itself, by the target for which it is farther off",
            target=f"within {allowed} of {farthest['wrong']:.3f}"
            if farthest["wrong"]
            else f"at most {allowed}",
            measured=farthest["pruned"],
            reached=abs(farthest["pruned"] - farthest["wrong"]) <= allowed,
        )
    else:
        precision = min((each["precision"] for each in found if each["pruned"]), default=None)
        bench.target(
            name=f"{of}{name}: share of what was pruned as harmful that is dirt, by the target for which it is lower",
            target="at least 0.9",
            measured=precision,
            reached=precision is not None and precision >= 0.9,
        )
    compare_retrained(name, bench, swapped, column, of)


def compare_retrained(
    name: str, bench: Benchmark, swapped: Sequence[DirtyCuration], column: str, of: str
) -> None:
    """Mean recall of proxies retrained at equal steps, ours paired with every other."""
    found = retrained(swapped, bench.seeds)
    for method in found.shares:
        bench.row(**{column: name}, **found.row(method))
    gap, around = found.compared("oracle")
    bench.target(
        name=f"{of}{name}: mean recall of curated minus the oracle's",
        target="at least -0.5",
        measured=gap,
        interval=around,
        reached=gap >= -0.5,
    )
    best = found.best(FILTERS)
    gap, around = found.compared(best)
    must_lead = name in LED or name in UNFORESEEN
    bench.target(
        name=f"{of}{name}: mean recall of curated minus that of the best simple filter, {best}",
        target="surely above 0" if must_lead else "not surely below 0",
        measured=gap,
        interval=around,
        reached=around[0] > 0 if must_lead else around[1] >= 0,
    )
    if SIZED in found.shares:
        share = found.mean(SIZED) / found.mean("everything")
        bench.target(
            name=f"{of}{name}: mean recall of {SIZED}, as a share of everything's",
            target="at least 0.99",
            measured=share,
            reached=share >= 0.99,
        )
        for other in ("random", "clip_score"):
            gap, around = found.compared(other, SIZED)
            bench.target(
                name=f"{of}{name}: mean recall of {SIZED} minus {other} of that size",
                target="above 0",
                measured=gap,
                interval=around,
                reached=gap > 0,
            )
    if name in QUICKER:
        in_fewer_steps(name, bench, swapped, found, column, of)


def in_fewer_steps(
    name: str, bench: Benchmark, swapped: Sequence[DirtyCuration], found: Retrained, column: str, of: str
) -> None:
    """What our subset comes to in a part of the steps, beside everything in all of them."""
    for part in (2, 4):
        values = [np.array(each.in_fewer_steps(part, tuple(bench.seeds))) for each in swapped]
        ours = f"curated, 1/{part} of the steps"
        both = Retrained(
            shares={**found.shares, ours: np.concatenate(values, 1)},
            kept={**found.kept, ours: found.kept["curated"]},
        )
        bench.row(**{column: name}, **both.row(ours))
        if part == 2:
            gap, around = both.compared("everything", ours)
            bench.target(
                name=f"{of}{name}: mean recall of curated after half of the steps minus everything's after all",
                target="at least 0",
                measured=gap,
                interval=around,
                reached=gap >= 0,
            )


def every_kind(bench: Benchmark, world: World, quick: bool) -> None:
    """The mean over all scenarios with the whole target: one test set and one number, so that small leads add up."""
    names = [
        name
        for name, scenario in SCENARIOS.items()
        if scenario.target_pairs is None and not scenario.elsewhere
    ]
    chosen = names[:2] if quick else names
    found = mean_of([retrained(curations(name, world, quick), bench.seeds) for name in chosen])
    for method in found.shares:
        bench.row(scenarios=len(chosen), **found.row(method))
    best = found.best([method for method in found.shares if method not in ("curated", "oracle")])
    for other in (best, "oracle"):
        gap, around = found.compared(other)
        bench.target(
            name=f"mean over {len(chosen)} scenarios: recall of curated minus that of {other}",
            target="surely above 0",
            measured=gap,
            interval=around,
            reached=around[0] > 0,
        )


def unforeseen(bench: Benchmark, world: World, quick: bool) -> None:
    """Kinds of dirt that nothing was developed on."""
    for name in list(UNFORESEEN)[:1] if quick else UNFORESEEN:
        judged(name, bench, world, quick, column="unforeseen")


def synthetic(bench: Benchmark, world: World, quick: bool) -> None:
    """Some scenarios on synthetic scenes, embedded by the same encoder, which has never seen any."""
    scenes = SyntheticWorld(world.data, world.cache / "synthetic")
    for name in ("wrong 30",) if quick else ("clean", "wrong 30", "web"):
        judged(name, bench, scenes, quick, column="scenes", of="scenes, ")


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
