"""Laws of every stage: rows are kept account of, work is done once, a killed run continues, Ray equals the plain loop."""

import copy
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
from conftest import World
from planted import plant

from influencespace.data import buckets
from influencespace.data.artifacts import MANIFEST, read_manifest
from influencespace.engine.local import run_once, run_task
from influencespace.engine.ray_engine import RayEngine
from influencespace.errors import InputError
from influencespace.run import Run, carry_out
from influencespace.stages.proxies.proxy import Proxy

every_stage = pytest.mark.parametrize("name", NAMES)
OF_PAIRS = {"proxies", "cluster", "redundancy", "influence", "fairness", "selection"}
"""Stages with a row for every pair of the pool."""
BEFORE_INFLUENCE = {"proxies", "cluster", "redundancy", "curvature"}
CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "proxies": ({"proxy.train.steps": 21}, {"cluster"}),
    "cluster": ({"cluster.k": 3}, {"proxies", "curvature"}),
    "redundancy": ({"redundancy.text": 0.8}, BEFORE_INFLUENCE - {"redundancy"} | {"influence", "fairness"}),
    "curvature": ({"curvature.damping_factor": 50}, BEFORE_INFLUENCE - {"curvature"}),
    "influence": ({"influence.target_samples": 7}, BEFORE_INFLUENCE),
    "fairness": ({"selection.fairness": "off"}, BEFORE_INFLUENCE | {"influence"}),
    "selection": ({"selection.tau_low": 0.1}, BEFORE_INFLUENCE | {"influence", "fairness"}),
    "train": ({"train.seeds": [5]}, {*NAMES} - {"train", "evaluate"}),
    "evaluate": ({"evaluate.templates": ["a {}"]}, {*NAMES} - {"evaluate"}),
}
"""For each stage another setting of it, and the stages that it leaves as they were."""


@every_stage
def test_every_row_is_accounted_for(truth: Run, name: str) -> None:
    manifest = truth.manifest(name)
    assert manifest.stage == name
    assert manifest.rows_in == manifest.rows_out + manifest.rejected
    assert manifest.rows_in == (len(truth.pool) if name in OF_PAIRS else 0)
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
    (tmp_path / f".{name}-of-other-settings").mkdir()
    (tmp_path / f".{name}-of-other-settings" / "file").touch()
    carry(run, name)
    assert_equal_results(truth.at(name), run.at(name))
    assert run.manifest(name).files.keys() == truth.manifest(name).files.keys()
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every bucket and every trained proxy that is written from now on."""
    units: list[tuple[Any, ...]] = []
    write, save = buckets.write_bucket, Proxy.save

    def write_bucket(folder: Path, table: str, start: int, columns: Any) -> None:
        units.append((folder, table, start))
        write(folder, table, start, columns)

    def save_proxy(self: Proxy, *trained: Any) -> None:
        units.append((self.path,))
        save(self, *trained)

    monkeypatch.setattr(buckets, "write_bucket", write_bucket)
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


@every_stage
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


@every_stage
def test_a_changed_setting_recomputes_only_what_it_touches(truth: Run, name: str, tmp_path: Path) -> None:
    settings, untouched = CHANGES[name]
    shutil.copytree(truth.folder, tmp_path / "run")
    run = beside(truth, tmp_path / "run", settings=settings)
    before = {other: times(run.at(other)) for other in NAMES}
    carry(run)
    assert {other for other in NAMES if run.manifest(other) == truth.manifest(other)} == untouched
    assert {other for other in NAMES if times(run.at(other)) == before[other]} == untouched


@every_stage
def test_a_stage_of_another_version_is_done_again(truth: Run, name: str, tmp_path: Path) -> None:
    run = beside(truth, tmp_path, name)
    shutil.copytree(truth.at(name), run.at(name))
    raised = copy.copy(BY_NAME[name])
    raised.version += 1  # type: ignore[misc]
    with pytest.raises(AssertionError, match="nothing to do"):
        carry_out(raised, run, Idle())
    assert carry_out(BY_NAME[name], run, Idle()) == truth.manifest(name)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "cores"),
    [(name, 2) for name in NAMES if name not in ("influence", "train")] + [("influence", 1), ("influence", 3)],
)
def test_ray_equals_the_plain_loop(
    truth: Run, name: str, cores: int, ray_engine: RayEngine, tmp_path: Path
) -> None:
    """Of the train stage see test_train."""
    run = beside(truth, tmp_path, name)
    manifest = carry(run, name, engine=RayEngine(cores))
    assert manifest.fingerprint == truth.manifest(name).fingerprint
    assert_equal_results(truth.at(name), run.at(name), spreads=1e-5)


def test_a_stage_whose_needs_are_not_finished_is_refused(truth: Run, tmp_path: Path) -> None:
    run = beside(truth, tmp_path)
    for name in NAMES:
        if needed(name):
            with pytest.raises(InputError, match="has no finished"):
                carry(run, name)


def test_the_stages_are_in_an_order_of_their_needs() -> None:
    for place, name in enumerate(NAMES):
        assert needed(name) <= {*NAMES[:place]}


def test_the_smallest_pool_runs_through(tmp_path: Path) -> None:
    """Sixteen images, as many as a split asks for, with settings that are meant for millions."""
    world = {role: plant(tmp_path / role, 16, seed=seed) for seed, role in enumerate(("pool", "target", "test"))}
    defaults = {"cluster": {}, "curvature": {}, "influence": {}}
    settings = {"proxy.train.batch_size": 512, "proxy.folds": 5, "proxy.negative_batches": 4}
    run = with_settings(run_on(tmp_path / "run", world, settings), defaults)
    carry(run)
    assert run.manifest("selection").rows_out == 16
    numbers = [values for values in results(run.at("selection")).values() if values.dtype.kind == "f"]
    assert all(np.isfinite(values).all() for values in numbers)


def test_modalities_may_differ_in_dimension(tmp_path: Path) -> None:
    world: World = {}
    for seed, role in enumerate(("pool", "target", "test"), start=1):
        world[role] = plant(tmp_path / role, 60, seed=seed)
        texts = np.load(world[role].folder / "texts.npy")[:, :11]
        np.save(world[role].folder / "texts.npy", texts / np.linalg.norm(texts, axis=1, keepdims=True))
    run = run_on(tmp_path / "run", world)
    carry(run)
    assert results(run.at("proxies"))["all.safetensors/text"].shape == (11, 8)


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
