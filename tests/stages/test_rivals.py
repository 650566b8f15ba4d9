"""Rivals: orders by scores as they are defined, cut where curated is cut, and the choices that retraining likes best."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chain import Counting, Killed, World, assert_equal_results, beside, carry, columns, set_range

from influencespace.core.coreset import d2, repeated
from influencespace.core.hashing import uniform
from influencespace.data.artifacts import Manifest
from influencespace.data.joined import Joined
from influencespace.engine.ray_engine import RayEngine
from influencespace.errors import InputError
from influencespace.run import Run
from influencespace.stages.proxies.target import TargetHalves, choosing_loss
from influencespace.stages.proxies.train_many import Given, train
from influencespace.stages.rivals.names import DEFAULT, METHODS, RANKED, named, orders_of, scores_of
from influencespace.stages.rivals.ranking import WIDER, Rankings
from influencespace.stages.rivals.scores import DrawBank
from influencespace.stages.rivals.sources import source_of
from influencespace.stages.rivals.validation import FRACTIONS, TEMPERATURES
from influencespace.stages.selection.weighting import SEEDS
from influencespace.stages.training.train import TrainConfig

ALL = {"train.methods": "rivals", "train.seeds": [0]}


@pytest.fixture(scope="module")
def every(truth: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has trained all rivals."""
    run = beside(truth, tmp_path_factory.mktemp("rivals"), "rivals", "train", "evaluate", settings=ALL)
    carry(run, "rivals", "train", "evaluate")
    return run


def details(run: Run) -> dict[str, Any]:
    return dict(run.manifest("rivals").details)


def kept(run: Run) -> int:
    return int(columns(run, "selection/curated", "kept")["kept"].sum())


def first(score: np.ndarray, size: int) -> np.ndarray:
    chosen = np.zeros(len(score), bool)
    chosen[np.argsort(-score, kind="stable")[:size]] = True
    return chosen


def test_the_default_methods_keep_as_many_pairs_as_curated(truth: Run) -> None:
    weights, scores = columns(truth, "rivals/weights"), columns(truth, "rivals/scores")
    assert tuple(weights) == DEFAULT[2:]
    truth_of = {
        "random": -uniform(np.arange(len(truth.pool)), truth.seed),
        "clip_score": truth.pool.clip_score,
        "neg_clip_loss": scores["neg_clip_loss"],
    }
    for name, score in truth_of.items():
        np.testing.assert_array_equal(weights[name], first(score, kept(truth)), err_msg=name)


def test_all_rivals_are_trained_and_compared(every: Run) -> None:
    evaluated = every.manifest("evaluate").details["methods"]
    assert set(evaluated) == set(METHODS)
    share, rows = kept(every) / len(every.pool), len(every.pool)
    weights = columns(every, "rivals/weights")
    for name in RANKED:
        assert evaluated[name]["kept_fraction"] == pytest.approx(share), name
        assert (weights[name] > 0).sum() == kept(every), name
    choices = details(every)["choices"]
    for name in RANKED[1:]:
        choice = choices[f"{name}_validated"]
        assert evaluated[f"{name}_validated"]["steps"] == choice["steps"]
        assert (weights[f"{name}_validated"] > 0).sum() == round(choice["fraction"] * rows), name
    assert evaluated["target_alone"]["kept_fraction"] == 0
    assert evaluated["pool_and_target"]["kept_fraction"] == 1


def test_neg_clip_loss_is_of_the_given_embeddings(truth: Run) -> None:
    """Of five batches, at the scale of an encoder that is not at hand."""
    bank = DrawBank(pool=truth.pool, seed=truth.seed)()
    u, t = truth.pool.inputs(slice(None))
    image = truth.pool.image
    values = np.full((len(image), len(bank)), np.nan)
    for k, rows in enumerate(bank):
        own = 100 * (u * t).sum(1)
        loss = ((100 * u @ t[rows].T).logsumexp(1) + (100 * t @ u[rows].T).logsumexp(1)) / 2 - own
        values[:, k] = np.where(np.isin(image, image[rows]), np.nan, -loss.numpy())
    np.testing.assert_allclose(
        columns(truth, "rivals/scores")["neg_clip_loss"], np.nanmean(values, 1), rtol=1e-4
    )
    assert details(truth)["logit_scale"] == 100


def test_norm_sim_chooses_among_the_best_by_neg_clip_loss(every: Run) -> None:
    scores, size = columns(every, "rivals/scores"), kept(every)
    halves = TargetHalves(every.target, every.seed)
    cosines = every.pool.inputs(slice(None))[0] @ every.target.inputs(halves.gradient)[0].T
    np.testing.assert_allclose(scores["norm_sim"], cosines.amax(1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(scores["norm_sim_2"], cosines.square().mean(1).numpy(), rtol=1e-4)
    among = first(scores["neg_clip_loss"], min(len(every.pool), round(WIDER * size)))
    for name in ("norm_sim", "norm_sim_2"):
        chosen = first(np.where(among, scores[name], -np.inf), size)
        np.testing.assert_array_equal(columns(every, "rivals/weights")[name] > 0, chosen)


def test_orders_by_likeness_are_of_each_cluster(every: Run) -> None:
    cluster = columns(every, "cluster/clusters", "cluster")["cluster"]
    likeness, images = columns(every, "rivals/likeness"), every.pool.inputs(slice(None))[0]
    for number in np.unique(cluster):
        rows = np.flatnonzero(cluster == number)
        X, score = images[rows], every.pool.clip_score[rows]
        np.testing.assert_allclose(likeness["semdedup"][rows], -repeated(X), atol=1e-6)
        order = d2(X, (score - score.min()) / np.ptp(score), len(rows))
        assert (np.diff(likeness["d2"][rows[order]]) < 0).all()
        for name in ("d2", "diversity", "coreset"):
            assert likeness[name][rows].mean() == pytest.approx(-0.5), name


@pytest.mark.parametrize(("name", "least"), [("dfn", 0.8), ("datainf", 0.65), ("m_flyt", 0.7), ("mgd", 0.6)])
def test_rivals_that_learn_from_the_target_find_the_wrong_captions(
    every: Run, world: World, name: str, least: float
) -> None:
    """The others go by the given embeddings, whose two sides this world has turned away from each other."""
    rankings = Rankings(folder=every.at("rivals"), pool=every.pool, seed=every.seed)
    score = scores_of_mix(every) if name == "m_flyt" else rankings.read(name, 0, len(every.pool))
    assert auroc(score, ~world["pool"].wrong) > least


def auroc(score: np.ndarray, good: np.ndarray) -> float:
    """The chance that a good pair is above another."""
    return float((score[good][:, None] > score[~good]).mean())


def scores_of_mix(run: Run) -> np.ndarray:
    """The standardised scores by what each counts."""
    given = columns(run, "rivals/scores") | {
        "clip_score": run.pool.clip_score,
        "datainf": columns(run, "rivals/datainf")["score"],
    }
    mix = details(run)["mix"]
    assert set(mix) == set(given)
    mixed: np.ndarray = sum(mix[name] * (x - x.mean()) / x.std() for name, x in given.items())
    return mixed


def test_the_mix_is_of_standardised_scores(every: Run) -> None:
    chosen = first(scores_of_mix(every), kept(every))
    np.testing.assert_array_equal(columns(every, "rivals/weights")["m_flyt"] > 0, chosen)


def test_validated_choices_are_those_of_the_lowest_loss(every: Run) -> None:
    """Of all trials of a method, seven at most; and one of them anew by the plain loop."""
    trials, choices = details(every)["trials"], details(every)["choices"]
    for name in ("clip_score", "mgd", "target_alone", "pool_and_target"):
        mine = [trial for trial in trials if trial["method"] == name]
        assert len(mine) <= 7
        best = min(mine, key=lambda trial: trial["target_loss"])
        assert choices[f"{name}_validated"] == {key: best[key] for key in best if key != "target_loss"}
    ranked = [trial for trial in trials if trial["method"] == "clip_score"]
    assert {trial["fraction"] for trial in ranked} >= set(FRACTIONS)
    assert {trial["temperature"] for trial in ranked} == {None, *TEMPERATURES}
    assert len({trial["steps"] for trial in ranked}) == 3
    soft = next(trial for trial in ranked if trial["temperature"] == 0.5 and trial["steps"] == 20)
    score, size = every.pool.clip_score, round(soft["fraction"] * len(every.pool))
    raw = np.exp((score - score.mean()) / score.std() / 0.5) * first(score, size)
    weights = np.minimum(raw * size / raw.sum(), 5)
    config, halves = every.config.proxy.train, TargetHalves(every.target, every.seed)
    heads = [train(every.pool, Given(weights), config, seed).heads for seed in SEEDS]
    losses = [choosing_loss(one, halves, config) for one in heads]
    assert soft["target_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_target_alone_is_validated_without_the_half_that_chooses(every: Run) -> None:
    trial = next(one for one in details(every)["trials"] if one["method"] == "target_alone")
    halves, weights = TargetHalves(every.target, every.seed), np.zeros(len(every.target))
    weights[halves.gradient] = 1
    config = every.config.proxy.train
    assert trial["steps"] == config.steps
    losses = [
        choosing_loss(train(every.target, Given(weights), config, seed).heads, halves, config)
        for seed in SEEDS
    ]
    assert trial["target_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_pool_and_target_are_joined_evenly(truth: Run) -> None:
    both = Joined(truth.pool, truth.target)
    of_target, own = both.places(slice(None))
    assert (len(both), of_target.sum()) == (len(truth.pool) + len(truth.target), len(truth.target))
    np.testing.assert_array_equal(np.sort(own[of_target]), np.arange(len(truth.target)))
    np.testing.assert_array_equal(np.sort(own[~of_target]), np.arange(len(truth.pool)))
    assert np.abs(np.cumsum(of_target) - np.arange(1, len(both) + 1) * of_target.mean()).max() <= 1
    rows = np.array([5, 0, 311, 17, 18, 19])
    image, (images, texts) = both.read(rows, "image")["image"], both.inputs(rows)
    for i, row in enumerate(rows):
        pairs = truth.target if of_target[row] else truth.pool
        assert image[i] == pairs.image[own[row]]
        for mine, theirs in zip((images[i], texts[i]), pairs.inputs(own[row : row + 1]), strict=True):
            torch.testing.assert_close(mine, theirs[0])
    span = both.inputs(slice(10, 60))[0]
    torch.testing.assert_close(span, both.inputs(np.arange(10, 60))[0])


def test_only_what_methods_need_is_computed(truth: Run, tmp_path: Path) -> None:
    assert scores_of(orders_of(["norm_sim"])) == ("neg_clip_loss", "norm_sim")
    assert scores_of(orders_of(["m_flyt_validated"])) == ("neg_clip_loss", "norm_sim", "norm_sim_2", "dfn")
    for number, (methods, files) in enumerate(
        [
            (["curated", "everything", "dynamic"], set()),
            (["curated", "clip_score"], {"weights"}),
            (["curated", "d2"], {"weights", "likeness"}),
            (["curated", "target_alone"], set()),
        ]
    ):
        run = beside(truth, tmp_path / str(number), "rivals", settings={"train.methods": methods})
        assert set(carry(run, "rivals").files) == {f"{file}.parquet" for file in files}


def test_methods_are_named_once_and_unknown_ones_refused() -> None:
    assert TrainConfig(methods=("rivals", "dynamic")).methods == (*METHODS, "dynamic")
    assert named(["curated", "random", "curated"]) == ("curated", "random")
    with pytest.raises(ValueError, match="methods has proxy_clip_score: give curated, NAME=FILE"):
        TrainConfig(methods=("curated", "proxy_clip_score"))
    with pytest.raises(ValueError, match="no curated"):
        TrainConfig(methods=("random",))


def test_a_list_of_the_users_own_is_trained_on(truth: Run, world: World, tmp_path: Path) -> None:
    """With mean weight 1, whatever the unit; pairs that the pool does not have are none of its business."""
    uids, weights = [*world["pool"].uids[:60], "elsewhere"], [*np.repeat([2.0, 6.0, 0.0], 20), 9.0]
    pq.write_table(pa.table({"uid": uids, "weight": weights}), tmp_path / "mine.parquet")
    settings = {"train.methods": ["curated", f"mine={tmp_path / 'mine.parquet'}"], "train.seeds": [0]}
    run = beside(truth, tmp_path / "run", "rivals", "train", "evaluate", settings=settings)
    carry(run, "rivals", "train", "evaluate")
    expected = np.zeros(len(run.pool))
    expected[:40] = np.repeat([0.5, 1.5], 20)
    np.testing.assert_allclose(columns(run, "rivals/weights")["mine"], expected)
    measures = run.manifest("evaluate").details["methods"]["mine"]
    assert measures["kept_fraction"] == pytest.approx(40 / len(run.pool))
    pq.write_table(pa.table({"uid": ["elsewhere"]}), tmp_path / "mine.parquet")
    with pytest.raises(
        InputError, match=r"none of the pool's pairs any weight: it lists 1 such as elsewhere"
    ):
        carry(run, "rivals")


def test_a_list_has_a_name_of_its_own() -> None:
    assert TrainConfig(methods=("curated", "mine=a.parquet")).methods == ("curated", "mine=a.parquet")
    for wrong in (("random=a.txt",), ("my list=a.txt",), ("mine=a.txt", "mine=b.txt")):
        with pytest.raises(ValueError, match="the name of a list is a word of its own"):
            TrainConfig(methods=("curated", *wrong))


def test_ranges_and_a_kill_change_nothing(
    every: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["curated", "norm_sim", "mgd", "m_flyt", "clip_score_validated", "semdedup"]
    whole = beside(every, tmp_path / "whole", "rivals", settings={"train.methods": methods})
    manifest = carry(whole, "rivals")
    set_range(monkeypatch, 100)
    killed = beside(every, tmp_path / "killed", "rivals", settings={"train.methods": methods})
    limit = 3
    while True:
        try:
            again: Manifest = carry(killed, "rivals", engine=Counting(limit=limit))
            break
        except Killed:
            limit += 20
    assert limit > 40
    assert again.details == manifest.details
    assert_equal_results(whole.at("rivals"), killed.at("rivals"), spreads=1e-6)


@pytest.mark.ray
def test_all_rivals_on_ray_are_those_of_the_plain_loop(
    every: Run, tmp_path: Path, ray_engine: RayEngine
) -> None:
    methods = ["curated", "norm_sim", "datainf", "d2", "m_flyt_validated", "pool_and_target_validated"]
    here, there = (
        beside(every, tmp_path / name, "rivals", settings={"train.methods": methods}) for name in ("a", "b")
    )
    carry(here, "rivals")
    carry(there, "rivals", engine=RayEngine(2))
    assert_equal_results(here.at("rivals"), there.at("rivals"), spreads=1e-4)
    assert source_of(there, "pool_and_target").kept_fraction == 1
