"""Laws of every stage: rows are kept account of, work is done once, a killed run continues, Ray equals the plain loop."""

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import (
    BY_NAME,
    NAMES,
    Careful,
    Counting,
    Idle,
    Killed,
    Losing,
    assert_equal_results,
    beside,
    carry,
    needed,
    results,
    run_on,
    times,
    with_settings,
)
from planted import plant

from influencespace.data import buckets
from influencespace.data.artifacts import MANIFEST, read_manifest
from influencespace.engine.local import run_once, run_task
from influencespace.engine.ray_engine import RayEngine
from influencespace.errors import InputError
from influencespace.run import Run, carry_out, stage_fingerprint
from influencespace.stages.proxies.proxy import Proxy
from influencespace.stages.scoring import trace

every_stage = pytest.mark.parametrize("name", BY_NAME)
OF_THE_RUN = pytest.mark.parametrize("name", NAMES)
WITHOUT_ROWS = {"curvature", "train", "evaluate"}
"""Stages that have no row for every pair of the pool."""
BUCKETS = {
    name: f"{section}.bucket_size" for name, section in {"proxies": "proxy", "cluster": "cluster"}.items()
}
BUCKETS |= {"influence": "influence.bucket_size", "fairness": "influence.bucket_size"}
BEFORE_INFLUENCE = {"proxies", "cluster", "redundancy", "curvature"}
CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "proxies": ({"proxy.train.steps": 21}, {"cluster"}),
    "cluster": ({"cluster.k": 3}, {"proxies", "curvature"}),
    "redundancy": ({"redundancy.text": 0.8}, BEFORE_INFLUENCE - {"redundancy"}),
    "curvature": ({"curvature.damping_factor": 50}, BEFORE_INFLUENCE - {"curvature"}),
    "influence": ({"influence.target_samples": 7}, BEFORE_INFLUENCE),
    "fairness": ({"selection.fairness": "off"}, BEFORE_INFLUENCE | {"influence"}),
    "selection": ({"selection.tau_low": 0.1}, BEFORE_INFLUENCE | {"influence", "fairness"}),
    "rivals": (
        {"train.methods": ["curated", "everything", "random"]},
        {*NAMES} - {"rivals", "train", "evaluate"},
    ),
    "train": ({"train.seeds": [5]}, {*NAMES} - {"train", "evaluate"}),
    "evaluate": ({"evaluate.templates": ["a {}"]}, {*NAMES} - {"evaluate"}),
}
"""For each stage another setting of it, and the stages that it leaves as they were."""


@every_stage
def test_every_row_is_accounted_for(truth: Run, name: str) -> None:
    manifest = truth.manifest(name)
    assert manifest.stage == name
    assert manifest.rows_in == manifest.rows_out + manifest.rejected
    assert manifest.rows_in == (0 if name in WITHOUT_ROWS else len(truth.pool))
    assert {path.name for path in truth.at(name).iterdir()} == {*manifest.files, MANIFEST}


@every_stage
def test_a_second_call_does_nothing(truth: Run, name: str) -> None:
    before = times(truth.at(name))
    assert carry(truth, name, engine=Idle()) == truth.manifest(name)
    assert times(truth.at(name)) == before


@every_stage
def test_tasks_that_are_begun_again_change_nothing(truth: Run, name: str, tmp_path: Path) -> None:
    """Beside the stages that it names as its needs, of which it reads no others."""
    run = beside(truth, tmp_path, name)
    carry(run, name, engine=Losing())
    assert_equal_results(run.at(name), truth.at(name))


@every_stage
def test_a_lost_file_is_made_again_and_what_was_left_aside_is_removed(
    truth: Run, name: str, tmp_path: Path
) -> None:
    run = beside(truth, tmp_path, name)
    shutil.copytree(truth.at(name), run.at(name))
    lost = sorted(run.at(name).iterdir(), key=lambda path: path.name == MANIFEST)[0]
    lost.unlink()
    folder = run.at(name)
    of_other_settings, of_another = (
        folder.with_name(f".{folder.name}{more}-{'0f' * 8}") for more in ("", "-more")
    )
    for left in (of_other_settings, of_another):
        left.mkdir()
        (left / "file").touch()
    carry(run, name)
    assert_equal_results(truth.at(name), folder)
    assert run.manifest(name).files.keys() == truth.manifest(name).files.keys()
    assert list(folder.parent.glob(".*")) == [of_another]


@every_stage
def test_a_stage_that_was_killed_as_it_took_its_place_is_not_done_again(
    truth: Run, name: str, tmp_path: Path
) -> None:
    run, folder = beside(truth, tmp_path, name), truth.at(name)
    mark = truth.manifest(name).fingerprint[:16]
    shutil.copytree(folder, run.at(name).with_name(f".{folder.name}-{mark}"))
    assert carry(run, name, engine=Idle()) == truth.manifest(name)
    assert_equal_results(folder, run.at(name))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every bucket and every trained proxy that is written from now on."""
    units: list[tuple[Any, ...]] = []
    write, save, save_tensors = buckets.write_bucket, Proxy.save, trace._save

    def write_bucket(folder: Path, table: str, start: int, columns: Any) -> None:
        units.append((folder, table, start))
        write(folder, table, start, columns)

    def save_proxy(self: Proxy, *trained: Any) -> None:
        units.append((self.path,))
        save(self, *trained)

    def save_shard(path: Path, tensors: Any) -> None:
        units.append((path,))
        save_tensors(path, tensors)

    monkeypatch.setattr(buckets, "write_bucket", write_bucket)
    monkeypatch.setattr(trace, "_save", save_shard)
    monkeypatch.setattr(Proxy, "save", save_proxy)
    return units


@every_stage
@pytest.mark.parametrize("share", [0.01, 0.4, 0.99])
def test_a_killed_stage_continues_to_the_identical_result(
    truth: Run, tasks: dict[str, int], written: list[Any], name: str, share: float, tmp_path: Path
) -> None:
    if tasks[name] == 1:
        pytest.skip("it has one task, which is done or not")
    run = beside(truth, tmp_path, name)
    limit = min(max(1, round(share * tasks[name])), tasks[name] - 1)
    with pytest.raises(Killed):
        carry(run, name, engine=Counting(limit=limit))
    assert read_manifest(run.at(name)) is None
    carry(run, name)
    assert_equal_results(truth.at(name), run.at(name))
    assert len(written) == len(set(written))
    assert {path.name for path in run.at(name).rglob("*")} == {*truth.manifest(name).files, MANIFEST}


@OF_THE_RUN
def test_nothing_of_a_killed_run_with_other_settings_is_taken_over(
    truth: Run, tasks: dict[str, int], name: str, tmp_path: Path
) -> None:
    settings, _ = CHANGES[name]
    run = beside(truth, tmp_path / "killed", name)
    with pytest.raises(Killed):
        carry(run, name, engine=Counting(limit=tasks[name] - 1))
    killed, fresh = with_settings(run, settings), beside(truth, tmp_path / "fresh", name, settings=settings)
    for other in (killed, fresh):
        carry(other, name)
    assert_equal_results(fresh.at(name), killed.at(name))
    assert not list(killed.folder.glob(f".{name}-*"))


@OF_THE_RUN
def test_a_changed_setting_recomputes_only_what_it_touches(truth: Run, name: str, tmp_path: Path) -> None:
    settings, untouched = CHANGES[name]
    shutil.copytree(truth.folder, tmp_path / "run")
    run = beside(truth, tmp_path / "run", settings=settings)
    before = {other: times(run.at(other)) for other in NAMES}
    carry(run)
    assert {other for other in NAMES if run.manifest(other) == truth.manifest(other)} == untouched
    assert {other for other in NAMES if times(run.at(other)) == before[other]} == untouched


@every_stage
def test_a_stage_of_another_version_is_done_again(truth: Run, name: str) -> None:
    raised = copy.copy(BY_NAME[name])
    object.__setattr__(raised, "version", raised.version + 1)  # some are frozen
    assert stage_fingerprint(raised, truth)[0] != truth.manifest(name).fingerprint
    with pytest.raises(AssertionError, match="nothing to do"):
        carry_out(raised, truth, Idle())
    assert carry_out(BY_NAME[name], truth, Idle()) == truth.manifest(name)


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("name", BUCKETS)
def test_buckets_change_nothing(truth: Run, name: str, size: int, tmp_path: Path) -> None:
    run = beside(truth, tmp_path, name, settings={BUCKETS[name]: size})
    carry(run, name)
    assert_equal_results(truth.at(name), run.at(name), spreads=1e-4)


@pytest.mark.ray
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in ("influence", "train")])
def test_ray_equals_the_plain_loop(truth: Run, name: str, ray_engine: RayEngine, tmp_path: Path) -> None:
    """Of the others see test_influence_stage and test_train."""
    run = beside(truth, tmp_path, name)
    manifest = carry(run, name, engine=RayEngine(2))
    assert manifest.fingerprint == truth.manifest(name).fingerprint
    assert_equal_results(truth.at(name), run.at(name), spreads=1e-5)


def test_a_run_is_cheap_to_send(truth: Run) -> None:
    assert len(truth.pool.image) > 0  # opened
    sent = pickle.dumps(truth)
    assert len(sent) < 10_000
    assert stage_fingerprint(BY_NAME["selection"], pickle.loads(sent)) == stage_fingerprint(
        BY_NAME["selection"], truth
    )


def test_a_stage_whose_needs_are_not_finished_is_refused(truth: Run, tmp_path: Path) -> None:
    run = beside(truth, tmp_path)
    for name in BY_NAME:
        if needed(name):
            with pytest.raises(InputError, match="has no finished"):
                carry(run, name)


def test_the_stages_are_in_an_order_of_their_needs() -> None:
    for place, name in enumerate(BY_NAME):
        assert needed(name) <= {*list(BY_NAME)[:place]}


def test_the_smallest_pool_runs_through(tmp_path: Path) -> None:
    """Sixteen images, as many as a split asks for, with settings that are meant for millions."""
    world = {
        role: plant(tmp_path / role, 16, seed=seed) for seed, role in enumerate(("pool", "target", "test"))
    }
    defaults = {"cluster": {}, "curvature": {}, "influence": {}}
    settings = {"proxy.train.batch_size": 512, "proxy.folds": 5, "proxy.negative_batches": 4}
    run = with_settings(run_on(tmp_path / "run", world, settings), defaults)
    carry(run)
    assert run.manifest("selection").rows_out == 16
    numbers = [values for values in results(run.at("selection")).values() if values.dtype.kind == "f"]
    assert all(np.isfinite(values).all() for values in numbers)


def test_results_are_compared_by_their_numbers(truth: Run) -> None:
    """The comparison itself: it reads every array and finds a difference."""
    assert len(results(truth.at("influence"))) > 10
    with pytest.raises(AssertionError):
        assert_equal_results(truth.at("influence"), truth.at("proxies"))


def test_a_map_beside_a_pool_is_noticed() -> None:
    """`Careful`, with which every stage here runs, notices what would be a deadlock on a full cluster."""
    engine = Careful()
    with engine.pool(run_task) as pool:
        assert pool.run(int) == 0
        with pytest.raises(AssertionError, match=r"by pool\.run"):
            run_once(engine, int)
    assert run_once(engine, int) == 0
