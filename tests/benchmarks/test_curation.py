"""The curation benchmarks on a tiny synthetic world, with its planted truth."""

from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from benchmarks.bench import Bench
from benchmarks.curation import ablations, redundancy
from benchmarks.curation.curation import Curation, identity
from benchmarks.curation.protocol import CURATED, FOLDS, NOISE_SEEDS, SPARE, TARGET, TEST, Turn
from benchmarks.curation.quality import wrong
from benchmarks.curation.rare_group import RARE, RareGroup
from benchmarks.curation.retrain_eval import Retrained, mean_of, together
from benchmarks.curation.rivals import RivalCuration
from benchmarks.curation.scenario_curation import ScenarioCuration
from benchmarks.data import scenario_pools
from benchmarks.data.datasets import Dataset
from benchmarks.data.scenario_pools import EVERY_SCENARIO, SCENARIOS, Scenario
from benchmarks.methods.seed_baseline import SETTINGS, SeedCuration
from influencespace.config import as_tree, load_config
from influencespace.models.encoders import load_encoder
from influencespace.stages.ingest.split import SplitConfig
from influencespace.stages.rivals.names import METHODS
from influencespace.stages.selection.weighting import SEEDS

SETTING = wrong(0.3, captions=2, steps=8)
CLEAN_POOL = wrong(0.0, captions=2, steps=8)
SMALL = {"proxy.train.batch_size": 24, "proxy.folds": 2, "proxy.train.dimension": 16, "cluster.k": 2}


def test_captions_are_moved_and_scores_are_of_what_is_there(dataset: Dataset) -> None:
    pool, moved = dataset.corrupted(0.3, captions=2, seed=1)
    assert moved.mean() == pytest.approx(0.3, abs=0.01)
    images, texts = pool.inputs(slice(None))
    np.testing.assert_allclose(pool.clip_score, (images * texts).sum(1), atol=1e-3)  # stored as float16
    again, _ = dataset.corrupted(0.3, captions=2, seed=1)
    assert identity(again) == identity(pool)


def test_each_image_is_tested_once_and_has_one_role(dataset: Dataset) -> None:
    image = dataset.pool.image
    tested = np.zeros(len(image), int)
    for fold in range(FOLDS):
        roles = [Turn(fold=fold, noise=noise).roles(image, 5) for noise in NOISE_SEEDS]
        for role in roles:
            assert set(role) == {CURATED, TARGET, SPARE, TEST}
            assert all(len(set(role[image == one])) == 1 for one in np.unique(image))
            assert len(np.unique(image[role == TARGET])) == 5
            assert (role == TEST).tolist() == (roles[0] == TEST).tolist()
        assert (roles[0] == TARGET).tolist() != (roles[1] == TARGET).tolist()
        tested += roles[0] == TEST
    assert (tested == 1).all()


def test_a_smaller_target_leaves_the_same_to_curate(dataset: Dataset) -> None:
    image = dataset.pool.image
    few, many = Turn().roles(image, 3), Turn().roles(image)
    assert (few == CURATED).tolist() == (many == CURATED).tolist()
    assert set(image[few == TARGET]) < set(image[many == TARGET])


@pytest.mark.parametrize("target", ["exchangeable", "seen"])
def test_no_image_is_in_two_sets(dataset: Dataset, target: Literal["exchangeable", "seen"]) -> None:
    """What is curated, the target and the test set share no picture, of a scenario that corrupts nothing."""
    curation = Curation(dataset, replace(CLEAN_POOL, scenario=replace(CLEAN_POOL.scenario, target=target)))
    shown = [
        {tuple(u.tolist()) for u in pairs.inputs(slice(None))[0].half()}
        for pairs in (curation.pool, curation.target, curation.test)
    ]
    assert all(shown)
    assert not shown[0] & shown[1]
    assert not (shown[0] | shown[1]) & shown[2]


def test_captions_stay_with_their_embeddings(dataset: Dataset) -> None:
    curation = Curation(dataset, replace(SETTING, scenario=Scenario(corruption="web", share=1, captions=2)))
    encoder, pool = load_encoder(dataset.encoder), curation.pool
    embedded = encoder.encode_text(encoder.tokenize([str(one) for one in pool.column("caption")])[0])
    torch.testing.assert_close(pool.inputs(slice(None))[1], embedded.cpu(), atol=2e-3, rtol=0)


def test_a_curation_is_carried_out_once_and_its_variants_share_its_stages(dataset: Dataset) -> None:
    curation = Curation(dataset, SETTING, SMALL)
    judged = curation.judged()
    assert judged["pairs"] == len(curation.pool)
    assert 0 <= judged["auroc"] <= 1
    assert Curation(dataset, SETTING, SMALL).judged() == judged
    other = curation.variant({"selection.target_size": 0.5})
    assert other.decide().kept.mean() <= 0.5 + 1 / len(curation.pool)
    assert other.run.at("proxies").is_symlink()
    assert not other.run.at("selection").is_symlink()
    assert curation.decide(target_size=0.5).kept.tolist() == other.decide().kept.tolist()
    weights = curation.weights()
    assert weights["clip_score"].sum() == weights["random"].sum() == (~curation.wrong).sum()
    assert weights["neg_clip_loss"].sum() == weights["proxy_neg_clip_loss"].sum() == (~curation.wrong).sum()
    assert np.corrcoef(curation.neg_clip_loss, curation.pool.clip_score)[0, 1] > 0.3
    found = curation.by_method((0,))
    assert {len(shares[0]) for shares in found["shares"].values()} == {len(np.unique(curation.test.image))}


@pytest.mark.parametrize("name", ["web", "no target", "file names", "placeholders"])
def test_a_scenario_has_its_planted_kinds(
    dataset: Dataset, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = SplitConfig(target_share=0.45)  # of a pool that is as small as this
    monkeypatch.setattr("benchmarks.curation.curation.SplitConfig", lambda: larger)
    setting = replace(SETTING, scenario=replace(EVERY_SCENARIO[name], captions=2))
    curation = ScenarioCuration(dataset, setting, SMALL)
    kinds = curation.judge_kinds()
    assert sum(kind["pairs"] for kind in kinds.values()) == len(curation.pool)
    assert len(kinds) > 1
    if name == "web":
        assert set(curation.weights()) >= {"curated", "early_clip_score", "d2", "semdedup", "image_based"}


def test_clean_pools_are_as_they_were(dataset: Dataset) -> None:
    curation = ScenarioCuration(dataset, CLEAN_POOL, SMALL)
    assert not curation.wrong.any()
    assert curation.judged()["auroc"] is None
    assert redundancy.leaders(curation, {"redundancy.image": 1.0}).shape == (len(curation.pool),)


def test_the_seed_baseline_removes_whole_clusters(dataset: Dataset) -> None:
    settings = {**SETTINGS, **SMALL}
    curation = SeedCuration(dataset, SETTING, settings)
    keep = round(0.8 * len(curation.pool))
    assert curation.whole_clusters(0, keep).sum() == keep


def test_the_rare_group_is_thinned_and_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.curation.rare_group.RULE", r"\b(red)\b")
    monkeypatch.setattr("benchmarks.curation.rare_group.LEFT", 0.5)
    curation = RareGroup(dataset, CLEAN_POOL, SMALL)
    groups = np.array(curation.pool.column("group"))
    assert 0 < (groups == RARE).sum() < (np.array(curation.whole.column("group")) == RARE).sum()
    assert curation.rare_images.shape == np.unique(curation.test.image).shape
    assert "curated, groups ignored" in curation.weights()
    assert curation.by_method((0,))["kept"]["everything, not thinned"] == 1


@pytest.mark.slow
def test_rivals_are_judged_beside_ours(dataset: Dataset) -> None:
    curation = RivalCuration(dataset, SETTING, {**SMALL, "train.methods": "rivals"})
    result = curation.judge_methods((0,))
    named = {"curated", "curated_validated", "oracle", "oracle_validated"}
    assert result["shares"].keys() == {*METHODS, *named}
    images = len(np.unique(curation.test.image))
    assert {len(shares[0]) for shares in result["shares"].values()} == {images}
    kept, steps = result["kept"], result["steps"]
    assert kept["clip_score"] == pytest.approx(kept["curated"], abs=1 / len(curation.pool))
    assert kept["oracle"] == pytest.approx((~curation.wrong).mean())
    assert {steps[name] for name in ("curated", "oracle", "clip_score")} == {SETTING.steps}
    tried = {
        s: np.mean(
            [
                curation.outcome(replace(curation.source("oracle"), steps=s), seed)["choosing_loss"]
                for seed in SEEDS
            ]
        )
        for s in (4, 8, 16)
    }
    assert steps["oracle_validated"] == min(tried, key=lambda s: tried[s])


def test_dynamic_training_is_judged(dataset: Dataset) -> None:
    curation = Curation(dataset, SETTING, SMALL)
    found = ablations.dynamically(curation, "4", (0,))
    assert len(found["shares"][0]) == len(np.unique(curation.test.image))


def test_every_changed_setting_exists() -> None:
    changes = [each for values in ablations.SETTINGS.values() for each in values.values()]
    for each in (*changes, *redundancy.THRESHOLDS, SETTINGS):
        settings = {key: value for key, value in each.items() if key not in ("images", "steps")}
        tree = as_tree(load_config(None, settings))
        assert {key: reduce(getitem, key.split("."), tree) for key in settings} == settings


def test_scenarios_name_corruptions_that_exist() -> None:
    assert {one.corruption for one in EVERY_SCENARIO.values()} <= set(scenario_pools.CORRUPTIONS)
    assert SCENARIOS["web"].usual
    assert not any(SCENARIOS[name].usual for name in ("target of 50", "seen target", "no target"))


def test_retrained_is_paired_and_averaged() -> None:
    one = {
        "shares": {"curated": [[1.0, 2.0]], "random": [[0.0, 1.0]]},
        "kept": {"curated": 0.5, "random": 0.5},
    }
    found = together([[one], [one]])
    gap, (low, high) = found.compared("random")
    assert gap == low == high == 1
    assert found.row("random")["mean_recall"] == 0.5
    assert mean_of([found, Retrained(shares={"curated": found.shares["curated"] + 2}, kept=found.kept)]).mean(
        "curated"
    ) == pytest.approx(2.5)
    assert found.of_images([0]).mean("curated") == 1
    other = {
        "shares": {"curated": [[3.0, 4.0]], "random": [[0.0, 1.0]]},
        "kept": {"curated": 0.7, "random": 0.5},
    }
    noisy = together([[one, other], [other, one]])
    assert noisy.shares["curated"].tolist() == [[1, 2, 3, 4], [3, 4, 1, 2]]
    assert noisy.kept["curated"] == pytest.approx(0.6)


def test_a_bench_picks_by_the_kind_of_run(tmp_path: Path) -> None:
    bench = Bench(quick=True, seeds=(0,), cache=tmp_path, data=None)
    assert bench.pick(1, 2) == 2
