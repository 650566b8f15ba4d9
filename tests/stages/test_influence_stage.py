"""Influence of sampled pairs: the estimator's own numbers, balanced, whatever the blocks; samples and caption_control."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from chain import Chain, Counting, Killed, assert_equal_results, results

from influencespace.core.metrics import auroc
from influencespace.core.quality import agreement, quality_axis
from influencespace.core.sequential import anytime_p, tightest_at
from influencespace.core.strata import balance, means_by, shared_spread, stratified_sample
from influencespace.data.artifacts import read_manifest
from influencespace.data.buckets import read_columns, write_bucket
from influencespace.data.pair_set import PairSet
from influencespace.engine.ray_engine import RayEngine
from influencespace.estimators.influence import Influence, InfluenceScorer
from influencespace.models.space import Space
from influencespace.stages.proxies.proxies import Proxy, image_folds, proxy_name
from influencespace.stages.scoring.curvature import directions_of
from influencespace.stages.scoring.influence import InfluenceConfig, LookAgain, caption_agreement


def columns(chain: Chain, name: str) -> dict[str, np.ndarray]:
    return read_columns(chain.out / "attribute" / f"{name}.parquet")


def attribute_by(truth: Chain, out: Path, **settings: object) -> Chain:
    """The attribute stage alone, with other settings."""
    chain = replace(truth, out=out, source_folder=truth.out, attribute=replace(truth.attribute, **settings))
    chain.run("attribute")
    return chain


def assert_scores_of(truth: Chain, found: dict[str, np.ndarray]) -> None:
    """Pairs have the influence that they have where all are scored."""
    everything = columns(truth, "influence")
    by_pair = dict(zip(everything["pair"], everything["influence"], strict=True))
    np.testing.assert_allclose(
        found["influence"],
        [by_pair[pair] for pair in found["pair"]],
        atol=1e-5 * everything["influence"].std(),
    )


def influence(truth: Chain, fold: int | None, rows: np.ndarray, captions_of: np.ndarray) -> Influence:
    """The estimator, called without any stage."""
    pool, train = truth.sets["pool"], truth.proxy.train
    proxy = Proxy(truth.out / "proxy", proxy_name(fold))
    directions = directions_of(truth.out / "curvature", proxy.name).mean(0, keepdim=True)
    scorer = InfluenceScorer(
        Space(proxy.heads), directions, proxy.reference_bank(pool), train.objective, train.batch_size
    )
    return scorer((pool.inputs(rows)[0], pool.inputs(captions_of)[1]), pool.image[rows])


def test_scores_are_the_estimators(truth: Chain) -> None:
    found = columns(truth, "influence")
    rows, folds = found["pair"], truth.proxy.folds
    seen = influence(truth, None, rows, rows)
    fold = image_folds(truth.sets["pool"], truth.proxy)[rows]
    held_out = np.empty_like(seen.by_batch[0])
    for k in range(folds):
        mine = fold == k
        held_out[mine] = influence(truth, k, rows[mine], rows[mine]).by_batch[0]
    spread = 1e-5 * found["influence"].std()
    np.testing.assert_allclose(found["own_in"], np.nanmean(seen.own[0], 1), atol=spread)
    np.testing.assert_allclose(found["negative_in"], np.nanmean(seen.negative[0], 1), atol=spread)
    np.testing.assert_allclose(found["influence_in"], np.nanmean(seen.by_batch[0], 1), atol=spread)
    np.testing.assert_allclose(found["influence_out"], held_out.mean(1), atol=spread)
    a = (folds - 1) / (2 * folds)
    balanced = (1 - a) * seen.by_batch[0] + a * held_out
    np.testing.assert_allclose(found["influence"], np.nanmean(balanced, 1), atol=spread)


def test_balance_weighs_proxies_by_the_path_from_weight_one_to_zero() -> None:
    assert balance(np.array([1.0]), np.array([0.0]), 5).tolist() == [0.6]
    assert balance(np.array([0.0]), np.array([1.0]), 2).tolist() == [0.25]


def test_a_pair_is_not_judged_by_batchs_with_its_image(truth: Chain) -> None:
    found = columns(truth, "influence")
    image = truth.sets["pool"].image
    bank = Proxy(truth.out / "proxy", "all").bank
    shared = np.stack([np.isin(image[found["pair"]], image[context]) for context in bank], 1)
    np.testing.assert_array_equal(np.isnan(found["by_batch"]), shared)
    assert np.isfinite(found["influence"]).all()


@pytest.mark.parametrize("bucket_size", [16, 256])
def test_blocks_change_nothing(truth: Chain, tmp_path: Path, bucket_size: int) -> None:
    attribute_by(truth, tmp_path, bucket_size=bucket_size)
    assert_equal_results(truth.out / "attribute", tmp_path / "attribute", spreads=1e-5)


def test_strata_are_clusters_at_quantiles_of_quality(truth: Chain) -> None:
    strata = columns(truth, "strata")
    quality = read_columns(truth.out / "proxy" / "quality.parquet")
    axis = quality_axis(quality["neg_clip_in"], quality["neg_clip_out"])
    np.testing.assert_allclose(strata["quality"], axis)
    cluster = read_columns(truth.out / "cluster" / "clusters.parquet")["cluster"]
    np.testing.assert_array_equal(strata["cluster"], cluster)
    assert set(np.bincount(strata["quantile"])) == {len(axis) // 6}
    assert (np.diff(strata["quantile"][np.argsort(axis)]) >= 0).all()


def test_captions_of_an_image_agree_alike_however_many_are_in_memory(truth: Chain) -> None:
    pool = truth.sets["pool"]
    pairs, place = np.unique(np.stack([pool.image, pool.text]), axis=1, return_inverse=True)
    whole = agreement(np.asarray(pool.table.texts[pairs[1]]), pairs[0])[place.reshape(-1)]
    np.testing.assert_allclose(columns(truth, "strata")["caption_agreement"], whole)
    for block in (1, 7, 100):
        np.testing.assert_allclose(caption_agreement(pool, block), whole, atol=1e-12)


def test_a_budget_bounds_the_sample_of_each_stratum(truth: Chain, tmp_path: Path) -> None:
    chain = attribute_by(truth, tmp_path, budget=5, target_budget=3, caption_control=7)
    strata, found = columns(chain, "strata"), columns(chain, "influence")
    leaf = strata["cluster"] * 6 + strata["quantile"]
    expected = np.minimum(np.bincount(leaf, minlength=12), 5)
    np.testing.assert_array_equal(np.bincount(leaf[found["pair"]], minlength=12), expected)
    target = columns(chain, "target")
    assert set(np.bincount(strata["quantile"][target["pair"]])) == {3}
    assert target["by_target_fold"].shape == (18, truth.target.folds)
    assert len(columns(chain, "caption_control")["pair"]) == 7
    # a score does not depend on what is scored beside it
    assert_scores_of(truth, found)


def test_only_strata_of_unsure_sign_are_looked_at_again(truth: Chain, tmp_path: Path) -> None:
    chain = attribute_by(truth, tmp_path, initial_samples=4, budget=60, bucket_size=16)
    strata, found = columns(chain, "strata"), columns(chain, "influence")
    leaf = strata["cluster"] * 6 + strata["quantile"]
    size, scored = np.bincount(leaf, minlength=12), np.bincount(leaf[found["pair"]], minlength=12)
    assert len(np.unique(found["pair"])) == len(found["pair"])
    manifest = read_manifest(tmp_path / "attribute")
    assert manifest is not None
    assert manifest.details["looks"] > 1
    assert manifest.details["sample"] == scored.sum()
    # every stratum is either decided or exhausted, and each holds the first of its pairs
    p = np.load(tmp_path / "attribute" / "p_values.npy")
    exhausted = scored == np.minimum(size, 60)
    assert (exhausted | (p < 0.05)).all()
    assert not exhausted.all()
    np.testing.assert_array_equal(np.sort(found["pair"]), stratified_sample(leaf, scored))
    means = means_by(leaf[found["pair"]], found["influence"], 12)
    spread = np.sqrt(shared_spread(means, 6).variance * scored)
    np.testing.assert_allclose(p, anytime_p(means.mean, spread, scored.astype(float), tightest_at(4, 0.05)))
    # a score does not depend on the look in which it was taken
    assert_scores_of(truth, found)


@pytest.mark.parametrize("after", [26, 29, 31])
def test_a_run_killed_between_looks_continues_to_the_same(truth: Chain, after: int, tmp_path: Path) -> None:
    looks = {"initial_samples": 4, "budget": 60, "bucket_size": 16}
    whole = Counting()
    attribute_by(replace(truth, engine=whole), tmp_path / "whole", **looks)
    assert whole.tasks > 31
    with pytest.raises(Killed):
        attribute_by(replace(truth, engine=Counting(most=after)), tmp_path / "killed", **looks)
    left = Counting()
    attribute_by(replace(truth, engine=left), tmp_path / "killed", **looks)
    assert_equal_results(tmp_path / "whole" / "attribute", tmp_path / "killed" / "attribute")


def test_looks_on_ray_are_those_of_the_plain_loop(
    truth: Chain, tmp_path: Path, ray_engine: RayEngine
) -> None:
    looks = {"initial_samples": 4, "budget": 60, "bucket_size": 16}
    attribute_by(truth, tmp_path / "plain", **looks)
    attribute_by(replace(truth, engine=ray_engine), tmp_path / "ray", **looks)
    assert_equal_results(tmp_path / "plain" / "attribute", tmp_path / "ray" / "attribute", spreads=1e-6)


def test_a_look_that_is_begun_again_draws_the_same_pairs(truth: Chain, tmp_path: Path) -> None:
    shutil.copytree(truth.out / "attribute", tmp_path / "attribute")
    everything = columns(truth, "influence")
    few = stratified_sample(columns(truth, "strata")["cluster"], 8)
    rows = np.isin(everything["pair"], few)
    scored = {name: everything[name][rows] for name in ("pair", "influence")}
    write_bucket(tmp_path / "attribute", "influence", 0, "mark", scored)
    again = LookAgain(
        config=InfluenceConfig(initial_samples=4, level=1e-9), folder=tmp_path / "attribute", starts=[0]
    )
    first = again()
    sample = np.load(tmp_path / "attribute" / "sample.npy")
    assert first == len(sample) == len(np.unique(sample)) > rows.sum()
    assert again() == first
    np.testing.assert_array_equal(np.load(tmp_path / "attribute" / "sample.npy"), sample)


def test_the_folds_of_the_target_average_to_the_whole_influence(truth: Chain) -> None:
    target, found = columns(truth, "target"), columns(truth, "influence")
    by_pair = dict(zip(found["pair"], found["influence"], strict=True))
    np.testing.assert_allclose(
        target["by_target_fold"].mean(1),
        [by_pair[pair] for pair in target["pair"]],
        atol=1e-4 * found["influence"].std(),
    )


def test_the_caption_control_is_held_out_influence_with_captions_of_other_images(truth: Chain) -> None:
    caption_control = columns(truth, "caption_control")
    pool, folder = truth.sets["pool"], truth.out / "attribute"
    rows, captions_of = caption_control["pair"], np.load(folder / "caption_control_captions.npy")
    assert len(rows) == len(captions_of) == truth.attribute.caption_control
    assert (pool.image[rows] != pool.image[captions_of]).all()
    fold = image_folds(pool, truth.proxy)[rows]
    for k in range(truth.proxy.folds):
        mine = fold == k
        direct = influence(truth, k, rows[mine], captions_of[mine]).by_batch[0].mean(1)
        spread = caption_control["influence_out"].std()
        np.testing.assert_allclose(caption_control["influence_out"][mine], direct, atol=1e-5 * spread)


def test_a_caption_of_another_is_another_caption() -> None:
    """Many images share few captions, as those of classes do."""

    class Classes:
        image, text = np.arange(1000), np.arange(1000) % 10

        def __len__(self) -> int:
            return 1000

    rows = np.arange(1000)
    other = PairSet.captions_of_others(cast(PairSet, Classes()), rows, seed=0)
    assert (other % 10 != rows % 10).all()
    assert len(np.unique(other)) > 500


def test_wrong_captions_have_lower_influence(truth: Chain) -> None:
    found = columns(truth, "influence")
    assert auroc(-found["influence"], truth.world.pool.wrong[found["pair"]]) > 0.7


def test_no_caption_control_is_a_choice(truth: Chain, tmp_path: Path) -> None:
    attribute_by(truth, tmp_path, caption_control=7)  # nothing of which is left
    chain = replace(attribute_by(truth, tmp_path, caption_control=0), source_folder=None)
    for stage in ("proxy", "cluster", "redundancy", "curvature"):
        (tmp_path / stage).symlink_to(truth.out / stage)
    chain.run("fairness")
    caption_control = chain.run("curate").details["caption_control"]
    assert caption_control["estimated_wrong_share"] is caption_control["influence_permuted"] is None


def test_a_small_pool_has_fewer_quantiles(truth: Chain, tmp_path: Path) -> None:
    chain = replace(truth, out=tmp_path, source_folder=truth.out, attribute=InfluenceConfig(quantiles=500))
    assert chain.run("attribute").details["quantiles"] == len(truth.world.pool) // 10
    assert results(tmp_path / "attribute")["strata.parquet/quantile"].max() == 23
