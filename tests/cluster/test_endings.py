"""How a run ends that no change of its input mends: one line, and no traceback."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from influencespace.engine.attempts import TaskError
from influencespace.engine.endings import reason_of


def ended_by(kind: str, number: int, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and messages of a program whose Ray, or who itself, gets a signal."""
    program = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("endless.py"))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        pids = json.loads(program.stdout.readline()) | {"driver": program.pid}
        os.kill(pids[kind], number)
        _, errors = program.communicate(timeout=200)
    finally:
        program.kill()
    return program.returncode, errors


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["gcs_server", "raylet"])
def test_the_death_of_ray_is_one_line(kind: str, ray_environment: dict[str, str]) -> None:
    code, errors = ended_by(kind, signal.SIGKILL, ray_environment)
    assert code == 1, errors
    assert f"error: Ray's {kind} has died; the same command continues" in errors.splitlines()
    assert "Traceback" not in errors


@pytest.mark.cluster
def test_sigterm_ends_a_program_on_ray_as_ctrl_c_does(ray_environment: dict[str, str]) -> None:
    code, errors = ended_by("driver", signal.SIGTERM, ray_environment)
    assert (code, errors.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in errors


def test_a_full_disk_and_a_lost_connection_are_no_bugs() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/runs/x.parquet")
    assert reason_of(full).startswith("no space is left on a disk: free some, and the same command continues")
    of_a_worker = TaskError(f"task 3 failed: OSError: {full}\nTraceback ...")
    assert "\n" not in reason_of(of_a_worker)
    assert "no space is left" in reason_of(of_a_worker)
    assert "was lost; the same command continues" in reason_of(ConnectionResetError("reset by peer"))
    assert reason_of(ZeroDivisionError("a bug")) == ""


@pytest.mark.cluster
def test_objects_that_are_put_on_the_disk_are_spoken_of(ray_environment: dict[str, str]) -> None:
    # of any size, and not only from 2 GB on
    more = {"RAY_verbose_spill_logs": "1", "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(80 * 2**20)}
    program = Path(__file__).with_name("spill.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env=ray_environment | more,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "Ray's memory for objects is full on a machine" in done.stderr
    assert "what a worker writes" not in done.stderr + done.stdout
    assert all(line.startswith("Ray's memory") for line in done.stderr.splitlines()), done.stderr
