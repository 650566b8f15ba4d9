"""Influence on the groups that are worse off: its gradient, its scores, what is carried over, and when there is none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import Counting, assert_equal_results, beside, carry, columns, with_sets
from planted import Planted, plant, write_pairs
from safetensors.torch import load_file

from influencespace.core.fairness import group_means
from influencespace.core.ridge import fit_ridge
from influencespace.core.select import SelectionConfig, best_candidate, fairest_candidate
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import LocalEngine
from influencespace.estimators.influence import InfluenceScorer
from influencespace.models.space import Space
from influencespace.run import Run, Workers
from influencespace.stages.proxies.proxy import ALL, Proxy
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.scoring.curvature import directional
from influencespace.stages.scoring.fairness import Disadvantaged, SolveDisadvantaged, features
from influencespace.stages.scoring.scoring import ScoringInputs
from influencespace.stages.selection.pair_evidence import PairEvidence
from influencespace.stages.selection.weighting import (
    CLIP_SCORE_SHARES,
    GROUP_SHARES,
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


def groups_of(run: Run) -> Disadvantaged:
    estimator = directional(run.config)
    assert estimator is not None
    rank = run.manifest("curvature").details["proxies"][ALL]["rank"]
    return Disadvantaged(inputs=ScoringInputs.of(run), estimator=estimator, rank=rank)


def influence(run: Run) -> np.ndarray:
    return columns(run, "fairness/groups")["influence"]


def served(truth: Run, out: Path, target: Planted | None = None, **settings: Any) -> Run:
    """The fairness stage with another target or other settings."""
    run = beside(truth, out, "fairness", settings=settings)
    run = run if target is None else with_sets(run, target=target)
    carry(run, "fairness")
    return run


def test_only_groups_above_the_mean_loss_count(truth: Run) -> None:
    reported = truth.manifest("fairness").details["groups"]
    cat, dog = sorted(reported, key=lambda one: str(one["group"]))
    group, loss = groups_of(truth).losses
    assert (cat["group"], cat["share"], dog["group"], dog["share"]) == ("cat", 0, "dog", 1)
    assert sorted([cat["loss"], dog["loss"]]) == pytest.approx(sorted(group_means(loss, group)))
    assert dog["loss"] > cat["loss"]
    worst = PairEvidence(folder=truth.at("selection")).worst_group
    assert worst is not None
    assert reported[worst]["group"] == "dog"


def test_captions_of_an_image_are_one_opinion(truth: Run, tmp_path: Path) -> None:
    target = plant(tmp_path / "target", 80, captions=3, groups=("cat", "dog"), seed=2)
    groups = groups_of(with_sets(truth, target=target))
    inputs = groups.inputs
    rows = np.concatenate(inputs.target_batches)
    _, loss = groups.losses
    assert len(loss) == len(np.unique(inputs.target.image[rows])) < len(rows)
    objective, proxy = truth.config.proxy.train.objective, inputs.trained()
    terms = np.concatenate(
        [
            objective.terms(*proxy.embed(inputs.target.inputs(batch))).numpy()
            for batch in inputs.target_batches
        ]
    )
    image = inputs.target.image[rows]
    slow = [terms[image == i].mean() for i in np.unique(image)]
    np.testing.assert_allclose(np.sort(loss), np.sort(slow), rtol=1e-5)


def test_the_gradient_is_autograds_of_the_groups_mean_losses_by_their_shares(truth: Run) -> None:
    groups = groups_of(truth)
    inputs, objective = groups.inputs, truth.config.proxy.train.objective
    heads = inputs.trained().heads
    inputs.halves.group[:7] = -1  # of no group: they are negatives only
    groups.__dict__["share"] = np.array([0.3, 0.7])
    total, pairs = [torch.zeros(()), torch.zeros(())], [0, 0]
    for rows in inputs.target_batches:
        terms = objective.terms(*heads(*truth.target.inputs(rows)))
        for code in (0, 1):
            mine = torch.from_numpy(inputs.halves.group[rows] == code)
            total[code], pairs[code] = total[code] + terms[mine].sum(), pairs[code] + int(mine.sum())
    (0.3 * total[0] / pairs[0] + 0.7 * total[1] / pairs[1]).backward()  # type: ignore[no-untyped-call]
    slow = torch.cat([p.grad.flatten() for p in heads.parameters() if p.grad is not None])
    fast = groups.gradient(inputs.problem(path=False))[0]
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


def test_scores_are_the_estimators_and_all_pairs_follow_by_likeness(truth: Run) -> None:
    groups, pool, train = groups_of(truth), truth.pool, truth.config.proxy.train
    scored = columns(truth, "fairness/scored")
    direction = load_file(truth.at("fairness") / "direction.safetensors")["direction"]
    proxy = groups.inputs.trained()
    bank = proxy.reference_bank(pool)
    scorer = InfluenceScorer(Space(proxy.heads), direction, bank, train.objective, train.batch_size)
    rows = scored["pair"]
    slow = np.nanmean(scorer(pool.inputs(rows), pool.image[rows]).by_batch[0], 1)
    np.testing.assert_allclose(scored["influence"], slow, atol=1e-5 * slow.std())
    everything = fit_ridge(features(pool, rows), slow).predict(features(pool, np.arange(len(pool))))
    np.testing.assert_allclose(influence(truth), everything, atol=1e-3 * slow.std())


def test_scores_are_those_of_the_runs_own_estimator(truth: Run, tmp_path: Path) -> None:
    settings = {"influence.options": {"role": "own"}}
    run = beside(truth, tmp_path, "curvature", "influence", "fairness", settings=settings)
    carry(run, "curvature", "influence", "fairness")
    both, own = (columns(one, "fairness/scored")["influence"] for one in (truth, run))
    assert np.corrcoef(both, own)[0, 1] < 1 - 1e-6


def test_any_device_gives_the_direction(truth: Run, tmp_path: Path) -> None:
    """A second device of CPUs goes the way of a GPU."""
    groups = replace(groups_of(truth), inputs=ScoringInputs.of(truth, "cpu:0"))
    SolveDisadvantaged(groups=groups, folder=tmp_path)()
    found, expected = (
        load_file(folder / "direction.safetensors")["direction"]
        for folder in (tmp_path, truth.at("fairness"))
    )
    torch.testing.assert_close(found, expected)
    assert expected.norm() > 0


def test_weights_follow_what_serves_the_groups(truth: Run) -> None:
    pairs = PairEvidence(folder=truth.at("selection"))
    plain = pairs.decide(SelectionConfig(weighting="influence"))
    fair = pairs.decide(SelectionConfig(weighting="influence", group_share=0.5))
    gain = np.log(fair.weight[fair.kept]) - np.log(plain.weight[plain.kept])
    free = np.maximum(fair.weight, plain.weight)[fair.kept] < 4.9  # under the cap
    everywhere = columns(truth, "selection/evidence")["for_groups"]
    np.testing.assert_array_equal(everywhere, influence(truth))
    for_groups = everywhere[fair.kept]
    assert np.corrcoef(gain[free], for_groups[free])[0, 1] == pytest.approx(1, abs=1e-6)


def test_the_choice_is_the_fairest_of_the_trials(truth: Run, tmp_path: Path) -> None:
    evidence = PairEvidence(folder=truth.at("selection"))
    workers = Workers(engine=LocalEngine(), folder=tmp_path, stage="selection")
    choice = choose_weighting(truth, evidence, workers)
    choices, worst = candidates(AUTO, names_groups=True), evidence.worst_group
    weighted = (len(CLIP_SCORE_SHARES) + len(GROUP_SHARES)) * len(TEMPERATURES)
    assert len(choice.trials) == 1 + weighted + len(LONGER)
    decision = choice.decision

    def mean_over_seeds(one: SelectionConfig, of_group: bool) -> np.ndarray:
        records = [Proxy(tmp_path, trial_name(one, seed)).record for seed in SEEDS]
        return np.mean([r["by_group"][worst] if of_group else r["target_loss"] for r in records if r], 0)

    whole, worst_off = (np.stack([mean_over_seeds(one, of) for one in choices]) for of in (False, True))
    best = fairest_candidate(whole, worst_off)
    assert replace(decision.rule.config, steps_factor=1) == choices[best]
    for factor, trial in zip(LONGER, choice.trials[len(choices) :], strict=True):
        assert with_chosen(AUTO, trial) == replace(choices[best], steps_factor=factor)
    assert [with_chosen(AUTO, one) for one in choice.trials if one["chosen"]] == [decision.rule.config]
    details = truth.manifest("selection").details
    assert details["trials"] == choice.trials
    assert details | chosen(decision.rule.config) == details


@pytest.mark.parametrize("groups", [(), ("a", "b", "c", "d")], ids=["none", "small ones"])
def test_a_target_without_groups_that_are_large_enough_asks_for_nothing(
    truth: Run, tmp_path: Path, groups: tuple[str, ...]
) -> None:
    run = served(truth, tmp_path, plant(tmp_path / "target", 60, groups=groups, seed=2))
    assert not any(group["share"] for group in run.manifest("fairness").details["groups"])
    assert [path.name for path in run.at("fairness").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("settings", [{"selection.fairness": "off"}, {"selection.weighting": "uniform"}])
def test_who_ignores_groups_spends_nothing_on_them(
    truth: Run, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run, engine = beside(truth, tmp_path, "fairness", settings=settings), Counting()
    assert carry(run, "fairness", engine=engine).details == {"groups": []}
    assert engine.tasks == 0
    assert not any(choice.group_share for choice in candidates(run.config.selection, True))


def test_groups_are_those_with_images_enough_in_both_halves(tmp_path: Path) -> None:
    planted = plant(tmp_path / "target", 200, captions=2, groups=("a", "b"), seed=4)
    halves = TargetHalves(PairSet(planted.folder), 0)
    names = np.array(PairSet(planted.folder).column("group"))
    assert {(str(n), int(g)) for n, g in zip(names, halves.group, strict=True)} in (
        {("a", 0), ("b", 1)},
        {("a", 1), ("b", 0)},
    )


def test_what_another_target_left_is_not_taken(truth: Run, tmp_path: Path) -> None:
    """A folder in which groups were served, and then a target without any."""
    run = served(truth, tmp_path)
    assert_equal_results(truth.at("fairness"), run.at("fairness"))
    plain = with_sets(run, target=plant(tmp_path / "plain", 60, seed=2))
    carry(plain, "fairness")
    assert [path.name for path in plain.at("fairness").iterdir()] == ["manifest.json"]


def test_names_of_classes_are_no_groups_to_serve(tmp_path: Path) -> None:
    planted = plant(tmp_path / "target", 200, groups=("a", "b"), seed=4)
    pairs = EmbeddingTable.open(planted.folder).pairs().to_pydict()
    write_pairs(planted.folder, pairs | {"text": [int(group == "b") for group in pairs["group"]]})
    assert (TargetHalves(PairSet(planted.folder), 0).group == -1).all()


def test_groups_are_served_only_where_asked_for() -> None:
    ignoring = replace(AUTO, fairness="off", group_share=0.3)
    assert len(candidates(ignoring, True)) == 1 + len(TEMPERATURES) * len(CLIP_SCORE_SHARES)
    assert candidates(replace(ignoring, fairness="auto"), True)[0].group_share == 0
    assert not ignoring.serves_groups
    assert replace(ignoring, weighting="influence").serves_groups
    assert AUTO.serves_groups
    assert not SelectionConfig(weighting="uniform").serves_groups


def test_a_share_without_groups_is_warned_of(truth: Run, tmp_path: Path) -> None:
    settings = {"selection.weighting": "influence", "selection.group_share": 0.3}
    for target, warned in ((plant(tmp_path / "plain", 60, seed=2), True), (None, False)):
        run = beside(truth, tmp_path / f"{warned}", "fairness", "selection", settings=settings)
        run = run if target is None else replace(run, sets={**run.sets, "target": PairSet(target.folder)})
        warnings = carry(run, "fairness", "selection").details["warnings"]
        assert any("no effect" in warning for warning in warnings) == warned


def test_the_fairest_serves_the_worst_group_and_not_at_the_cost_of_all() -> None:
    rng = np.random.default_rng(0)
    whole, poor = (level + rng.normal(size=20) for level in (3.0, 4.0))
    losses = np.stack([whole, whole - 0.2, whole - 0.1, whole + 0.1])
    of_poor = np.stack([poor, poor - 0.1, poor - 0.3, poor - 0.9])
    assert fairest_candidate(losses, of_poor) == 2
    # nothing is sure of the group: the whole decides
    unsure = np.stack([poor, *(poor - 0.3 + 3 * rng.normal(size=(3, 20)))])
    assert fairest_candidate(losses, unsure) == 1
    assert fairest_candidate(whole[None], poor[None]) == 0


def test_chance_is_taken_for_a_gain_in_about_one_of_twenty_cases() -> None:
    rng = np.random.default_rng(0)
    taken = []
    for _ in range(1000):
        losses = rng.normal(size=(10, 20))
        taken.append(fairest_candidate(losses, rng.normal(size=(10, 16))) != best_candidate(losses))
    assert np.mean(taken) < 0.08
