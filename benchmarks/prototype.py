"""The seed prototype's method beside ours at its own settings: why the one lost to chance."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import Benchmark
from pools import SCENARIOS, DirtyCuration
from retrained import Retrained, retrained
from world import Setting, World

from influencespace.core.select import SelectionConfig, top_fraction
from influencespace.estimators.influence import CurvatureConfig
from influencespace.estimators.similarity import random_score
from influencespace.stages.scoring.cluster import ClusterConfig
from influencespace.stages.scoring.influence import InfluenceConfig

DRAWS = "whole clusters, all draws"


@dataclass(frozen=True)
class PrototypeCuration(DirtyCuration):
    """The settings of the seed prototype: few clusters, a small sketch, five scored pairs in a stratum, a given size."""

    @property
    def folder(self) -> Path:
        return super().folder / "prototype"

    @property
    def clusters(self) -> ClusterConfig:
        return ClusterConfig(k=5)

    @property
    def curvature(self) -> CurvatureConfig:
        return CurvatureConfig(rank=10, max_rank=10)

    @property
    def attribution(self) -> InfluenceConfig:
        return InfluenceConfig(budget=5, target_budget=5)

    @property
    def choice(self) -> SelectionConfig:
        return SelectionConfig(tau_low=-0.001, target_size=0.8)

    def weights(self) -> dict[str, np.ndarray]:
        scores, keep = self.run(), round(0.8 * len(self.pool))
        uids = [str(uid) for uid in self.pool.column("uid")]
        draws = {f"whole clusters, draw {draw}": self.whole_clusters(draw, keep) for draw in range(3)}
        return {
            "curated": self.curated(scores),
            "everything": np.ones(len(self.pool)),
            "random": top_fraction(random_score(uids), keep).astype(np.float64),
            **draws,
            "oracle": (~self.wrong).astype(np.float64),
        }

    def whole_clusters(self, draw: int, keep: int, samples: int = 5) -> np.ndarray:
        """The prototype's method: clusters leave whole, by the mean in-training influence of a few of their pairs.

        The lowest first, until `keep` pairs are left; of the last cluster a random part stays.
        """
        scores = self.run()
        cluster, influence = scores.strata["cluster"], scores.influence
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


def prototype(bench: Benchmark, world: World, quick: bool) -> None:
    """The prototype's method beside ours at its settings, two epochs, a fifth removed: why the one lost to chance."""
    scenario = SCENARIOS["wrong 20"]
    setting = Setting(wrong=scenario.share, captions=scenario.captions, steps=80)
    curation = PrototypeCuration(world, setting, "wrong 20")
    found = retrained([curation], bench.seeds)
    naive = [values for method, values in found.shares.items() if method.startswith("whole clusters")]
    # each of our proxies beside one of every draw, so that both are of the same images and seeds
    drawn = Retrained(
        shares={"curated": np.tile(found.shares["curated"], (len(naive), 1)), DRAWS: np.concatenate(naive)},
        kept={},
    )
    for method, one in (*((method, found) for method in found.shares), (DRAWS, drawn)):
        bench.row(
            method=method,
            mean_recall=one.mean(method),
            interval=list(one.around(method)),
            kept=one.kept.get(method),
        )
    for theirs, one in (("random", found), (DRAWS, drawn)):
        gap, around = one.compared(theirs)
        bench.target(
            name=f"prototype's settings: mean recall of curated minus {theirs}",
            target="surely above 0",
            measured=gap,
            interval=around,
            reached=around[0] > 0,
        )
