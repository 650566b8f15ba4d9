"""Curation of the scenarios' pools, with all that others would keep of them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench import Bench
from benchmarks.curation.curation import Curation, swapped
from benchmarks.data.corruptions import CLEAN
from benchmarks.data.datasets import Setting, some_images
from benchmarks.data.scenario_pools import EVERY_SCENARIO, Scenario, scenario_pool
from benchmarks.data.sources import Sources
from benchmarks.methods.baselines import baselines
from influencespace.core.arrays import BoolArray, FloatArray
from influencespace.data.pair_set import PairSet
from influencespace.stages.ingest.split import DrawSplit, SplitConfig

SIZED = "curated, of a given size"


@dataclass(frozen=True)
class ScenarioCuration(Curation):
    """The stages up to the decision, for a scenario."""

    name: str = ""

    @property
    def scenario(self) -> Scenario:
        return EVERY_SCENARIO[self.name]

    @property
    def key(self) -> list[Any]:
        return [*super().key, self.name, self.scenario]

    @cached_property
    def sources(self) -> Sources:
        return Sources(self.dataset)

    @cached_property
    def _pool(self) -> tuple[PairSet, NDArray[np.str_]]:
        return scenario_pool(self.sources, self.scenario, self.dataset.cache)

    @cached_property
    def _apart(self) -> dict[str, PairSet]:
        """The pool and the target that the split stage sets apart of it."""
        source, folder = self._pool[0].folder, self.folder / "apart"
        folder.mkdir(parents=True, exist_ok=True)
        embeddings = {"pool": source, "test": self.test.folder}
        DrawSplit(embeddings=embeddings, config=SplitConfig(), seed=0, artifact=folder, folder=folder)()
        return {role: PairSet(source, folder / f"{role}.npy") for role in ("pool", "target")}

    @cached_property
    def pool(self) -> PairSet:
        return self._apart["pool"] if self.scenario.own_target else self._pool[0]

    @cached_property
    def kind(self) -> NDArray[np.str_]:
        """What is wrong with each pair; empty for good ones."""
        kind: NDArray[np.str_] = self._pool[1][self.pool.rows]
        return kind

    @cached_property
    def wrong(self) -> BoolArray:
        bad: BoolArray = self.kind != CLEAN
        return bad

    @property
    def tests(self) -> tuple[int, ...]:
        return (0, 1) if self.scenario.elsewhere else super().tests

    @cached_property
    def target(self) -> PairSet:
        if self.scenario.own_target:
            return self._apart["target"]
        if self.scenario.shifted:
            return self.sources.coco()
        whole, count = self.dataset.dev(self.setting.target), self.scenario.target_images
        return whole if count is None else some_images(whole, count, self.folder / "target.npy")

    def judge_kinds(self) -> dict[str, Any]:
        """The decision against the planted truth, for every kind of corruption apart."""
        kept = self.decide().kept
        return {
            kind or "good": {
                "pairs": int((self.kind == kind).sum()),
                "pruned": float(1 - kept[self.kind == kind].mean()),
            }
            for kind in np.unique(self.kind)
        }

    def weights(self) -> dict[str, FloatArray]:
        """Ours, everything, only what is right, and every method that gets the share of right pairs."""
        size = self.scenario.size
        keep = int((~self.wrong).sum()) if size is None else round(size * len(self.pool))
        sized = {} if size is None else {SIZED: self.decide(target_size=size).weight}
        return {
            "curated": self.decide().weight,
            **sized,
            "everything": np.ones(len(self.pool)),
            "oracle": (~self.wrong).astype(np.float64),
            **baselines(self, keep),
        }


def scenario_setting(bench: Bench, name: str) -> Setting:
    scenario = EVERY_SCENARIO[name]
    return Setting(wrong=scenario.share, captions=scenario.captions, steps=bench.pick(200, 50))


def curations(bench: Bench, name: str) -> list[ScenarioCuration]:
    """The pool curated for either tar of dev and tested on the other; once, and tested on both, where the target is elsewhere."""
    each = swapped(bench, scenario_setting(bench, name), ScenarioCuration, name=name)
    return each[:1] if EVERY_SCENARIO[name].elsewhere else each
