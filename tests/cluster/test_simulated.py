"""Clusters of simulated machines: every GPU has its worker, what fits nowhere is refused, and lost machines are made up for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from simulate import SHAPES

pytestmark = pytest.mark.cluster


def simulated(
    what: str, environment: dict[str, str], folder: Path, **more: str
) -> tuple[dict[str, Any], str]:
    """What the program found out, and its messages."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("simulate.py")), what, str(folder)],
        env=environment | {"PYTHONPATH": str(Path(__file__).parent)} | more,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "outcome.json").read_text(encoding="utf-8")), done.stderr


def check_every_gpu(shape: str, environment: dict[str, str], folder: Path) -> None:
    outcome, _ = simulated(shape, environment, folder)
    gpus = sum(gpus for _, gpus in SHAPES[shape])
    assert outcome["share"]["workers"] == outcome["actors"] == gpus
    assert outcome["results"] == 3 * gpus
    assert outcome["nodes"] == outcome["gpu_nodes"]
    for refusal in outcome["refusals"]:
        assert "no machine has them" in refusal
        assert "\n" not in refusal


def test_every_gpu_beside_a_larger_head_has_its_worker(
    ray_environment: dict[str, str], tmp_path: Path
) -> None:
    check_every_gpu("large-head", ray_environment, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["small-head", "four-by-four", "eight-by-eight"])
def test_every_gpu_of_a_large_cluster_has_its_worker(
    ray_environment: dict[str, str], tmp_path: Path, shape: str
) -> None:
    check_every_gpu(shape, ray_environment, tmp_path)


@pytest.mark.slow
def test_tasks_of_the_size_of_a_lost_machine_go_on_with_less(
    ray_environment: dict[str, str], tmp_path: Path
) -> None:
    outcome, said = simulated("largest-lost", ray_environment, tmp_path)
    assert outcome == {"tasks": 2, "actors": 2, "pool": 2}
    assert said.count("a machine is gone: tasks that had 7 CPU(s) go on with 2") == 3


@pytest.mark.slow
def test_machines_that_come_later_are_waited_for_and_used(
    ray_environment: dict[str, str], tmp_path: Path
) -> None:
    outcome, said = simulated("late", ray_environment, tmp_path, INFLUENCESPACE_WAIT="400")
    assert outcome["actors"] == len(outcome["added"]) == 2
    assert outcome["results"] == 6
    assert (
        "no worker has started; one needs 1 CPU(s) and 1 GPU(s). No machine of the cluster has that" in said
    )


@pytest.mark.slow
def test_a_stream_uses_a_gpu_that_comes_later_and_gives_back_what_it_held(
    ray_environment: dict[str, str], tmp_path: Path
) -> None:
    outcome, _ = simulated("stream-grows", ray_environment, tmp_path)
    assert outcome["items"] == [[task, number] for task in range(6) for number in range(20)]
    assert outcome["added"] in outcome["nodes"]
    assert len(outcome["nodes"]) == outcome["free"] == 2
