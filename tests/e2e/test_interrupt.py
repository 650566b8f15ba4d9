"""Ctrl-C in the middle of a stage: one plain line, exit code 130, and the same command finishes the same job."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import Command, begun, run_arguments, working_folder

from influencespace.data.artifacts import file_digest

pytestmark = pytest.mark.e2e


def interrupted_in(
    stage: str, arguments: list[object], out: Path, environment: dict[str, str]
) -> tuple[int, str]:
    """Start the run and press Ctrl-C while `stage` is at work, as a terminal does: to all that it started.

    Exit code and stderr.
    """
    with begun(arguments, environment) as driver:
        deadline = time.monotonic() + 300
        while (working := working_folder(out, stage)) is None:
            assert driver.poll() is None, driver.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if stage == "train":  # when Ray Train is at work
            while not list(working.glob("*.safetensors")):
                assert driver.poll() is None, driver.communicate()[1][-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.01)
        os.killpg(driver.pid, signal.SIGINT)
        _, errors = driver.communicate(timeout=120)
        assert not (out / stage / "manifest.json").exists(), f"{stage} was too quick to be interrupted"
        return driver.returncode, errors


def check_interrupted(stage: str, world: Path, out: Path, environment: dict[str, str]) -> None:
    code, errors = interrupted_in(stage, run_arguments(world, out), out, environment)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert "the same command continues" in errors.splitlines()[-1]
    assert not (out / "curated.parquet").exists()


def test_an_interrupted_run_says_so(environment: dict[str, str], world: Path, tmp_path: Path) -> None:
    check_interrupted("embed/pool", world, tmp_path / "interrupted", environment)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["embed/pool", "proxies", "train"])
def test_an_interrupted_run_continues_to_the_same_subset(
    influencespace: Command,
    environment: dict[str, str],
    world: Path,
    finished: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    """Also in `train`, which Ray Train would otherwise end by itself, without a word."""
    out = tmp_path / "interrupted"
    check_interrupted(stage, world, out, environment)
    done = influencespace(*run_arguments(world, out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert file_digest(out / "curated.parquet") == file_digest(finished / "curated.parquet")
