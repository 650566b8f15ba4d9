"""The score stage: the plain loop's scores by any engine, block size and number of actors; what is wrong is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from chain import Chain, Idle, Losing

from influencespace.engine.local import Engine, LocalEngine
from influencespace.errors import InputError
from influencespace.estimators.problem import scores
from influencespace.estimators.table import TABLE
from influencespace.stages.scoring.score import ScoreConfig, ScoringInputs, make_estimator, score


def valued(truth: Chain) -> ScoringInputs:
    return ScoringInputs(
        pool=truth.sets["pool"],
        target=truth.sets["target"],
        proxies=truth.proxy,
        curvature=truth.curvature,
        proxy_folder=truth.out / "proxy",
    )


def scored(truth: Chain, folder: Path, engine: Engine, name: str, size: int) -> np.ndarray:
    config = ScoreConfig(estimator=name, bucket_size=size)
    score(valued(truth), truth.given("proxy"), config, folder, engine)
    table = pq.read_table(folder / "scores.parquet")
    assert table["uid"].to_pylist() == truth.world.pool.uids
    return table["score"].to_numpy()


@pytest.mark.parametrize("name", TABLE)
def test_blocks_give_the_scores_of_the_plain_loop(truth: Chain, tmp_path: Path, name: str) -> None:
    given = valued(truth)
    whole = scores(TABLE[name](), given.problem(), [given.batch((0, len(given.pool)))])
    for size in (7, 64):
        found = scored(truth, tmp_path / str(size), LocalEngine(), name, size)
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * np.nanstd(whole))


def test_ray_gives_the_same_scores(truth: Chain, tmp_path: Path, ray_engine: Engine) -> None:
    here = scored(truth, tmp_path / "here", LocalEngine(), "ecif", 50)
    there = scored(truth, tmp_path / "there", ray_engine, "ecif", 20)
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-5 * np.nanstd(here))


def test_tasks_that_are_begun_again_change_nothing(truth: Chain, tmp_path: Path) -> None:
    here = scored(truth, tmp_path / "here", LocalEngine(), "ecif", 50)
    np.testing.assert_array_equal(scored(truth, tmp_path / "again", Losing(), "ecif", 50), here)


def test_a_second_call_does_nothing(truth: Chain, tmp_path: Path) -> None:
    first = scored(truth, tmp_path, LocalEngine(), "ecif", 50)
    np.testing.assert_array_equal(scored(truth, tmp_path, Idle(), "ecif", 50), first)


def test_another_option_is_another_score(truth: Chain, tmp_path: Path) -> None:
    given, inputs = valued(truth), truth.given("proxy")
    config = ScoreConfig(estimator="ecif", options={"role": "own"})
    first = score(given, inputs, config, tmp_path, LocalEngine())
    second = score(given, inputs, replace(config, options={"role": "negative"}), tmp_path, LocalEngine())
    assert first.files["scores.parquet"] != second.files["scores.parquet"]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("eciff", {}, "there is no estimator 'eciff'; there are .*ecif"),
        ("ecif", {"rol": "own"}, "the estimator ecif does not take .*rol"),
        ("ecif", {"role": "mine"}, "the estimator ecif does not take .*mine"),
        ("el2n", {"keep": "foo"}, "the estimator el2n does not take .*foo"),
        ("less", {"dimension": 0}, "the estimator less does not take .*greater than or equal to 1"),
        ("random", {"seed": 3}, "the estimator random does not take .*seed"),
        ("datainf", {"relative_damping": float("nan")}, "the estimator datainf does not take .*nan"),
    ],
)
def test_a_wrong_estimator_is_told(name: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make_estimator(name, options)


def test_the_replayed_training_ends_in_the_proxy(truth: Chain) -> None:
    problem = valued(truth).problem()
    assert problem.trajectory is not None
    found, proxy = problem.trajectory.final, problem.space.flatten(problem.space.parameters)
    np.testing.assert_allclose(found.numpy(), proxy.numpy(), atol=2e-4 * float(proxy.abs().max()))
    assert len(problem.checkpoints) >= 2
    np.testing.assert_allclose(
        problem.checkpoints[-1].load().parameters["image"].numpy(),
        problem.space.parameters["image"].numpy(),
        atol=0.5 * float(proxy.abs().max()),
    )
