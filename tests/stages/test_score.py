"""The score stage: the plain loop's scores by any engine, bucket size and number of workers; what is wrong is reported."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from chain import Careful, World, beside

from influencespace.engine.local import Engine
from influencespace.errors import InputError
from influencespace.estimators.problem import scores
from influencespace.estimators.table import TABLE
from influencespace.run import Run, carry_out
from influencespace.stages.scoring.score import Score, ScoreConfig
from influencespace.stages.scoring.scoring import ScoringInputs, make_estimator


def scored(
    truth: Run, folder: Path, engine: Engine | None = None, *, name: str = "ecif", size: int = 50
) -> np.ndarray:
    run = beside(truth, folder, "scores/ecif")
    stage = Score(ScoreConfig(estimator=name, bucket_size=size))
    carry_out(stage, run, engine or Careful())
    table = pq.read_table(run.at(stage.name) / "scores.parquet")
    assert table["uid"].to_pylist() == list(run.pool.column("uid"))
    return table["score"].to_numpy()


@pytest.mark.parametrize("name", TABLE)
def test_buckets_give_the_scores_of_the_plain_loop(truth: Run, tmp_path: Path, name: str) -> None:
    inputs = ScoringInputs.of(truth)
    whole = scores(TABLE[name](), inputs.problem(), [inputs.batch(np.arange(len(inputs.pool)))])
    for size in (37, 64):
        by_bucket = scored(truth, tmp_path / str(size), name=name, size=size)
        np.testing.assert_allclose(by_bucket, whole, rtol=0, atol=1e-5 * np.nanstd(whole))


def test_another_option_is_another_score(truth: Run, tmp_path: Path) -> None:
    run = beside(truth, tmp_path, "scores/ecif")
    own, negative = (
        carry_out(Score(ScoreConfig(estimator="ecif", options={"role": role})), run, Careful())
        for role in ("own", "negative")
    )
    assert own.files["scores.parquet"] != negative.files["scores.parquet"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
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
def test_a_wrong_estimator_is_refused(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_estimator(name, options)


def test_the_replayed_training_ends_in_the_proxy(truth: Run, world: World) -> None:
    problem = ScoringInputs.of(truth).problem()
    assert problem.pool_size == len(world["pool"])
    assert problem.trajectory is not None
    final, proxy = problem.trajectory.final, problem.space.flatten(problem.space.parameters)
    np.testing.assert_allclose(final.numpy(), proxy.numpy(), atol=2e-4 * float(proxy.abs().max()))
    assert len(problem.checkpoints) >= 2
    np.testing.assert_allclose(
        problem.checkpoints[-1].load().parameters["image"].numpy(),
        problem.space.parameters["image"].numpy(),
        atol=0.5 * float(proxy.abs().max()),
    )
