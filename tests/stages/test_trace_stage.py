"""The trace stage: the same causes by any engine, block size and way of looking; the index is resumed, not redone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import Careful, beside

from influencespace.engine.local import Engine
from influencespace.estimators.ecif import sketch_of
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.trace import make_tracer, most_influential, query_directions
from influencespace.run import Run, Workers, carry_out
from influencespace.stages.scoring.scoring import ScoringInputs
from influencespace.stages.scoring.trace import (
    Causes,
    GradientIndex,
    TraceConfig,
    shard_path,
    trace,
)

INDEX = GradientIndex.name
CONFIG = TraceConfig(top=5, index_dimension=10_000, bucket_size=50)


def traced(
    truth: Run, engine: Engine | None = None, index: Path | None = None, **changes: Any
) -> list[Causes]:
    """The causes of three queries."""
    workers = Workers(engine=engine or Careful(), folder=truth.at("trace"), stage="trace")
    queries = truth.test.inputs(np.arange(3))
    return trace(ScoringInputs.of(truth), queries, replace(CONFIG, **changes), workers, index)


def assert_same(causes: list[Causes], expected: list[Causes]) -> None:
    assert len(causes) == len(expected)
    for mine, theirs in zip(causes, expected):
        for a, b in ((mine.harmful, theirs.harmful), (mine.helpful, theirs.helpful)):
            assert [cause.row for cause in a] == [cause.row for cause in b]
            for name in ("score", "own", "negative", "relative_influence"):
                values = [[getattr(cause, name) for cause in one] for one in (a, b)]
                np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def whole(truth: Run) -> list[Causes]:
    """By the plain loop over one bucket."""
    return traced(truth, bucket_size=1000)


def test_it_is_the_tracer_over_the_whole_pool(truth: Run, whole: list[Causes]) -> None:
    inputs = ScoringInputs.of(truth)
    problem, batch = inputs.problem(), inputs.batch(np.arange(len(truth.pool)))
    group = NegativeBatch(inputs=truth.test.inputs(np.arange(3)), image=np.full(3, -1))
    sketch = sketch_of(problem, inputs.curvature)
    tracer = make_tracer(problem, query_directions(problem, group, sketch, inputs.curvature))
    everything = tracer(batch.inputs, batch.image)
    for query, causes in enumerate(whole):
        for sign, mine in ((-1, causes.harmful), (1, causes.helpful)):
            rows = most_influential(everything, query, sign, candidates=50, top=5)
            assert [cause.row for cause in mine] == rows.tolist()
            assert len(mine) == 5
            assert all(sign * cause.score > 0 for cause in mine)
            assert all(cause.score == pytest.approx(cause.own + cause.negative) for cause in mine)
            order = [cause.relative_influence for cause in mine]
            assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("size", [7, 100])
def test_any_buckets_give_the_same(truth: Run, whole: list[Causes], size: int) -> None:
    assert_same(traced(truth, bucket_size=size), whole)


def test_an_exact_index_gives_the_same(truth: Run, whole: list[Causes]) -> None:
    manifest = truth.manifest(INDEX)
    assert manifest.details["without_gradient"] == 0
    assert len([name for name in manifest.files if name.startswith("gradients-")]) == 5
    assert_same(traced(truth, index=truth.at(INDEX)), whole)


@pytest.mark.ray
def test_ray_gives_the_same(truth: Run, whole: list[Causes], ray_engine: Engine) -> None:
    assert_same(traced(truth, ray_engine), whole)
    assert_same(traced(truth, ray_engine, truth.at(INDEX)), whole)


def test_more_queries_than_are_held_at_once_are_traced_one_by_one(
    truth: Run, whole: list[Causes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influencespace.stages.scoring.trace.AT_ONCE", 2)
    assert_same(traced(truth), whole)


def test_an_index_of_another_config_is_another_one(truth: Run, tmp_path: Path) -> None:
    run = beside(truth, tmp_path, INDEX)
    stage = GradientIndex(replace(CONFIG, index_dimension=16, bucket_size=100))
    manifest, index = carry_out(stage, run, Careful()), run.at(INDEX)
    assert manifest.details["dimension"] == 32 < truth.manifest(INDEX).details["dimension"]
    assert {path.name for path in index.glob("*.safetensors")} == {
        "sides.safetensors",
        *(shard_path(index, start).name for start in (0, 100, 200)),
    }
    assert traced(truth, index=index)[0].harmful
