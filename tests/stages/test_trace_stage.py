"""The trace stage: the same causes by any engine, block size and way of looking; the index is resumed, not redone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chain import Chain, Idle
from test_score import valued

from influencespace.engine.local import Engine, LocalEngine
from influencespace.estimators.ecif import curvature_of
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.trace import make_tracer, most_influential, query_directions
from influencespace.models.space import Inputs
from influencespace.stages.scoring.trace import (
    Causes,
    TraceConfig,
    gradient_index,
    load_rows,
    shard_path,
    trace,
)

CONFIG = TraceConfig(top=5, index_dimension=10_000, bucket_size=50)


def queries(truth: Chain, count: int = 3) -> Inputs:
    return truth.sets["test"].inputs(np.arange(count))


def assert_same(found: list[Causes], expected: list[Causes]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        for a, b in ((mine.harmful, theirs.harmful), (mine.helpful, theirs.helpful)):
            assert [cause.row for cause in a] == [cause.row for cause in b]
            for name in ("score", "own", "negative", "relative_influence"):
                values = [[getattr(cause, name) for cause in causes] for causes in (a, b)]
                np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def whole(truth: Chain) -> list[Causes]:
    """By the plain loop over one block."""
    return trace(valued(truth), queries(truth), replace(CONFIG, bucket_size=1000), LocalEngine())


def test_it_is_the_tracer_over_the_whole_pool(truth: Chain, whole: list[Causes]) -> None:
    given, problem = valued(truth), valued(truth).problem()
    batch = given.batch((0, len(given.pool)))
    group = NegativeBatch(inputs=queries(truth), image=np.full(3, -1))
    tracer = make_tracer(
        problem, query_directions(problem, group, curvature_of(problem, given.curvature), given.curvature)
    )
    found = tracer(batch.inputs, batch.image)
    for query, causes in enumerate(whole):
        for sign, mine in ((-1, causes.harmful), (1, causes.helpful)):
            rows = most_influential(found, query, sign, candidates=50, top=5)
            assert [cause.row for cause in mine] == rows.tolist()
            assert len(mine) == 5
            assert all(sign * cause.score > 0 for cause in mine)
            assert all(cause.score == pytest.approx(cause.own + cause.negative) for cause in mine)
            order = [cause.relative_influence for cause in mine]
            assert order == sorted(order, reverse=True)


def test_any_blocks_give_the_same(truth: Chain, whole: list[Causes]) -> None:
    for size in (7, 100):
        config = replace(CONFIG, bucket_size=size)
        assert_same(trace(valued(truth), queries(truth), config, LocalEngine()), whole)


def test_an_exact_index_gives_the_same(truth: Chain, whole: list[Causes], tmp_path: Path) -> None:
    inputs = truth.given("proxy")
    manifest = gradient_index(valued(truth), inputs, CONFIG, tmp_path, LocalEngine())
    assert manifest.details["without_gradient"] == 0
    assert len([name for name in manifest.files if name.startswith("gradients-")]) == 5
    assert_same(trace(valued(truth), queries(truth), CONFIG, LocalEngine(), tmp_path), whole)


def test_ray_gives_the_same(truth: Chain, whole: list[Causes], tmp_path: Path, ray_engine: Engine) -> None:
    assert_same(trace(valued(truth), queries(truth), CONFIG, ray_engine), whole)
    gradient_index(valued(truth), truth.given("proxy"), CONFIG, tmp_path, ray_engine)
    assert_same(trace(valued(truth), queries(truth), CONFIG, ray_engine, tmp_path), whole)


def test_more_queries_than_are_held_at_once_are_traced_one_by_one(
    truth: Chain, whole: list[Causes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influencespace.stages.scoring.trace.AT_ONCE", 2)
    assert_same(trace(valued(truth), queries(truth), CONFIG, LocalEngine()), whole)


def test_an_index_is_resumed_and_a_finished_one_left(truth: Chain, tmp_path: Path) -> None:
    given, inputs = valued(truth), truth.given("proxy")
    first = gradient_index(given, inputs, CONFIG, tmp_path, LocalEngine())
    assert gradient_index(given, inputs, CONFIG, tmp_path, Idle()) == first
    (tmp_path / "manifest.json").unlink()
    lost, kept = shard_path(tmp_path, 50), shard_path(tmp_path, 100)
    lost.write_bytes(lost.read_bytes()[:20])  # cut by a full disk
    before = kept.stat().st_mtime_ns
    again = gradient_index(given, inputs, CONFIG, tmp_path, LocalEngine())
    assert again.files == first.files
    assert kept.stat().st_mtime_ns == before
    np.testing.assert_array_equal(load_rows(lost), np.arange(50, 100))


def test_an_index_of_another_config_is_written_anew(truth: Chain, tmp_path: Path) -> None:
    given, inputs = valued(truth), truth.given("proxy")
    first = gradient_index(given, inputs, CONFIG, tmp_path, LocalEngine())
    small = replace(CONFIG, index_dimension=16, bucket_size=100)
    second = gradient_index(given, inputs, small, tmp_path, LocalEngine())
    assert second.details["dimension"] == 32 < first.details["dimension"]
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        "sides.safetensors",
        *(shard_path(tmp_path, start).name for start in (0, 100, 200)),
    }
    assert trace(given, queries(truth), small, LocalEngine(), tmp_path)[0].harmful
