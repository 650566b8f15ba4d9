"""A curation as a Ray job on a real head node, and a map that loses a node."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import Head

from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.models.tiny_clip import train_tiny_clip

pytestmark = pytest.mark.cluster

WORLD = WorldConfig(pretrain=0, pool=200, target=60, test=0, shard_size=50)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on a tiny world, by an encoder that has learnt nothing."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "world", WORLD)
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    train_tiny_clip(noise, ["a red circle"] * 8, seed=0, out=folder / "encoder", steps=1, batch_size=8)
    return {
        "data": {role: str(folder / "world" / role / "*.tar") for role in ("pool", "target")},
        "embed": {"encoder": str(folder / "encoder")},
        "proxy": {
            "train": {"steps": 10, "batch_size": 32, "dimension": 16},
            "folds": 2,
            "choose_steps": False,
            "negative_batches": 2,
        },
        "influence": {"quantiles": 4, "max_samples": 50, "control_samples": 40},
        "train": {"seeds": [0], "methods": ["curated", "everything"]},
    }


def write(tree: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def test_a_submitted_job_curates(head: Head, config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["python", "jobs/curate.py", "--config", write(config, tmp_path / "x.yaml")]
    job = head.submit(*command, "--out", str(out), "--set", "cluster.k=2")
    assert job.returncode == 0, job.stdout
    assert "succeeded" in job.stdout
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    table = pq.read_table(out / "curated.parquet")
    assert summary["rows"]["pool"] == len(table) > 0
    assert summary["methods"].keys() == {"curated", "everything"}
    assert yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["cluster"]["k"] == 2
    assert (out / "report.html").stat().st_size > 0
    # The head's package comes from the copy of the working directory, with what .rayignore leaves of it.
    packages = head.folder.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*")
    contents = [{path.name for path in package.iterdir()} for package in packages if package.is_dir()]
    assert any({"influencespace", "jobs", "pyproject.toml"} <= names for names in contents)
    assert not set.union(*contents) & {".git", ".venv", "tests", "docs", "runs", "benchmarks"}


@pytest.mark.parametrize(
    ("setting", "out", "message"),
    [
        ("cluster.kk=2", "/somewhere/run", "error: config: there is no cluster.kk; did you mean cluster.k?"),
        ("cluster.k=2", "runs/mine", "error: --out runs/mine is a relative path, but a job runs in a copy"),
    ],
)
def test_a_job_with_wrong_input_fails_with_one_line(
    head: Head, config: dict[str, Any], tmp_path: Path, setting: str, out: str, message: str
) -> None:
    command = ["python", "jobs/curate.py", "--config", write(config, tmp_path / "x.yaml")]
    job = head.submit(*command, "--out", out, "--set", setting)
    assert job.returncode == 1
    assert message in job.stdout
    assert "exit code 2" in job.stdout
    assert "Traceback" not in job.stdout


def run_program(name: str, argument: Path, environment: dict[str, str]) -> None:
    """A program beside this file, on a cluster of its own."""
    rooms = [str(Path(__file__).parents[1] / room) for room in ("", "stages")]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), str(argument)],
        env=environment | {"PYTHONPATH": os.pathsep.join(rooms)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_a_map_that_loses_a_node_gives_every_result_once(
    ray_environment: dict[str, str], tmp_path: Path
) -> None:
    run_program("lose_a_node.py", tmp_path / "outcome.json", ray_environment)
    outcome = json.loads((tmp_path / "outcome.json").read_text(encoding="utf-8"))
    results = sorted(outcome["results"])
    assert [(task, square) for task, square, _ in results] == [(task, task * task) for task in range(48)]
    assert outcome["cores"] == [4, 2]
    nodes = [node for *_, node in outcome["results"]]
    assert outcome["lost"] in nodes
    assert nodes[-1] != outcome["lost"]


@pytest.mark.slow
def test_embedding_workers_start_on_gpu_nodes_that_are_smaller_than_the_head(
    ray_environment: dict[str, str], tmp_path: Path
) -> None:
    """None ever started where workers were as large as the largest machine allows; one starts on a machine that comes later."""
    run_program("place_on_gpus.py", tmp_path, ray_environment)
    outcome = json.loads((tmp_path / "outcome.json").read_text(encoding="utf-8"))
    assert outcome["share"]["workers"] == 2
    resources = outcome["share"]["resources"]
    assert (resources["cpus"], resources["gpus"]) == (1, 1)
    assert 0 < resources["memory"] < outcome["machine_memory"]  # or none would ever start
    assert outcome["pairs"] == 44
    assert {started["device"] for started in outcome["started"]} == {"cuda"}
    assert len(outcome["gpu_nodes"]) == 3
    assert {started["node"] for started in outcome["started"]} == {*outcome["gpu_nodes"]}
    assert "no machine has them" in outcome["refusal"]
