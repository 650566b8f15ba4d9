"""The sign, by real retraining: without what scores call harmful the target's loss falls, without what helps it rises."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from planted import Planted, plant

from influencespace.config import load_config
from influencespace.core.contrastive import info_nce
from influencespace.core.metrics import auroc
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import LocalEngine
from influencespace.pipeline import STAGES
from influencespace.run import Run, carry_out
from influencespace.stages.proxies.train_many import Given, train
from influencespace.stages.selection.evidence import Evidence

PAIRS, WRONG, QUANTILES = 600, 0.25, 10
SEEDS = (100, 101, 102)
CONFIG = load_config(
    None,
    {
        "proxy.train.dimension": 32,
        "proxy.train.steps": 60,
        "proxy.train.batch_size": 64,
        "proxy.train.learning_rate": 0.02,
        "proxy.choose_steps": False,
        "proxy.folds": 3,
        "cluster.k": 2,
        "curvature.target_folds": 4,
        "influence.quantiles": QUANTILES,
        "influence.control_samples": 100,
    },
)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A planted pool with the scores of all its pairs, and what proxies retrained on parts of it lose."""

    planted: Planted
    run: Run
    unseen: PairSet  # of the target's kind, used by no stage
    evidence: Evidence

    @property
    def influence(self) -> NDArray[np.float64]:
        columns = self.evidence.influence
        return columns["influence"][np.argsort(columns["pair"])]

    def losses(self, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Loss on unseen pairs after retraining on the kept ones, for each seed."""
        return np.array([self._loss(kept.astype(np.float64), seed) for seed in SEEDS])

    @torch.no_grad()
    def _loss(self, weights: NDArray[np.float64], seed: int) -> float:
        with torch.enable_grad():
            heads = train(self.run.pool, Given(weights), CONFIG.proxy.train, seed).heads
        u, t = heads(*self.unseen.inputs(slice(None)))
        return float(info_nce(u @ t.T / CONFIG.proxy.train.temperature))

    def rise_without(self, rows: NDArray[np.int64]) -> float:
        """How much the mean loss rises when these pairs are left out."""
        kept = np.ones(PAIRS, bool)
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
    sets = {"pool": PairSet(planted.folder), "target": target, "test": target}
    run = Run(folder=out, config=CONFIG, sets=sets)
    until = next(place for place, stage in enumerate(STAGES) if stage.name == "train")
    for stage in STAGES[:until]:
        carry_out(stage, run, LocalEngine())
    return Scored(planted=planted, run=run, unseen=unseen, evidence=Evidence.of(run))


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_without_the_most_harmful_pairs_the_loss_falls(scored: Scored, share: float) -> None:
    worst = np.argsort(scored.influence)[: round(share * PAIRS)]
    assert scored.rise_without(worst) < -0.1


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_without_the_most_helpful_pairs_the_loss_rises(scored: Scored, share: float) -> None:
    best = np.argsort(-scored.influence)[: round(share * PAIRS)]
    assert scored.rise_without(best) > 0.05


def test_removing_whole_strata_moves_the_loss_as_their_influence_says(scored: Scored) -> None:
    quantile = read_columns(scored.run.at("influence") / "strata.parquet")["quantile"]
    strata = [np.flatnonzero(quantile == q) for q in range(QUANTILES)]
    predicted = np.array([scored.influence[rows].mean() for rows in strata])
    found = np.array([scored.rise_without(rows) for rows in strata])
    assert found[predicted.argmin()] < -0.1
    assert found[predicted.argmax()] > 0.05
    assert np.corrcoef(predicted, found)[0, 1] > 0.8


def test_wrong_captions_score_low(scored: Scored) -> None:
    assert auroc(-scored.influence, scored.planted.wrong) > 0.9


def test_the_subset_that_is_decided_trains_a_better_proxy(scored: Scored) -> None:
    curated, wrong = scored.run.at("selection") / "curated.parquet", scored.planted.wrong
    kept = read_columns(curated, "kept")["kept"].astype(bool)
    assert wrong[~kept].mean() > 0.8
    assert (wrong & kept).sum() < 0.4 * wrong.sum()
    everything = scored.losses(np.ones(PAIRS, bool))
    assert (scored.losses(kept) < everything - 0.2).all()
