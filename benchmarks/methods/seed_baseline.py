"""The seed experiment's method beside ours at its own settings: why the one lost to chance."""

from dataclasses import dataclass, replace

import numpy as np

from benchmarks import wanted
from benchmarks.bench import Bench
from benchmarks.curation.curation import retrained, rotated
from benchmarks.curation.retrain_eval import Retrained
from benchmarks.curation.scenario_curation import ScenarioCuration, scenario_setting
from influencespace.core.arrays import FloatArray

SCENARIO, SHARE = "wrong 20", 0.8
SETTINGS = {
    "cluster.k": 5,
    "curvature.rank": 10,
    "curvature.max_rank": 10,
    "influence.max_samples": 1000,
    "influence.target_samples": 5,
    "selection.tau_low": -0.001,
    "selection.target_size": SHARE,
}
"""Few clusters, a small sketch, five scored pairs for each stratum, a given size."""
DRAWS = "whole clusters, all draws"


@dataclass(frozen=True)
class SeedCuration(ScenarioCuration):
    """The settings of the seed experiment."""

    def weights(self) -> dict[str, FloatArray]:
        keep = round(SHARE * len(self.pool))
        return {
            "curated": self.decide().weight,
            "everything": np.ones(len(self.pool)),
            "random": self.filters(keep)["random"],
            **{f"whole clusters, draw {draw}": self.whole_clusters(draw, keep) for draw in range(3)},
            "oracle": (~self.wrong).astype(np.float64),
        }

    def whole_clusters(self, draw: int, keep: int, samples: int = 5) -> FloatArray:
        """The seed's method: clusters leave whole, by the mean in-sample influence of a few of their pairs.

        The lowest first, until `keep` pairs are left; of the last cluster a random part stays.
        """
        cluster, influence = self.strata["cluster"], self.evidence.influence
        rng = np.random.default_rng(draw)
        means = {}
        for label in np.unique(cluster):
            scored = np.flatnonzero(cluster[influence["pair"]] == label)
            few = rng.choice(scored, min(samples, len(scored)), replace=False)
            means[int(label)] = float(influence["influence_in"][few].mean())
        kept = np.ones(len(cluster))
        for label in sorted(means, key=lambda name: means[name]):
            surplus = int(kept.sum()) - keep
            rows = np.flatnonzero(cluster == label)
            kept[rng.permutation(rows)[: max(surplus, 0)]] = 0
        return kept


def seed_baseline(bench: Bench) -> None:
    """The seed's method beside ours at its settings, two epochs, a fifth removed."""
    setting = replace(scenario_setting(bench, SCENARIO), steps=80)
    result = retrained(rotated(bench, setting, SeedCuration, changes=SETTINGS), bench.seeds)
    naive = [values for method, values in result.shares.items() if method.startswith("whole clusters")]
    # each of our proxies beside one of every draw, so that both are of the same images and seeds
    ours = np.tile(result.shares["curated"], (len(naive), 1))
    drawn = Retrained(shares={"curated": ours, DRAWS: np.concatenate(naive)})
    for method, one in (*((method, result) for method in result.shares), (DRAWS, drawn)):
        row = one.row(method)
        bench.row(**{name: row[name] for name in ("method", "mean_recall", "interval", "kept")})
    for theirs, one in (("random", result), (DRAWS, drawn)):
        name = f"seed baseline's settings: mean recall of curated minus {theirs}"
        bench.target(name, wanted.significantly_above(0), *one.compared(theirs))
