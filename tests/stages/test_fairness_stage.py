"""Influence on the groups that are worse off: its gradient, its scores, what is carried over, and when there is none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chain import Chain, Idle, assert_equal_results
from planted import plant
from safetensors.torch import load_file

from influencespace.core.fairness import group_means
from influencespace.core.ridge import fit_ridge
from influencespace.core.select import SelectionConfig, best_candidate, fairest_candidate
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.ray_engine import RayEngine
from influencespace.estimators.influence import InfluenceScorer
from influencespace.models.space import Space
from influencespace.stages.proxies.proxies import TargetHalves
from influencespace.stages.scoring import fairness as stage
from influencespace.stages.scoring.fairness import Disadvantaged, PredictForGroups, features
from influencespace.stages.selection.evidence import Scores, decide
from influencespace.stages.selection.weighting import (
    CLIP_SCORE_SHARES,
    GROUP_SHARES,
    SEEDS,
    TEMPERATURES,
    candidates,
    chosen,
    serves_groups,
)


def groups_of(chain: Chain) -> Disadvantaged:
    return Disadvantaged(
        pool=chain.sets["pool"],
        target=chain.sets["target"],
        proxies=chain.proxy,
        curvature=chain.curvature,
        proxy_folder=chain.out / "proxy",
    )


def influence(chain: Chain) -> np.ndarray:
    return read_columns(chain.out / "fairness" / "groups.parquet")["influence"]


def test_only_groups_above_the_mean_loss_count(truth: Chain) -> None:
    cat, dog = sorted(truth.manifest("fairness").details["groups"], key=lambda found: str(found["group"]))
    group, loss = groups_of(truth).losses
    assert (cat["group"], cat["share"], dog["group"], dog["share"]) == ("cat", 0, "dog", 1)
    assert sorted([cat["loss"], dog["loss"]]) == pytest.approx(sorted(group_means(loss, group)))
    assert dog["loss"] > cat["loss"]
    names = [found["group"] for found in truth.manifest("fairness").details["groups"]]
    scores = Scores(truth.out / "attribute", groups=truth.out / "fairness")
    assert names[scores.worst_off] == "dog"


def test_captions_of_an_image_are_one_opinion(truth: Chain, tmp_path: Path) -> None:
    planted = plant(tmp_path / "target", 80, captions=3, groups=("cat", "dog"), seed=2)
    groups = replace(groups_of(truth), target=PairSet(planted.folder))
    rows = np.concatenate(groups.contexts)
    _, loss = groups.losses
    assert len(loss) == len(np.unique(groups.target.image[rows])) < len(rows)
    terms = np.concatenate(
        [
            truth.proxy.train.objective.terms(*groups.proxy.embed(groups.target.inputs(part))).numpy()
            for part in groups.contexts
        ]
    )
    image = groups.target.image[rows]
    slow = [terms[image == i].mean() for i in np.unique(image)]
    np.testing.assert_allclose(np.sort(loss), np.sort(slow), rtol=1e-5)


def test_the_gradient_is_autograds_of_the_groups_mean_losses_by_their_shares(truth: Chain) -> None:
    groups = groups_of(truth)
    heads, objective = groups.proxy.heads, truth.proxy.train.objective
    groups.halves.group[:7] = -1  # of no group: they are negatives only
    groups.__dict__["share"] = np.array([0.3, 0.7])
    total, pairs = [torch.zeros(()), torch.zeros(())], [0, 0]
    for rows in groups.contexts:
        terms = objective.terms(*heads(*truth.sets["target"].inputs(rows)))
        for code in (0, 1):
            mine = torch.from_numpy(groups.halves.group[rows] == code)
            total[code], pairs[code] = total[code] + terms[mine].sum(), pairs[code] + int(mine.sum())
    (0.3 * total[0] / pairs[0] + 0.7 * total[1] / pairs[1]).backward()  # type: ignore[no-untyped-call]
    slow = torch.cat([p.grad.flatten() for p in heads.parameters() if p.grad is not None])
    torch.testing.assert_close(groups.gradient()[0], slow, rtol=1e-4, atol=1e-6)


def test_scores_are_the_estimators_and_all_pairs_follow_by_likeness(truth: Chain) -> None:
    groups, pool = groups_of(truth), truth.sets["pool"]
    scored = read_columns(truth.out / "fairness" / "scored.parquet")
    direction = load_file(truth.out / "fairness" / "direction.safetensors")["direction"]
    torch.testing.assert_close(direction, groups.solution().x)
    train = truth.proxy.train
    scorer = InfluenceScorer(
        Space(groups.proxy.heads),
        direction,
        groups.proxy.reference_bank(pool),
        train.objective,
        train.batch_size,
    )
    rows = scored["pair"]
    slow = np.nanmean(scorer(pool.inputs(rows), pool.image[rows]).by_batch[0], 1)
    np.testing.assert_allclose(scored["influence"], slow, atol=1e-5 * slow.std())
    fitted = fit_ridge(features(pool, rows), slow)
    everything = fitted.predict(features(pool, np.arange(len(pool))))
    np.testing.assert_allclose(influence(truth), everything, atol=1e-3 * slow.std())


def test_scores_have_the_form_of_those_of_the_whole_target(truth: Chain, tmp_path: Path) -> None:
    chain = replace(truth, out=tmp_path, source_folder=truth.out)
    replace(chain, attribute=replace(truth.attribute, form="taylor")).run("fairness")
    exact, taylor = (
        read_columns(out / "fairness" / "scored.parquet", "influence")["influence"]
        for out in (truth.out, tmp_path)
    )
    assert 0.9 < np.corrcoef(exact, taylor)[0, 1] < 1 - 1e-9


def test_blocks_do_not_change_it(truth: Chain, tmp_path: Path) -> None:
    chain = replace(truth, out=tmp_path, source_folder=truth.out)
    replace(chain, attribute=replace(truth.attribute, bucket_size=37)).run("fairness")
    np.testing.assert_allclose(influence(chain), influence(truth), atol=1e-4 * influence(truth).std())


def test_ray_gives_what_the_plain_loop_gives(truth: Chain, tmp_path: Path, ray_engine: RayEngine) -> None:
    replace(truth, out=tmp_path, source_folder=truth.out, engine=ray_engine).run("fairness")
    assert_equal_results(truth.out / "fairness", tmp_path / "fairness", spreads=1e-4)


def test_a_kill_after_the_scores_costs_none(
    truth: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = replace(truth, out=tmp_path, source_folder=truth.out)

    def killed(*_: object) -> NoReturn:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(PredictForGroups, "__call__", killed)
        with pytest.raises(RuntimeError, match="killed"):
            chain.run("fairness")
    monkeypatch.setattr(InfluenceScorer, "__call__", killed)  # nothing is scored again
    join = stage.join_buckets
    for killed_at in ("groups", "scored"):

        def joins(folder: Path, name: str, starts: list[int], last: str = killed_at) -> int:
            return killed() if name == last else join(folder, name, starts)

        with monkeypatch.context() as patch:
            patch.setattr(stage, "join_buckets", joins)
            with pytest.raises(RuntimeError, match="killed"):
                chain.run("fairness")
    chain.run("fairness")
    np.testing.assert_array_equal(influence(chain), influence(truth))


def test_weights_follow_what_serves_the_groups(truth: Chain) -> None:
    scores = Scores(truth.out / "attribute", groups=truth.out / "fairness")
    plain = decide(scores, SelectionConfig(weighting="influence"))
    fair = decide(scores, SelectionConfig(weighting="influence", group_share=0.5))
    gain = np.log(fair.weight[fair.kept]) - np.log(plain.weight[plain.kept])
    free = np.maximum(fair.weight, plain.weight)[fair.kept] < 4.9  # under the cap
    assert np.corrcoef(gain[free], scores.for_groups[fair.kept][free])[0, 1] == pytest.approx(1, abs=1e-6)


def test_the_choice_is_that_of_the_trials_notes(truth: Chain) -> None:
    details = truth.manifest("curate").details
    trials = details["trials"]
    assert len(trials) == 1 + (len(CLIP_SCORE_SHARES) + len(GROUP_SHARES)) * len(TEMPERATURES)
    notes = [json.loads(path.read_text()) for path in (truth.out / "curate" / "trials").glob("*.json")]
    choices = candidates(SelectionConfig(), True)
    scores = Scores(truth.out / "attribute", groups=truth.out / "fairness")

    def mean_over_seeds(choice: SelectionConfig, name: str) -> np.ndarray:
        mine = [n for n in notes if n | chosen(choice) == n]
        assert len(mine) == len(SEEDS)
        values = [n["target_loss"] if name == "whole" else n["by_group"][scores.worst_off] for n in mine]
        return np.mean(values, 0)

    whole, worst_off = (
        np.stack([mean_over_seeds(choice, name) for choice in choices]) for name in ("whole", "worst off")
    )
    best = choices[fairest_candidate(whole, worst_off)]
    assert details | chosen(best) == details


def test_a_target_without_groups_or_with_small_ones_asks_for_nothing(truth: Chain, tmp_path: Path) -> None:
    for name, target in (
        ("none", plant(tmp_path / "plain", 60, seed=2)),
        ("small", plant(tmp_path / "many", 60, groups=("a", "b", "c", "d"), seed=2)),
    ):
        world = replace(truth.world, target=target)
        chain = replace(truth, out=tmp_path / name, source_folder=truth.out, world=world)
        assert not any(group["share"] for group in chain.run("fairness").details["groups"])
        scores = Scores(truth.out / "attribute", groups=tmp_path / name / "fairness")
        assert not scores.names_groups
        assert not scores.for_groups.any()


def test_who_ignores_groups_spends_nothing_on_them(truth: Chain, tmp_path: Path) -> None:
    for number, select in enumerate((SelectionConfig(fairness="off"), SelectionConfig(weighting="uniform"))):
        chain = replace(
            truth, out=tmp_path / str(number), source_folder=truth.out, select=select, engine=Idle()
        )
        with pytest.raises(AssertionError, match="nothing to do"):
            replace(chain, select=SelectionConfig()).run("fairness")
        assert chain.run("fairness").details == {"groups": []}
        assert not any(choice.group_share for choice in candidates(select, True))


def test_groups_are_those_with_images_enough_in_both_halves(tmp_path: Path) -> None:
    planted = plant(tmp_path / "target", 200, captions=2, groups=("a", "b"), seed=4)
    halves = TargetHalves(PairSet(planted.folder), 0)
    names = np.array(PairSet(planted.folder).column("group"))
    assert {(str(n), int(g)) for n, g in zip(names, halves.group, strict=True)} in (
        {("a", 0), ("b", 1)},
        {("a", 1), ("b", 0)},
    )


def test_what_another_target_left_is_not_taken(truth: Chain, tmp_path: Path) -> None:
    """A folder in which groups were served, and then a target without any."""
    shutil.copytree(truth.out / "fairness", tmp_path / "fairness")
    world = replace(truth.world, target=plant(tmp_path / "plain", 60, seed=2))
    replace(truth, out=tmp_path, source_folder=truth.out, world=world).run("fairness")
    left = {path.name for path in (tmp_path / "fairness").iterdir() if path.is_file()}
    assert left == {"manifest.json"}
    assert not Scores(truth.out / "attribute", groups=tmp_path / "fairness").names_groups


def test_names_of_classes_are_no_groups_to_serve(tmp_path: Path) -> None:
    planted = plant(tmp_path / "target", 200, groups=("a", "b"), seed=4)
    path = planted.folder / "pairs.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("text")
    one_caption = pa.array([int(group == "b") for group in table["group"].to_pylist()], table["text"].type)
    pq.write_table(table.set_column(place, table.field(place), one_caption), path)
    assert (TargetHalves(PairSet(planted.folder), 0).group == -1).all()


def test_groups_are_served_only_where_asked_for() -> None:
    ignoring = SelectionConfig(fairness="off", group_share=0.3)
    assert len(candidates(ignoring, True)) == 1 + len(TEMPERATURES) * len(CLIP_SCORE_SHARES)
    assert candidates(replace(ignoring, fairness="auto"), True)[0].group_share == 0
    assert not serves_groups(ignoring)
    assert serves_groups(replace(ignoring, weighting="influence"))
    assert serves_groups(SelectionConfig())
    assert not serves_groups(SelectionConfig(weighting="uniform"))


def test_a_share_without_groups_is_warned_of(truth: Chain, tmp_path: Path) -> None:
    select = SelectionConfig(weighting="influence", group_share=0.3)
    world = replace(truth.world, target=plant(tmp_path / "plain", 60, seed=2))
    source = tmp_path / "source"
    shutil.copytree(truth.out, source)
    chain = replace(truth, out=source, world=world, select=select)
    chain.run("fairness")
    assert any("no effect" in warning for warning in chain.run("curate").details["warnings"])
    assert not any("no effect" in warning for warning in truth.manifest("curate").details["warnings"])


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
