"""The attribution benchmarks on a tiny world: what is trained again, and what is compared with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.attribution import attribution, calibration, cleaning, deletion, peers, price
from benchmarks.attribution.attribution_setup import Study, SyntheticStudy
from benchmarks.attribution.cleaning import Cleaning
from benchmarks.attribution.digits import RATES, Classification
from benchmarks.attribution.lds import Foretold, half_subsets, mean_spearman
from benchmarks.attribution.scoring import SCORES, agreement, pearson, tuned
from benchmarks.bench import Bench
from benchmarks.data.class_folders import NAMES, ClassWorld
from benchmarks.data.datasets import Dataset
from influencespace.models.training import HeadsConfig

CONFIG = HeadsConfig(dimension=8, batch_size=8, steps=4)


@pytest.fixture(scope="module")
def study(dataset: Dataset) -> Study:
    return Study(dataset=dataset, pairs=40, wrong=0.3, config=CONFIG)


def test_a_pair_left_out_changes_the_target_loss(study: Study) -> None:
    found = attribution.left_out(study, 0)
    assert len(found["truth"]) == study.size == 40
    assert np.count_nonzero(found["truth"]) > 20
    assert study.tuned().config.learning_rate in (3e-5, 1e-4, 3e-4, 1e-3)


@pytest.mark.parametrize("kind", [Study, SyntheticStudy])
def test_detection_is_of_planted_captions(dataset: Dataset, kind: type[Study]) -> None:
    study = kind(dataset=dataset, pairs=40, wrong=0.2, config=CONFIG)
    assert study.is_wrong.mean() == pytest.approx(0.2, abs=0.15)
    found = attribution.detection_of(study)
    assert set(found) == set(attribution.measured(0.2))
    assert all(0 <= each["auroc"] <= 1 for each in found.values())


def test_scores_of_groups_leave_out_what_is_blind(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "measured", lambda: ["random", "grad_dot"])
    assert set(attribution.group_scores(study, 0, 0)) == {"random", "grad_dot"}
    assert set(attribution.group_scores(study, 1, 0)) == {"grad_dot"}
    losses = np.array(attribution.subset_losses(study, half_subsets(40, 2), 0)["losses"])
    assert losses.shape == (2, attribution.GROUPS)


def test_a_deletion_is_compared_with_retraining(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "SHARES", (0.1, 0.2))
    found = deletion.edits(replace(study, config=replace(CONFIG, steps=20)), 0)
    assert len(found["cases"]) == 3 * len(deletion.SHARES)
    row = deletion.summary([found["cases"][1], found["cases"][1]])
    assert row["distance"] == row["highest"] == found["cases"][1]["distance"]


def test_strata_are_weighted_in_both_ways(study: Study) -> None:
    whole = calibration.whole_losses(study, 0)
    for truth in calibration.TRUTHS:
        losses = calibration.weighted_losses(study, truth, 1.0, 0)["losses"]
        assert len(losses) == calibration.CLUSTERS * calibration.QUANTILES
        if truth == "loss_weights":  # a weight of one is the path as it was
            np.testing.assert_allclose(losses, whole[truth], rtol=1e-5)
    scores = calibration.scores_of(study, 0)
    assert {len(values) for values in scores.values()} == {40}


def test_where_removal_turns_from_good_to_bad() -> None:
    changes = np.tile(np.linspace(-4.5, 4.5, calibration.QUANTILES), calibration.CLUSTERS)
    assert calibration.crossing(changes) == pytest.approx(4.5)
    assert calibration.crossing(-np.abs(changes)) == calibration.QUANTILES
    predicted = calibration.predicted_changes(np.array([1.0, 0.0]), np.array([0, 1]), 0.0)
    np.testing.assert_allclose(predicted, [0.5, -0.5])  # half of the loss moves to the other half


def test_the_price_of_embedding_is_by_the_pair(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price, "DEV", "target/*.tar")
    assert price.embedding_seconds(dataset, 8) > 0


@pytest.mark.slow
def test_wrong_folders_are_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "METHODS", ("ecif", "random"))
    sizes: dict[str, Any] = {"pool": 96, "target": 96, "test": 96, "encoder_steps": 2}
    world = ClassWorld(cache=tmp_path, seed=0, wrong=0.25, **sizes)
    pool = Cleaning(world=world, config=CONFIG, retrainings=1)
    assert pool.wrong.sum() == 24
    choices = {"everything": cleaning.everything, "ecif": cleaning.without("ecif", 0.25)}
    bench = Bench(quick=True, seeds=(0,), cache=tmp_path, data=None)
    found = cleaning.compared(bench, [pool], choices)
    assert found.shares["ecif"].shape == (1, 96)
    whole, cleaned = bench.rows
    assert whole["wrong_of_removed"] is None
    assert 0 <= cleaned["wrong_of_removed"] <= 1
    apart = replace(pool, one_a_name=True)
    assert 40 < len(np.unique(apart.pool.image)) <= len(NAMES)


def test_digits_are_the_same_problem_for_all(tmp_path: Path) -> None:
    config = HeadsConfig(steps=5, batch_size=50)
    study = tuned(Classification(kind="linear", size=100, groups=2, config=config), RATES, tmp_path)
    bench = Bench(quick=True, seeds=(0,), cache=tmp_path, data=None)
    scores = peers.scored(bench, study, blind=True)
    assert set(peers.OURS) <= set(scores.values)
    assert {values.shape for values in scores.values.values()} == {(1, 2, 100)}
    losses = np.array(peers.subset_losses(study, half_subsets(100, 3), 0)["losses"])
    assert losses.shape == (3, 2)
    for ours, peer, same, otherwise in peers.MATCHES:
        assert ours in peers.OURS
        assert peer.removesuffix(", of the loss") in peers.PEERS
        assert otherwise or same == peers.KINDS


def test_the_score_is_the_mean_spearman() -> None:
    truth = np.random.default_rng(0).normal(size=(20, 3))
    assert mean_spearman(truth, truth) == pytest.approx(1)
    assert mean_spearman(-truth, truth) == pytest.approx(-1)
    assert mean_spearman(np.zeros_like(truth), truth) == 0
    subsets, scores = half_subsets(10, 20), np.random.default_rng(1).normal(size=(3, 10))
    assert subsets.sum(1).tolist() == [5] * 20
    found = Foretold(subsets, np.stack([-subsets @ scores.T] * 2))
    assert found.ceiling == pytest.approx(1)
    values, draws = found.lds_of({"right": scores[None], "wrong": -scores[None]})
    assert values == pytest.approx({"right": 1, "wrong": -1})
    assert found.lds(scores) == values["right"]
    assert draws["right"].min() == pytest.approx(1)


def test_agreement_is_over_pairs_of_repeats() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 9))
    assert agreement(np.stack([a, a, -a]), pearson) == pytest.approx(-1 / 3)
    assert agreement(b[None], pearson) is None
    assert set(attribution.PROMISED) <= set(SCORES)
