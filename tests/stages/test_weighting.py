"""What retraining likes best is taken, and uniform weights where that is them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import World, beside, carry, carry_beside, columns, with_sets

from influencespace.core.select import CHOSEN, SelectionConfig, best_candidate
from influencespace.data.artifacts import Manifest, write_manifest
from influencespace.data.bucket_files import write_artifact
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import LocalEngine
from influencespace.run import Run, Workers
from influencespace.stages.proxies.proxy import Proxy
from influencespace.stages.proxies.target import TargetHalves, choosing_terms, losses_by_fold
from influencespace.stages.proxies.train_many import Given, train
from influencespace.stages.rivals.sources import source_of
from influencespace.stages.scoring.sampling import save_rows
from influencespace.stages.selection.evidence import Evidence
from influencespace.stages.selection.exchangeability import CompareWithPool, warning
from influencespace.stages.selection.pair_evidence import PairEvidence
from influencespace.stages.selection.weighting import (
    CLIP_SCORE_SHARES,
    FOLDS,
    LONGER,
    SEEDS,
    TEMPERATURES,
    candidates,
    choose_weighting,
    chosen,
    trial_name,
    with_chosen,
)

AUTO = SelectionConfig(weighting="auto")


def decide(truth: Run, **settings: Any) -> Any:
    return PairEvidence(folder=truth.at("selection")).decide(SelectionConfig(**settings))


def test_the_lowest_loss_is_chosen_and_uniform_weights_of_equal_ones() -> None:
    generator = np.random.default_rng(0)
    uniform = 3 + generator.normal(size=20)
    assert best_candidate(np.stack([uniform, uniform - 0.1, uniform - 0.2])) == 2
    assert best_candidate(np.stack([uniform, uniform + 0.1, uniform + 0.2])) == 0
    assert best_candidate(np.stack([uniform, uniform])) == 0
    assert best_candidate(uniform[None]) == 0


def test_only_an_open_choice_has_candidates() -> None:
    weighted = len(TEMPERATURES) * len(CLIP_SCORE_SHARES)
    assert [c.weighting for c in candidates(AUTO)] == ["uniform"] + ["influence"] * weighted
    for fixed in (SelectionConfig(), SelectionConfig(weighting="influence", temperature=0.3)):
        assert candidates(fixed) == [fixed]


def test_the_encoders_opinion_is_not_tried_on_a_target_that_it_knows() -> None:
    tried = candidates(AUTO, names_groups=True, known_better=True)
    assert [one.weighting for one in tried[:2]] == ["uniform", "influence"]
    assert {one.clip_score_share for one in tried} == {0.0}
    assert {one.group_share for one in tried} > {0.0}
    assert max(one.clip_score_share for one in candidates(AUTO)) > 0


def test_a_target_that_the_encoder_knows_is_named(truth: Run, world: World, tmp_path: Path) -> None:
    """Captions of the target are embedded near their pictures, as those of pairs that an encoder was trained on."""
    table, (images, texts) = truth.target.table.pairs(), (X.numpy() for X in truth.target.inputs(slice(None)))
    folder = tmp_path / "target"
    near = texts + 2 * images
    details = write_artifact(folder, table, images, near / np.linalg.norm(near, axis=1, keepdims=True))
    rows = len(table)
    write_manifest(
        folder, Manifest(stage="embed", fingerprint="", rows_in=rows, rows_out=rows, details=details)
    )
    known = with_sets(truth, target=replace(world["target"], folder=folder, fingerprint="known"))
    details = carry_beside(known, tmp_path / "run", "selection").manifest("selection").details
    assert details["exchangeability"]["known_better"]
    assert any("the target is not like the pool" in one for one in details["warnings"])
    of_truth = truth.manifest("selection").details
    assert not of_truth["exchangeability"]["known_better"]
    assert not any("the target is not like the pool" in one for one in of_truth["warnings"])


def test_a_target_that_was_set_apart_counts_as_known_better(truth: Run, tmp_path: Path) -> None:
    """The split takes the better half by the encoder's score."""
    save_rows(tmp_path / "pool.npy", np.arange(0, 180))
    save_rows(tmp_path / "target.npy", np.arange(180, 240))
    parts = {role: PairSet(truth.pool.folder, tmp_path / f"{role}.npy") for role in ("pool", "target")}
    decision = PairEvidence(folder=truth.at("selection")).decision(SelectionConfig())
    found = CompareWithPool(run=replace(truth, sets={**truth.sets, **parts}), decision=decision)()
    assert found.chosen_by_encoder
    assert found.known_better
    assert "set apart from the pool by the encoder's score" in warning(found)
    assert not CompareWithPool(run=truth, decision=decision)().chosen_by_encoder


def test_the_choice_is_that_of_the_ray_free_loop(truth: Run, tmp_path: Path) -> None:
    """Of weights at the proxies' steps, and then of steps."""
    run = carry_beside(truth, tmp_path, "selection", fairness="off")
    config, halves = run.config.proxy.train, TargetHalves(run.target, run.seed)
    choices, steps = candidates(AUTO), run.manifest("proxies").details["steps"]

    def losses(choice: SelectionConfig, steps: int) -> np.ndarray:
        weight = PairEvidence(folder=run.at("selection")).decide(choice).weight
        of_steps = replace(config, steps=steps)
        runs = [train(run.pool, Given(weight), of_steps, seed).heads for seed in SEEDS]
        return np.mean([losses_by_fold(halves, *choosing_terms(h, halves, config), FOLDS) for h in runs], 0)

    weighed = np.stack([losses(choice, steps) for choice in choices])
    best = best_candidate(weighed)
    longer = [losses(choices[best], round(factor * steps)) for factor in LONGER]
    expected = np.concatenate([weighed, np.stack(longer)])
    at_best = [best, *range(len(choices), len(expected))]
    last = at_best[best_candidate(expected[at_best])]
    details = run.manifest("selection").details
    trials = details["trials"]
    assert {name: details[name] for name in CHOSEN} == chosen(choices[best]) | {
        "steps_factor": trials[last]["steps_factor"]
    }
    np.testing.assert_allclose([trial["target_loss"] for trial in trials], expected.mean(1), rtol=1e-6)
    assert [trial["steps_factor"] for trial in trials] == [1.0] * len(choices) + list(LONGER)
    assert [trial["chosen"] for trial in trials] == [one == last for one in range(len(trials))]
    assert source_of(run, "curated").steps == round(details["steps_factor"] * steps)


def test_what_was_chosen_can_be_reported_and_taken_up_again() -> None:
    for choice in candidates(AUTO, names_groups=True):
        assert with_chosen(AUTO, chosen(choice) | {"trials": []}) == choice


@pytest.mark.parametrize("weighting", ["uniform", "influence"])
def test_a_fixed_choice_trains_nothing(truth: Run, tmp_path: Path, weighting: str) -> None:
    run = carry_beside(truth, tmp_path, "selection", weighting=weighting)
    details = run.manifest("selection").details
    assert (details["weighting"], details["trials"]) == (weighting, [])
    assert details["steps_factor"] == 1


def test_finished_trials_are_not_trained_again(truth: Run, tmp_path: Path) -> None:
    evidence = PairEvidence(folder=truth.at("selection"))
    workers = Workers(engine=LocalEngine(), folder=tmp_path, stage="selection")
    first = choose_weighting(truth, evidence, workers)
    assert len(first.trials) == len(candidates(AUTO, names_groups=True)) + len(LONGER)
    trials = [with_chosen(AUTO, one) for one in first.trials]
    names = {trial_name(trial, seed) for trial in trials for seed in SEEDS}
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == names
    lost, *kept = (Proxy(tmp_path, name).path for name in sorted(names))
    before = [path.stat().st_mtime_ns for path in kept]
    lost.unlink()
    assert choose_weighting(truth, evidence, workers) == first
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_the_steps_that_were_chosen_are_trained(truth: Run, tmp_path: Path) -> None:
    settings = {"selection.weighting": "uniform", "selection.steps_factor": 2.5}
    run = beside(truth, tmp_path, "selection", "rivals", "train", settings=settings)
    carry(run, "selection", "rivals", "train")
    steps = run.manifest("proxies").details["steps"]
    trained = {one["method"]: one["steps"] for one in run.manifest("train").details["runs"]}
    assert trained["curated"] == round(2.5 * steps)
    assert trained["everything"] == trained["random"] == steps


def test_weights_follow_the_influence_that_is_predicted(truth: Run) -> None:
    subset = decide(truth, weighting="influence", temperature=1.0)
    order = np.argsort(columns(truth, "selection/evidence")["predicted"][subset.kept])
    assert (np.diff(subset.weight[subset.kept][order]) >= -1e-9).all()


def test_the_clip_score_counts_as_much_as_is_asked(truth: Run) -> None:
    evidence = Evidence.of(truth)
    subset = decide(truth, weighting="influence", temperature=1.0, clip_score_share=0.5)
    given = columns(truth, "influence/strata", "pretrained")["pretrained"]
    predicted = evidence.carried_over(columns(truth, "influence/strata"))["predicted"]
    wanted = predicted + 0.5 * predicted.std() * (given - given.mean()) / given.std()
    kept = subset.kept & (subset.weight < AUTO.max_weight)
    slope, _ = np.polyfit(wanted[kept], np.log(subset.weight[kept]), 1)
    assert slope * evidence.deviation == pytest.approx(1, abs=1e-6)
