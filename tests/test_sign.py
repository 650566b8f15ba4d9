"""The sign, by real retraining: without what scores call harmful the target's loss falls, without what helps it rises."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from planted import Planted, plant

from influencespace.core.contrastive import info_nce
from influencespace.core.metrics import auroc
from influencespace.core.select import SelectionConfig
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import LocalEngine
from influencespace.estimators.influence import CurvatureConfig
from influencespace.models.training import HeadsConfig
from influencespace.stages.proxies.proxies import ProxyConfig, proxies, train_subset
from influencespace.stages.scoring.cluster import ClusterConfig, cluster
from influencespace.stages.scoring.curvature import TargetConfig, curvature
from influencespace.stages.scoring.influence import InfluenceConfig, attribute
from influencespace.stages.selection.evidence import Scores, decide

PAIRS, WRONG, QUANTILES = 600, 0.25, 10
SEEDS = (100, 101, 102)
PROXYS = ProxyConfig(
    train=HeadsConfig(dimension=32, steps=60, batch_size=64, learning_rate=0.02),
    choose_steps=False,
    folds=3,
)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A planted pool with the scores of all its pairs, and what proxies retrained on parts of it lose."""

    planted: Planted
    pool: PairSet
    unseen: PairSet  # of the target's kind, used by no stage
    scores: Scores

    @property
    def influence(self) -> NDArray[np.float64]:
        columns = self.scores.influence
        return columns["influence"][np.argsort(columns["pair"])]

    def losses(self, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Loss on unseen pairs after retraining on the kept ones, for each seed."""
        return np.array([self._loss(kept.astype(np.float64), seed) for seed in SEEDS])

    @torch.no_grad()
    def _loss(self, weights: NDArray[np.float64], seed: int) -> float:
        with torch.enable_grad():
            heads = train_subset(self.pool, weights, PROXYS.train, PROXYS.train.steps, seed).heads
        u, t = heads(*self.unseen.inputs(slice(None)))
        return float(info_nce(u @ t.T / PROXYS.train.temperature))

    def rise_without(self, rows: NDArray[np.int64]) -> float:
        """How much the mean loss rises when these pairs are left out."""
        kept = np.ones(len(self.pool), bool)
        everything = self.losses(kept)
        kept[rows] = False
        return float((self.losses(kept) - everything).mean())


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    out = tmp_path_factory.mktemp("sign")
    world = {"dimension": 64, "meanings": 12}
    planted = plant(out / "pool", PAIRS, wrong=WRONG, seed=1, **world)
    target = PairSet(plant(out / "target", 400, seed=2, **world).folder)
    unseen = PairSet(plant(out / "unseen", 400, seed=3, **world).folder)
    pool, engine = PairSet(planted.folder), LocalEngine()
    at: dict[str, Path] = {name: out / name for name in ("proxy", "cluster", "curvature", "attribute")}
    proxies(pool, target, {}, PROXYS, at["proxy"], engine)
    cluster(pool, PAIRS, {}, ClusterConfig(k=2), at["cluster"], engine)
    curvature(
        pool,
        target,
        PROXYS,
        at["proxy"],
        {},
        CurvatureConfig(),
        TargetConfig(folds=4),
        at["curvature"],
        engine,
    )
    config = InfluenceConfig(quantiles=QUANTILES, caption_control=100)
    attribute(pool, PROXYS, at, {}, config, at["attribute"], engine)
    return Scored(planted=planted, pool=pool, unseen=unseen, scores=Scores(at["attribute"]))


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_without_the_most_harmful_pairs_the_loss_falls(scored: Scored, share: float) -> None:
    worst = np.argsort(scored.influence)[: round(share * PAIRS)]
    assert scored.rise_without(worst) < -0.1


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_without_the_most_helpful_pairs_the_loss_rises(scored: Scored, share: float) -> None:
    best = np.argsort(-scored.influence)[: round(share * PAIRS)]
    assert scored.rise_without(best) > 0.05


def test_removing_whole_strata_moves_the_loss_as_their_influence_says(scored: Scored) -> None:
    quantile = scored.scores.strata["quantile"]
    strata = [np.flatnonzero(quantile == q) for q in range(QUANTILES)]
    predicted = np.array([scored.influence[rows].mean() for rows in strata])
    found = np.array([scored.rise_without(rows) for rows in strata])
    assert found[predicted.argmin()] < -0.1
    assert found[predicted.argmax()] > 0.05
    assert np.corrcoef(predicted, found)[0, 1] > 0.8


def test_wrong_captions_score_low(scored: Scored) -> None:
    assert auroc(-scored.influence, scored.planted.wrong) > 0.9


def test_the_subset_that_is_decided_trains_a_better_proxy(scored: Scored) -> None:
    subset = decide(scored.scores, SelectionConfig())
    wrong = scored.planted.wrong
    assert wrong[~subset.kept].mean() > 0.8
    assert (wrong & subset.kept).sum() < 0.4 * wrong.sum()
    everything = scored.losses(np.ones(PAIRS, bool))
    assert (scored.losses(subset.kept) < everything - 0.2).all()
