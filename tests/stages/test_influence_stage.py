"""Influence of sampled pairs: the estimator's own numbers, balanced, whatever the buckets; samples and caption control."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from chain import (
    World,
    assert_equal_results,
    beside,
    carry,
    carry_beside,
    columns,
    quality_of,
    results,
    set_range,
)

from influencespace.core import histogram
from influencespace.core.metrics import auroc
from influencespace.core.strata import balance, quantile_of
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.ray_engine import RayEngine
from influencespace.estimators.influence import Influence, InfluenceScorer
from influencespace.estimators.table import BY_TANGENTS, TABLE
from influencespace.models.space import Space
from influencespace.pipeline import STAGES
from influencespace.run import Run, Workers
from influencespace.stages.proxies.proxy import Proxy, proxy_name
from influencespace.stages.proxies.train_many import fold_of_rows
from influencespace.stages.scoring.curvature import directions_of

FEW = {"influence.max_samples": 30, "influence.target_samples": 3, "influence.bucket_size": 16}
"""Settings by which not all pairs are scored."""


def assert_scores_of(truth: Run, scored: dict[str, np.ndarray]) -> None:
    """Pairs have the influence that they have where all are scored."""
    everything = columns(truth, "influence/influence")
    by_pair = dict(zip(everything["pair"], everything["influence"], strict=True))
    expected = [by_pair[pair] for pair in scored["pair"]]
    np.testing.assert_allclose(scored["influence"], expected, atol=1e-5 * everything["influence"].std())


def influence(truth: Run, fold: int | None, rows: np.ndarray, captions_of: np.ndarray) -> Influence:
    """The estimator, called without any stage."""
    pool, train = truth.pool, truth.config.proxy.train
    proxy = Proxy(truth.at("proxies"), proxy_name(fold))
    directions = directions_of(truth.at("curvature"), proxy.name).mean(0, keepdim=True)
    bank = proxy.reference_bank(pool)
    scorer = InfluenceScorer(Space(proxy.heads), directions, bank, train.objective, train.batch_size)
    return scorer((pool.inputs(rows)[0], pool.inputs(captions_of)[1]), pool.image[rows])


def test_scores_are_the_estimators(truth: Run) -> None:
    scored = columns(truth, "influence/influence")
    rows, folds = scored["pair"], truth.config.proxy.folds
    in_sample = influence(truth, None, rows, rows)
    fold = fold_of_rows(truth.pool, rows, truth.config.proxy.folds, truth.seed)
    out_of_fold = np.empty_like(in_sample.by_batch[0])
    for k in range(folds):
        mine = fold == k
        out_of_fold[mine] = influence(truth, k, rows[mine], rows[mine]).by_batch[0]
    spread = 1e-5 * scored["influence"].std()
    np.testing.assert_allclose(scored["own_in"], np.nanmean(in_sample.own[0], 1), atol=spread)
    np.testing.assert_allclose(scored["negative_in"], np.nanmean(in_sample.negative[0], 1), atol=spread)
    np.testing.assert_allclose(scored["influence_in"], np.nanmean(in_sample.by_batch[0], 1), atol=spread)
    np.testing.assert_allclose(scored["influence_out"], out_of_fold.mean(1), atol=spread)
    a = (folds - 1) / (2 * folds)
    balanced = (1 - a) * in_sample.by_batch[0] + a * out_of_fold
    np.testing.assert_allclose(scored["influence"], np.nanmean(balanced, 1), atol=spread)


def test_balance_weighs_proxies_by_the_path_from_weight_one_to_zero() -> None:
    assert balance(np.array([1.0]), np.array([0.0]), 5).tolist() == [0.6]
    assert balance(np.array([0.0]), np.array([1.0]), 2).tolist() == [0.25]


def test_a_pair_is_not_judged_by_batches_with_its_image(truth: Run) -> None:
    scored, image = columns(truth, "influence/influence"), truth.pool.image
    bank = Proxy(truth.at("proxies"), "all").bank
    shared = np.stack([np.isin(image[scored["pair"]], image[batch]) for batch in bank], 1)
    np.testing.assert_array_equal(np.isnan(scored["by_batch"]), shared)
    assert np.isfinite(scored["influence"]).all()


def test_strata_are_clusters_at_quantiles_of_quality(truth: Run) -> None:
    strata, axis = columns(truth, "influence/strata"), quality_of(truth)
    np.testing.assert_allclose(strata["quality"], axis)
    np.testing.assert_array_equal(strata["cluster"], columns(truth, "cluster/clusters")["cluster"])
    assert set(np.bincount(strata["quantile"])) == {len(axis) // 6}
    assert (np.diff(strata["quantile"][np.argsort(axis)]) >= 0).all()


def test_the_sample_is_the_first_pairs_of_each_quantile(truth: Run, tmp_path: Path) -> None:
    run = carry_beside(truth, tmp_path, "influence", max_samples=30, target_samples=3, control_samples=7)
    strata, scored = columns(run, "influence/strata"), columns(run, "influence/influence")
    np.testing.assert_array_equal(strata["quantile"], quantile_of(strata["quality"], 6))
    expected = [row for q in range(6) for row in np.flatnonzero(strata["quantile"] == q)[:5]]
    assert scored["pair"].tolist() == sorted(expected)
    target = columns(run, "influence/target")
    assert set(np.bincount(strata["quantile"][target["pair"]])) == {3}
    assert target["by_target_fold"].shape == (18, truth.config.curvature.target_folds)
    assert len(columns(run, "influence/caption_control")["pair"]) == 7
    # a score does not depend on what is scored beside it
    assert_scores_of(truth, scored)


def test_a_small_pool_is_scored_as_a_whole(truth: Run) -> None:
    assert columns(truth, "influence/influence")["pair"].tolist() == list(range(len(truth.pool)))


@pytest.mark.ray
def test_ray_equals_the_plain_loop(truth: Run, tmp_path: Path, ray_engine: RayEngine, ranges: None) -> None:
    here, there = (beside(truth, tmp_path / name, "influence", settings=FEW) for name in ("a", "b"))
    carry(here, "influence")
    carry(there, "influence", engine=RayEngine(3))
    assert_equal_results(here.at("influence"), there.at("influence"), spreads=1e-6)


def test_the_size_of_ranges_changes_nothing(
    truth: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor how many values a search may hold."""
    first = beside(truth, tmp_path / "first", "influence", settings=FEW)
    carry(first, "influence")
    for size, collected in ((7, 10**6), (100, 20), (239, 0)):
        set_range(monkeypatch, size)
        monkeypatch.setattr(histogram, "COLLECTED", collected)
        again = beside(truth, tmp_path / f"{size}", "influence", settings=FEW)
        carry(again, "influence")
        assert_equal_results(first.at("influence"), again.at("influence"), spreads=1e-9)


def test_the_folds_of_the_target_average_to_the_whole_influence(truth: Run) -> None:
    target, scored = columns(truth, "influence/target"), columns(truth, "influence/influence")
    by_pair = dict(zip(scored["pair"], scored["influence"], strict=True))
    expected = [by_pair[pair] for pair in target["pair"]]
    mean = target["by_target_fold"].mean(1)
    np.testing.assert_allclose(mean, expected, atol=1e-4 * scored["influence"].std())


def test_the_caption_control_is_influence_out_of_fold_with_captions_of_other_images(truth: Run) -> None:
    control, pool = columns(truth, "influence/caption_control"), truth.pool
    rows, captions_of = control["pair"], np.load(truth.at("influence") / "permuted_captions.npy")
    assert len(rows) == len(captions_of) == truth.config.influence.control_samples
    assert (pool.image[rows] != pool.image[captions_of]).all()
    fold, spread = (
        fold_of_rows(truth.pool, rows, truth.config.proxy.folds, truth.seed),
        control["influence_out"].std(),
    )
    for k in range(truth.config.proxy.folds):
        mine = fold == k
        direct = influence(truth, k, rows[mine], captions_of[mine]).by_batch[0].mean(1)
        np.testing.assert_allclose(control["influence_out"][mine], direct, atol=1e-5 * spread)


def test_a_caption_of_another_is_another_caption() -> None:
    """Many images share few captions, as those of classes do."""

    class Classes:
        def __len__(self) -> int:
            return 100_000

        def read(self, rows: slice | np.ndarray, *names: str) -> dict[str, np.ndarray]:
            place = np.arange(100_000)[rows]
            assert len(place) < 70_000
            return {"image": place, "text": place % 10}

    rows = np.arange(1000)
    other = PairSet.captions_of_others(cast(PairSet, Classes()), rows, seed=0)
    assert (other % 10 != rows % 10).all()
    assert len(np.unique(other)) > 500


def test_wrong_captions_have_lower_influence(truth: Run, world: World) -> None:
    scored = columns(truth, "influence/influence")
    assert auroc(-scored["influence"], world["pool"].wrong[scored["pair"]]) > 0.7


def test_no_caption_control_is_a_choice(truth: Run, tmp_path: Path) -> None:
    settings = {"influence.control_samples": 0, "selection.weighting": "uniform"}
    run = beside(truth, tmp_path, "influence", "fairness", "selection", settings=settings)
    details = carry(run, "influence", "fairness", "selection").details["caption_control"]
    assert details["estimated_wrong_share"] is details["influence_permuted"] is None


def test_a_small_pool_has_fewer_quantiles(truth: Run, tmp_path: Path) -> None:
    run = carry_beside(truth, tmp_path, "influence", quantiles=500)
    assert run.manifest("influence").details["quantiles"] == len(truth.pool) // 10
    assert results(run.at("influence"))["strata.parquet/quantile"].max() == 23


@pytest.mark.parametrize("estimator", TABLE)
def test_any_estimator_of_the_table_curates(truth: Run, tmp_path: Path, estimator: str) -> None:
    """By a size: scores that have no zero, such as EL2N, have no threshold either."""
    settings = {
        "influence.estimator": estimator,
        "influence.max_samples": 24,
    }
    settings |= {"selection.weighting": "influence", "selection.tau_low": -1e3, "selection.target_size": 0.7}
    names = ("curvature", "influence", "fairness", "selection")
    run = beside(truth, tmp_path, *names, settings=settings)
    assert carry(run, *names).details["kept_fraction"] == pytest.approx(0.7)
    scored = columns(run, "influence/influence")
    assert np.isfinite(scored["influence"]).all()
    assert scored["influence"].std() > 0
    # roles are known of what is influence along directions
    directional = bool(run.manifest("curvature").details["proxies"])
    assert directional == (estimator in BY_TANGENTS)
    assert np.isfinite(scored["own_in"]).all() == directional


def test_pairs_that_no_batch_has_held_are_left_out_of_unrolled_influence(truth: Run, tmp_path: Path) -> None:
    """Of a pool that is larger than all batches together; the others decide."""
    settings = {"influence.estimator": "unrolled", "proxy.train.steps": 3}
    run = beside(truth, tmp_path, *(stage.name for stage in STAGES), settings=settings)
    details = carry(run, *(stage.name for stage in STAGES[:7])).details
    influence = read_columns(run.at("influence") / "influence.parquet")["influence"]
    assert np.isfinite(influence).all()
    counts = run.manifest("influence").details
    assert counts["without_score"] == counts["sample"] - len(influence) > 0
    assert details["caption_control"]["influence_permuted"] is None


def test_scores_on_another_device_are_the_same(truth: Run, tmp_path: Path) -> None:
    """Along all the way of a GPU: here a CPU of another name."""

    run = beside(truth, tmp_path, "influence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "device", "cpu:0")
        seen: list[str] = []
        inputs = PairSet.inputs

        def watched(self: PairSet, pairs: Any, device: str = "cpu") -> Any:
            seen.append(device)
            return inputs(self, pairs, device)

        patch.setattr(PairSet, "inputs", watched)
        carry(run, "influence")
    assert set(seen) == {"cpu:0"}
    assert_equal_results(truth.at("influence"), run.at("influence"), spreads=1e-6)
