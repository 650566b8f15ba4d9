"""Curation of the scenarios' pools, with all that others would keep of them."""

from dataclasses import dataclass

import numpy as np

from benchmarks.bench import Bench
from benchmarks.curation.curation import Curation, Setting, rotated
from benchmarks.data.scenario_pools import EVERY_SCENARIO
from benchmarks.methods.baselines import baselines
from influencespace.core.arrays import FloatArray

SIZED = "curated, of a given size"


@dataclass(frozen=True)
class ScenarioCuration(Curation):
    """The stages up to the decision, beside every other method."""

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
    """Of a scenario by its name."""
    return Setting(scenario=EVERY_SCENARIO[name], steps=bench.pick(200, 50))


def curations(bench: Bench, name: str) -> list[ScenarioCuration]:
    """A scenario in every turn."""
    return rotated(bench, scenario_setting(bench, name), ScenarioCuration)
