"""The sweep finds the best settings, starts from the run's own, and continues where it was stopped."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from pydantic import ValidationError

from influencespace.config import load_config
from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import write_json
from influencespace.engine.local import Engine, LocalEngine, TaskError
from influencespace.engine.session import start_ray
from influencespace.errors import InputError
from influencespace.pipeline import load_run
from influencespace.run import Run, carry_out
from influencespace.stages.selection.pair_evidence import PairEvidence
from influencespace.sweep import (
    TRIAL,
    Retraining,
    Sweep,
    SweepConfig,
    best_of,
    chosen_selection,
    own_settings,
    search,
    search_space,
)

OWN = own_settings(SelectionConfig(weighting="uniform"))


@dataclass(frozen=True)
class Valley:
    """An objective with its best at tau_low = 0.1 and target_size = 0.6; every call leaves a file."""

    calls: Path
    fail_at: int = -1
    kill_driver_at: int = -1

    def __call__(self, settings: Mapping[str, Any]) -> dict[str, float]:
        (self.calls / f"{uuid.uuid4().hex}.json").write_text(json.dumps(dict(settings)))
        number = len(list(self.calls.glob("*.json")))
        if number == self.fail_at:
            (self.calls / "broken").touch()
        if (self.calls / "broken").exists():
            raise ZeroDivisionError("broken")
        if number == self.kill_driver_at:
            os.kill(int((self.calls / "driver").read_text()), signal.SIGKILL)
        loss = (settings["tau_low"] - 0.1) ** 2 + (settings["target_size"] - 0.6) ** 2
        return {"loss": loss, "mean_recall": 100 - loss, "kept_fraction": settings["target_size"]}

    def settings(self) -> list[str]:
        """What it was called with."""
        return sorted(path.read_text() for path in self.calls.glob("*.json"))


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def by_value() -> None:
    """Workers need not find this module by its name."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def own_home(folder: str) -> dict[str, str]:
    """The environment of a Ray that writes into `folder` alone."""
    return {"HOME": folder, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}


@pytest.mark.ray
def test_a_search_tries_the_own_settings_and_remembers_its_trials(
    ray_engine: Engine, by_value: None, tmp_path: Path, calls: Path
) -> None:
    folder = tmp_path / "trials"
    trials = search(Valley(calls), OWN, SweepConfig(trials=4, max_concurrent=2), folder, seed=1)
    assert len(trials) == len(Valley(calls).settings()) == 4
    assert sum(all(trial[name] == value for name, value in OWN.items()) for trial in trials) == 1
    for trial in trials:
        assert -0.25 <= trial["tau_low"] <= 0.25
        assert 0.1 <= trial["temperature"] <= 10
        assert trial["weighting"] in ("uniform", "influence")
    assert all(path.name.startswith(TRIAL) for path in folder.iterdir())

    assert search(Valley(calls), OWN, SweepConfig(trials=4, max_concurrent=2), folder, seed=1) == trials
    assert len(Valley(calls).settings()) == 4
    assert search(Valley(calls), OWN, SweepConfig(trials=5), folder, seed=1)[:4] == trials
    assert len({*Valley(calls).settings()}) == 5


@pytest.mark.ray
def test_a_failed_trial_ends_the_sweep_and_is_done_again(
    ray_engine: Engine, by_value: None, tmp_path: Path, calls: Path
) -> None:
    config = SweepConfig(trials=3, max_concurrent=1)
    with pytest.raises(TaskError, match=r"(?s)a trial of the sweep failed with .*ZeroDivisionError: broken"):
        search(Valley(calls, fail_at=2), OWN, config, tmp_path / "trials")
    assert len(Valley(calls).settings()) == 2  # the failure ended it at once
    (calls / "broken").unlink()
    trials = search(Valley(calls), OWN, config, tmp_path / "trials")
    assert len(trials) == 3
    assert len(Valley(calls).settings()) == 4  # the one that had ended well was not done again
    assert len({trial["tau_low"] for trial in trials}) == 3


@pytest.mark.ray
def test_wrong_input_found_by_a_trial_stays_an_error_for_people(
    ray_engine: Engine, by_value: None, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"^the target is too small$"):
        search(complain, OWN, SweepConfig(trials=1), tmp_path / "trials")


@pytest.mark.ray
def test_settings_that_keep_nothing_do_not_end_the_search(
    ray_engine: Engine, by_value: None, tmp_path: Path
) -> None:
    """The search is past its random beginning and has to learn from infinite losses."""
    for number in range(12):
        settings = {**OWN, "tau_low": (number - 6) / 30}
        trial = settings | keep_nothing_above_zero(settings) | {"seconds": 1.0, "ended": float(number)}
        write_json(tmp_path / f"{TRIAL}{number}.json", trial)
    trials = search(keep_nothing_above_zero, OWN, SweepConfig(trials=13), tmp_path)
    assert sum(math.isinf(trial["loss"]) for trial in trials[:12]) == 5
    assert best_of(trials, "loss")["tau_low"] <= 0


def complain(settings: Mapping[str, Any]) -> dict[str, float]:
    raise InputError("the target is too small")


def keep_nothing_above_zero(settings: Mapping[str, Any]) -> dict[str, float]:
    if settings["tau_low"] > 0:
        return {"loss": math.inf, "mean_recall": 0.0, "kept_fraction": 0.0}
    return {"loss": 1 + settings["tau_low"], "mean_recall": 1.0, "kept_fraction": 1.0}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_search_continues(tmp_path: Path, calls: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="is-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

        def run() -> "subprocess.CompletedProcess[str]":
            return subprocess.run(
                [sys.executable, __file__, str(tmp_path), str(calls)],
                env=environment | own_home(folder),
                capture_output=True,
                text=True,
                timeout=300,
            )

        assert run().returncode == -signal.SIGKILL
        finished = run()
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split()[-1] == "4"
    # What had ended is not done again; the trial that ran then may have ended.
    assert 4 <= len(Valley(calls).settings()) <= 5


def test_the_run_s_own_settings_are_a_point_of_the_search() -> None:
    selection = SelectionConfig(weighting="influence", tau_low=-3.0, temperature=20.0, target_size=0.4)
    own = own_settings(selection)
    assert replace(selection, **own) == selection
    space = search_space(SweepConfig(), own)
    assert own.keys() == space.keys()
    assert all(space[name]._contains(space[name].to_internal_repr(own[name])) for name in own)
    assert OWN["target_size"] == 1.0  # no target size is the size of the pool


def test_the_best_is_the_first_of_equals_and_keeps_something() -> None:
    rows = [
        {"loss": loss, "mean_recall": 1.0, "kept_fraction": 0.5, "name": i}
        for i, loss in enumerate([2, 1, 1])
    ]
    assert best_of(rows, "loss")["name"] == 1
    assert best_of(rows, "mean_recall")["name"] == 0
    nothing = [{"loss": math.inf, "mean_recall": 0.0, "kept_fraction": 0.0}]
    with pytest.raises(InputError, match="lower the range of tau_low"):
        best_of(nothing, "loss")


@pytest.mark.parametrize(
    "wrong",
    [
        {"trials": 0},
        {"tau_low": (0.2, 0.1)},
        {"temperature": (0.0, 1.0)},
        {"target_size": (0.5, 1.5)},
        {"proxy_seeds": ()},
        {"measure": "auroc"},
        {"seed": 1},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SweepConfig(**wrong)


@pytest.fixture(scope="module")
def run(small_run: Path) -> Run:
    """Without its test set: a sweep that looked at it would fail."""
    whole = load_run(small_run)
    return replace(whole, sets={role: whole.sets[role] for role in ("pool", "target")})


def copied(run: Run, folder: Path) -> Run:
    """The run as far as a sweep reads it, in another folder."""
    for stage in Sweep.needs:
        shutil.copytree(run.at(stage), folder / stage)
    return replace(run, folder=folder)


def test_the_objective_is_the_retrained_proxy_on_the_choosing_half(run: Run) -> None:
    objective = Retraining(run, chosen_selection(run), (0, 1))
    whole = objective(OWN)
    assert objective(OWN) == whole
    assert 0 < whole["kept_fraction"] <= 1
    assert 0 < whole["loss"] < 10
    assert 0 <= whole["mean_recall"] <= 100
    smaller = objective({**OWN, "target_size": 0.4})
    assert smaller["kept_fraction"] == pytest.approx(min(0.4, whole["kept_fraction"]))
    assert smaller["loss"] != whole["loss"]
    nothing = objective({**OWN, "tau_low": 1000.0})
    assert nothing == {"loss": math.inf, "mean_recall": 0.0, "kept_fraction": 0.0}


def test_a_trial_of_the_own_settings_decides_as_the_run_did(run: Run) -> None:
    selection = chosen_selection(run)
    subset = PairEvidence(folder=run.at("selection")).decide(replace(selection, **own_settings(selection)))
    curated = run.curated()
    np.testing.assert_array_equal(subset.kept, curated["kept"].to_numpy())
    np.testing.assert_array_equal(subset.weight.astype(np.float32), curated["weight"].to_numpy())


@pytest.mark.ray
def test_a_sweep_writes_the_best_config(ray_engine: Engine, by_value: None, run: Run, tmp_path: Path) -> None:
    run = copied(run, tmp_path / "run")
    stage = Sweep(SweepConfig(trials=3))
    best = carry_out(stage, run, ray_engine)
    trials = pq.read_table(run.at("sweep") / "trials.parquet").to_pylist()
    assert best.details["trials"] == len(trials) == 3
    assert best.details["value"] == min(trial["loss"] for trial in trials) <= best.details["own"]
    config = load_config(run.at("sweep") / "best.yaml")
    chosen = replace(chosen_selection(run), **best.details["settings"])
    assert config == replace(run.config, selection=chosen)
    assert {path.name for path in run.at("sweep").iterdir()} == {
        *("best.yaml", "trials.parquet", "manifest.json")
    }
    assert carry_out(stage, run, LocalEngine()) == best  # nothing is done anew
    # how many at a time changes no file
    assert carry_out(Sweep(SweepConfig(trials=3, max_concurrent=7)), run, LocalEngine()) == best


def test_a_run_without_a_decision_is_refused(run: Run, tmp_path: Path) -> None:
    run = copied(run, tmp_path / "run")
    (run.at("selection") / "manifest.json").unlink()
    with pytest.raises(InputError, match="no finished selection stage"):
        carry_out(Sweep(SweepConfig()), run, LocalEngine())


if __name__ == "__main__":
    out, calls_folder = map(Path, sys.argv[1:])
    (calls_folder / "driver").write_text(str(os.getpid()))
    objective = Valley(calls_folder, kill_driver_at=3)
    with start_ray(num_cpus=4):
        print(len(search(objective, OWN, SweepConfig(trials=4, max_concurrent=1), out / "trials")))
