"""Influence on the groups that are worse off: its gradient, its scores, what is carried over, and when there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, Idle, assert_equal_results
from planted import plant
from safetensors.torch import load_file

from influencespace.core.fairness import group_means
from influencespace.core.ridge import fit_ridge
from influencespace.core.select import SelectConfig, fairest_candidate
from influencespace.data.blocks import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.nystrom import InfluenceScorer
from influencespace.models.space import Space
from influencespace.stages import fairness as stage
from influencespace.stages.confirm import GROUP_SHARES, TEMPERATURES, candidates
from influencespace.stages.decide import Scores, decide
from influencespace.stages.fairness import Disadvantaged, features
from influencespace.stages.ray_runtime import RayRuntime
from influencespace.stages.student import TargetHalves


def groups_of(chain: Chain) -> Disadvantaged:
    return Disadvantaged(
        pool=chain.sets["pool"],
        target=chain.sets["target"],
        students=chain.student,
        curvature=chain.curvature,
        student_folder=chain.out / "student",
    )


def influence(chain: Chain) -> np.ndarray:
    return read_columns(chain.out / "fairness" / "groups.parquet")["influence"]


def test_only_groups_above_the_mean_loss_count(truth: Chain) -> None:
    found = truth.manifest("fairness").details["groups"]
    group, loss = groups_of(truth).losses
    assert sorted(found) == ["cat", "dog"]
    assert sum(values["share"] for values in found.values()) == pytest.approx(1)
    assert found["dog"]["share"] == 1
    np.testing.assert_allclose(sorted(v["loss"] for v in found.values()), sorted(group_means(loss, group)))


def test_the_gradient_is_autograds_of_the_worse_groups_mean_loss(truth: Chain) -> None:
    groups = groups_of(truth)
    heads, objective = groups.student.heads, truth.student.train.objective
    code = int(np.flatnonzero(groups.share)[0])
    total, pairs = torch.zeros(()), 0
    for rows in groups.contexts:
        terms = objective.terms(*heads(*truth.sets["target"].inputs(rows)))
        mine = torch.from_numpy(groups.halves.group[rows] == code)
        total, pairs = total + terms[mine].sum(), pairs + int(mine.sum())
    (total / pairs).backward()
    slow = torch.cat([p.grad.flatten() for p in heads.parameters() if p.grad is not None])
    torch.testing.assert_close(groups.gradient()[0], slow, rtol=1e-4, atol=1e-6)


def test_scores_are_the_estimators_and_all_pairs_follow_by_likeness(truth: Chain) -> None:
    groups, pool = groups_of(truth), truth.sets["pool"]
    scored = read_columns(truth.out / "fairness" / "scored.parquet")
    direction = load_file(truth.out / "fairness" / "direction.safetensors")["direction"]
    torch.testing.assert_close(direction, groups.direction())
    train = truth.student.train
    scorer = InfluenceScorer(
        Space(groups.student.heads),
        direction,
        groups.student.recorded_bank(pool),
        train.objective,
        train.batch_size,
    )
    rows = scored["pair"]
    slow = np.nanmean(scorer(pool.inputs(rows), pool.image[rows]).by_context[0], 1)
    np.testing.assert_allclose(scored["influence"], slow, atol=1e-5 * slow.std())
    fitted = fit_ridge(features(pool, rows), slow)
    everything = fitted.predict(features(pool, np.arange(len(pool))))
    np.testing.assert_allclose(influence(truth), everything, atol=1e-3 * slow.std())


def test_blocks_do_not_change_it(truth: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "FAIRNESS_BLOCK", 37)
    chain = replace(truth, out=tmp_path, source_folder=truth.out)
    chain.run("fairness")
    np.testing.assert_allclose(influence(chain), influence(truth), atol=1e-4 * influence(truth).std())


def test_ray_gives_what_the_plain_loop_gives(truth: Chain, tmp_path: Path, ray_runtime: RayRuntime) -> None:
    replace(truth, out=tmp_path, source_folder=truth.out, runtime=ray_runtime).run("fairness")
    assert_equal_results(truth.out / "fairness", tmp_path / "fairness", spreads=1e-4)


def test_weights_follow_what_serves_the_groups(truth: Chain) -> None:
    scores = Scores(truth.out / "attribute", groups=truth.out / "fairness")
    plain = decide(scores, SelectConfig(weights="influence"))
    fair = decide(scores, SelectConfig(weights="influence", group_share=0.5))
    gain = np.log(fair.weight[fair.kept]) - np.log(plain.weight[plain.kept])
    free = np.maximum(fair.weight, plain.weight)[fair.kept] < 4.9  # under the cap
    assert np.corrcoef(gain[free], scores.for_groups[fair.kept][free])[0, 1] == pytest.approx(1, abs=1e-6)


def test_the_choice_is_the_one_that_serves_the_worst_group(truth: Chain) -> None:
    details = truth.manifest("curate").details
    trials = details["trials"]
    assert len(trials) == 1 + (1 + len(GROUP_SHARES)) * len(TEMPERATURES)
    (confirmed,) = (trial for trial in trials if trial["confirmed"])
    assert (details["weights"], details["group_share"]) == (confirmed["weights"], confirmed["group_share"])
    assert confirmed["target_loss"] <= trials[0]["target_loss"]
    assert confirmed["worst_group_loss"] <= trials[0]["worst_group_loss"]


def test_a_target_without_groups_or_with_small_ones_asks_for_nothing(truth: Chain, tmp_path: Path) -> None:
    for name, target in (
        ("none", plant(tmp_path / "plain", 60, seed=2)),
        ("small", plant(tmp_path / "many", 60, groups=("a", "b", "c", "d"), seed=2)),
    ):
        world = replace(truth.world, target=target)
        chain = replace(truth, out=tmp_path / name, source_folder=truth.out, world=world)
        assert chain.run("fairness").details == {"groups": {}}
        scores = Scores(truth.out / "attribute", groups=tmp_path / name / "fairness")
        assert not scores.names_groups
        assert not scores.for_groups.any()


def test_who_ignores_groups_spends_nothing_on_them(truth: Chain, tmp_path: Path) -> None:
    for number, select in enumerate((SelectConfig(groups="ignored"), SelectConfig(weights="uniform"))):
        chain = replace(
            truth, out=tmp_path / str(number), source_folder=truth.out, select=select, runtime=Idle()
        )
        with pytest.raises(AssertionError, match="nothing to do"):
            replace(chain, select=SelectConfig()).run("fairness")
        assert chain.run("fairness").details == {"groups": {}}
        assert not any(choice.group_share for choice in candidates(select, True))


def test_groups_are_those_with_images_enough_in_both_halves(tmp_path: Path) -> None:
    planted = plant(tmp_path / "target", 200, captions=2, groups=("a", "b"), seed=4)
    halves = TargetHalves(PairSet(planted.folder), 0)
    names = np.array(PairSet(planted.folder).column("group"))
    assert {(str(n), int(g)) for n, g in zip(names, halves.group, strict=True)} in (
        {("a", 0), ("b", 1)},
        {("a", 1), ("b", 0)},
    )


def test_the_fairest_serves_the_worst_group_and_not_at_the_cost_of_all() -> None:
    rng = np.random.default_rng(0)
    whole, rich, poor = (level + rng.normal(size=20) for level in (3.0, 2.0, 4.0))
    losses = np.stack([whole, whole - 0.2, whole - 0.1, whole + 0.1])
    of_poor = np.stack([poor, poor - 0.1, poor - 0.3, poor - 0.9])
    of_rich = np.stack([rich, rich - 0.3, rich + 0.1, rich + 0.5])
    assert fairest_candidate(losses, [of_rich, of_poor]) == 2
    unsure = np.stack([poor, *(poor - 0.3 + 3 * rng.normal(size=(3, 20)))])
    assert fairest_candidate(losses, [of_rich, unsure]) == 0
