"""What retraining likes best is taken, and uniform weights where that is them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chain import Chain, Counting, Idle

from influencespace.core.select import SelectionConfig, best_candidate
from influencespace.engine.local import Engine, LocalEngine
from influencespace.stages.proxies.proxies import TargetHalves, choosing_terms, losses_by_fold, train_subset
from influencespace.stages.selection.evidence import Scores, decide
from influencespace.stages.selection.weighting import (
    CLIP_SCORE_SHARES,
    FOLDS,
    SEEDS,
    TEMPERATURES,
    candidates,
    chosen,
    confirm,
    with_chosen,
)


def confirmed(truth: Chain, folder: Path, config: SelectionConfig, engine: Engine) -> SelectionConfig:
    steps = truth.manifest("proxy").details["steps"]
    scores = Scores(truth.out / "attribute")
    pool, target = truth.sets["pool"], truth.sets["target"]
    return confirm(pool, target, scores, config, truth.proxy, steps, folder, "mark", engine)[0]


def test_the_lowest_loss_is_chosen_and_uniform_weights_of_equal_ones() -> None:
    generator = np.random.default_rng(0)
    uniform = 3 + generator.normal(size=20)
    assert best_candidate(np.stack([uniform, uniform - 0.1, uniform - 0.2])) == 2
    assert best_candidate(np.stack([uniform, uniform + 0.1, uniform + 0.2])) == 0
    assert best_candidate(np.stack([uniform, uniform])) == 0
    assert best_candidate(uniform[None]) == 0


def test_only_an_open_choice_has_candidates() -> None:
    weighted = len(TEMPERATURES) * len(CLIP_SCORE_SHARES)
    assert [c.weights for c in candidates(SelectionConfig())] == ["uniform"] + ["influence"] * weighted
    fixed = SelectionConfig(weighting="influence", temperature=0.3)
    assert candidates(fixed) == [fixed]


def test_the_choice_is_that_of_the_ray_free_loop(truth: Chain, tmp_path: Path) -> None:
    scores, config = Scores(truth.out / "attribute"), truth.proxy
    steps = truth.manifest("proxy").details["steps"]
    pool, halves = truth.sets["pool"], TargetHalves(truth.sets["target"], config.seed)
    choices = candidates(SelectionConfig())

    def losses(choice: SelectionConfig) -> np.ndarray:
        weight = decide(scores, choice).weight
        runs = [train_subset(pool, weight, config.train, steps, seed).heads for seed in SEEDS]
        terms = [choosing_terms(heads, halves, config.train) for heads in runs]
        return np.mean([losses_by_fold(halves, *found, FOLDS) for found in terms], 0)

    choices = candidates(SelectionConfig())
    found = np.stack([losses(choice) for choice in choices])
    best = best_candidate(found)
    assert confirmed(truth, tmp_path, SelectionConfig(), LocalEngine()) == choices[best]
    trials = [trial["target_loss"] for trial in truth.manifest("curate").details["trials"]]
    np.testing.assert_allclose(trials[: len(choices)], found.mean(1), rtol=1e-6)


def test_what_was_chosen_can_be_told_and_taken_up_again() -> None:
    for choice in candidates(SelectionConfig(), names_groups=True):
        again = with_chosen(SelectionConfig(), chosen(choice) | {"trials": []})
        assert again == choice


def test_a_fixed_choice_trains_nothing(truth: Chain, tmp_path: Path) -> None:
    fixed = SelectionConfig(weighting="uniform")
    assert confirmed(truth, tmp_path, fixed, Idle()) == fixed


def test_finished_trials_are_not_trained_again(truth: Chain, tmp_path: Path) -> None:
    first = confirmed(truth, tmp_path, SelectionConfig(), LocalEngine())
    notes = sorted((tmp_path / "trials").iterdir())
    assert len(notes) == len(SEEDS) * (1 + len(TEMPERATURES) * len(CLIP_SCORE_SHARES))
    before = [note.stat().st_mtime_ns for note in notes[1:]]
    notes[0].unlink()
    assert confirmed(truth, tmp_path, SelectionConfig(), Counting()) == first
    assert [note.stat().st_mtime_ns for note in notes[1:]] == before
    assert json.loads(notes[0].read_text())["mark"] == "mark"


def test_weights_follow_the_influence_that_is_predicted(truth: Chain) -> None:
    scores = Scores(truth.out / "attribute")
    subset = decide(scores, replace(SelectionConfig(), weighting="influence", temperature=1.0))
    order = np.argsort(scores.predicted[subset.kept])
    assert (np.diff(subset.weight[subset.kept][order]) >= -1e-9).all()


def test_the_clip_score_counts_as_much_as_it_is_told_to(truth: Chain) -> None:
    scores = Scores(truth.out / "attribute")
    subset = decide(scores, SelectionConfig(weighting="influence", temperature=1.0, clip_score_share=0.5))
    given = scores.strata["given"]
    wanted = scores.predicted + 0.5 * scores.predicted.std() * (given - given.mean()) / given.std()
    kept = subset.kept & (subset.weight < SelectionConfig().max_weight)
    slope, _ = np.polyfit(wanted[kept], np.log(subset.weight[kept]), 1)
    assert slope * scores.unit == pytest.approx(1, abs=1e-6)
