"""Every rival beside ours, with the same help, in every fold of the rotation.

`curated` is ours at the default settings; a rival ranks pairs in its place and keeps as many. `NAME_validated` has fraction,
weights and steps chosen by at most seven retrainings of two seeds on one half of the target, as `curated_validated` has by
`selection.weighting: auto`. Of the oracle, which knows the planted truth, the steps are chosen alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.curation.curation import Curation, joined, rotated
from benchmarks.curation.retrain_eval import Retrained, mean_of
from benchmarks.curation.scenario_curation import scenario_setting
from influencespace.config import RunConfig, load_config
from influencespace.core.arrays import FloatArray
from influencespace.run import Run
from influencespace.stages.proxies.train_many import Given
from influencespace.stages.rivals.names import METHODS, SUFFIX, VALIDATED
from influencespace.stages.rivals.sources import Source, source_of
from influencespace.stages.selection.weighting import LONGER, SEEDS

BENCHMARK = Benchmark(data="flickr8k", seeds=(0, 1))
STEPS = 100  # of which retraining may choose half or twice as many
NOISE = (1,)
"""Seeds of what is corrupted: each turn of `wrong` costs some 250 trainings."""
OURS, OURS_VALIDATED = "curated", f"curated{SUFFIX}"
EVERYTHING, ORACLE = "everything", "oracle"
SCENARIOS = {"wrong": "wrong 30", "clean": "clean", "web": "web"}
"""Parts, and the scenario that each is of."""
WHOLLY = "wrong"
"""Where every rival is trained; of these `mgd` takes longest."""
NEAR = ("clip_score", "neg_clip_loss", "norm_sim", "dfn", "datainf", "semdedup", "m_flyt", "pool_and_target")
"""Rivals elsewhere: of each kind the one that is best in `wrong`, and all that come near ours there."""


@dataclass(frozen=True)
class RivalCuration(Curation):
    """The stages up to the rivals', all of them validated."""

    @property
    def config(self) -> RunConfig:
        settings = {
            "proxy.train.steps": self.setting.steps,
            "proxy.choose_steps": False,
            "embed.encoder": self.dataset.encoder,  # whose temperature is negCLIPLoss's
            "selection.weighting": "auto",
        }
        return load_config(None, {**settings, **self.changes})

    @cached_property
    def run(self) -> Run:
        return self.until("rivals")

    def source(self, method: str) -> Source:
        """What a method trains on, and for how long."""
        steps = self.setting.steps
        if method == OURS:
            return self._pairs(self.decide(weighting="uniform").weight, steps)
        if method == ORACLE:
            return self._pairs((~self.wrong).astype(np.float64), steps)
        return source_of(self.run, OURS if method == OURS_VALIDATED else method)

    def _pairs(self, weight: FloatArray, steps: int) -> Source:
        return Source(weights=Given(weight), steps=steps, kept_fraction=float((weight > 0).mean()))

    def with_steps(self, method: str) -> Source:
        """The same with the steps that the choosing half of the target likes best."""
        source = self.source(method)
        tried = [replace(source, steps=round(part * source.steps)) for part in (1.0, *LONGER)]
        return min(tried, key=lambda one: np.mean([self.outcome(one, s)["choosing_loss"] for s in SEEDS]))

    def outcome(self, source: Source, seed: int) -> dict[str, Any]:
        """Of one proxy of a source."""
        pairs = source.pairs or self.pool
        return self.retrained(source.weights.read(0, len(pairs)), seed, source.steps, pairs)

    def judge_methods(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Recall by test image of every method's proxies (seeds, images), and what each trains on."""
        given = (OURS, OURS_VALIDATED, ORACLE, *self.config.train.methods)
        sources = {name: self.source(name) for name in dict.fromkeys(given)}
        sources[f"{ORACLE}{SUFFIX}"] = self.with_steps(ORACLE)
        return {
            "shares": {
                name: [self.outcome(one, seed)["shares"] for seed in seeds] for name, one in sources.items()
            },
            "kept": {name: one.kept_fraction for name, one in sources.items()},
            "steps": {name: one.steps for name, one in sources.items()},
            "weights": self.run.manifest("selection").details["trials"],
        }

    def methods(self, seeds: Sequence[int]) -> dict[str, Any]:
        """As `judge_methods`, from the cache."""
        return self.cached(["rivals", list(seeds)], partial(self.judge_methods, seeds))


def curations(bench: Bench, part: str) -> list[RivalCuration]:
    """A part's scenario in every turn."""
    setting = replace(scenario_setting(bench, SCENARIOS[part]), steps=bench.pick(STEPS, 20))
    near = (OURS, EVERYTHING, "random", *NEAR, *(f"{name}{SUFFIX}" for name in (EVERYTHING, *NEAR)))
    changes = {"train.methods": list(METHODS if part == WHOLLY else near)}
    return rotated(bench, setting, RivalCuration, noise_seeds=NOISE, changes=changes)


def judge(bench: Bench, part: str) -> None:
    """One row for each method, and ours beside each rival that got the same help."""
    turns = curations(bench, part)
    result = joined(turns, lambda each: each.methods(bench.seeds))
    steps = [each.methods(bench.seeds)["steps"] for each in turns]
    for method in result.shares:
        ours = OURS_VALIDATED if method.endswith(SUFFIX) else OURS
        gap, around = result.compared(method, ours)
        bench.row(
            rivals=part,
            method=method,
            mean_recall=result.mean(method),
            interval=list(result.around(method)),
            kept=result.kept[method],
            steps=float(np.mean([each[method] for each in steps])),
            ours_minus_this=gap,
            paired_interval=list(around),
        )
    compare(bench, part, result)


def compare(bench: Bench, what: str, result: Retrained) -> None:
    """The promises: ahead of each rival on the mean, and behind none that is the best."""
    rivals = [name for name in result.shares if name in VALIDATED]
    for rival in rivals:
        name = f"{what}: mean recall of {OURS_VALIDATED} minus {rival}"
        bench.target(name, wanted.significantly_above(0), *result.compared(rival, OURS_VALIDATED))
    best = result.best(rivals)
    name = f"{what}: mean recall of {OURS_VALIDATED} minus the best rival in hindsight, {best}"
    bench.target(name, wanted.not_significantly_below(0), *result.compared(best, OURS_VALIDATED))
    oracle = f"{ORACLE}{SUFFIX}"
    name = f"{what}: mean recall of {OURS_VALIDATED} minus {oracle}"
    bench.target(name, wanted.not_significantly_below(0), *result.compared(oracle, OURS_VALIDATED))


for _part in SCENARIOS:
    BENCHMARK.parts[_part] = partial(judge, part=_part)


@BENCHMARK.part
def mean(bench: Bench) -> None:
    """Over all parts: one test set and one number, so that small leads add up."""
    each = [
        joined(curations(bench, part), lambda turn: turn.methods(bench.seeds))
        for part in bench.pick(tuple(SCENARIOS), tuple(SCENARIOS)[:1])
    ]
    compare(bench, f"mean over {len(each)} scenarios", mean_of(each))
