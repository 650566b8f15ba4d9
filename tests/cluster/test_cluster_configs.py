"""The files of cluster_configs are what Ray's launcher and KubeRay accept, and fit the project's own versions."""

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from rayjob_model import RayJob

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "cluster_configs"
LAUNCHER = ["aws-gpu.yaml", "local.yaml"]
Tree = dict[str, Any]


def load(name: str) -> Tree:
    tree: Tree = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    return tree


def validate_launcher(tree: Tree) -> Tree:
    """What Ray makes of a launcher file, offline."""
    prepared: Tree = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    return prepared


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found.group(1)


def test_every_file_is_tested() -> None:
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted([*LAUNCHER, "kuberay-rayjob.yaml"])


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_the_launcher_file(name: str) -> None:
    prepared = validate_launcher(load(name))
    assert prepared["head_node_type"] in prepared["available_node_types"]


def spoil(*path: str | int, value: Any = None) -> Callable[[Tree], None]:
    """Set what is at `path` to `value`, or take it away where there is none."""

    def change(tree: Any) -> None:
        *folders, last = path
        for folder in folders:
            tree = tree[folder]
        if value is None:
            del tree[last]
        else:
            tree[last] = value

    return change


@pytest.mark.parametrize(
    "mistake",
    [
        spoil("available_node_type", value={}),
        spoil("available_node_types", "gpu_worker", "min_worker", value=1),
        spoil("available_node_types", "gpu_worker", "node_config"),
        spoil("head_node_type", value="haed"),
        spoil("docker", "images", value="rayproject/ray"),
        spoil("max_workers", value="two"),
    ],
)
def test_ray_refuses_a_spoiled_launcher_file(mistake: Callable[[Tree], None]) -> None:
    tree = load("aws-gpu.yaml")
    mistake(tree)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_launcher(tree)


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launched_cluster_is_closed_to_strangers(name: str) -> None:
    tree = load(name)
    (head,) = [line for line in tree["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    starts = [
        line
        for line in tree["head_start_ray_commands"] + tree["worker_start_ray_commands"]
        if "start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


def test_the_local_launcher_never_stops_another_ray() -> None:
    prepared = validate_launcher(load("local.yaml"))
    commands = prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"]
    assert not any("ray stop" in line for line in commands)


def test_the_gpu_cluster_has_gpus_and_its_full_size_from_the_start() -> None:
    prepared = validate_launcher(load("aws-gpu.yaml"))
    worker = prepared["available_node_types"]["gpu_worker"]
    assert worker["node_config"]["InstanceType"].startswith("g5.")
    assert worker["min_workers"] == worker["max_workers"] == prepared["max_workers"] == 2


def test_the_images_hold_the_pinned_ray() -> None:
    image = load("aws-gpu.yaml")["docker"]["image"]
    assert image == f"rayproject/ray:{pinned('ray')}-py311-gpu"
    cluster = RayJob.model_validate(load("kuberay-rayjob.yaml")).spec.rayClusterSpec
    assert cluster.rayVersion == pinned("ray")
    (worker,) = cluster.workerGroupSpecs
    images = [group.template.spec.containers[0].image for group in (cluster.headGroupSpec, worker)]
    assert {image.rpartition(":")[2] for image in images} == {pinned("ray")}


def test_the_rayjob_is_what_the_custom_resource_allows() -> None:
    spec = RayJob.model_validate(load("kuberay-rayjob.yaml")).spec
    assert spec.submissionMode == "K8sJobMode"
    assert spec.shutdownAfterJobFinishes
    assert spec.rayClusterSpec.authOptions.mode == "token"


def test_every_pod_shares_the_storage_and_only_workers_ask_for_gpus() -> None:
    cluster = RayJob.model_validate(load("kuberay-rayjob.yaml")).spec.rayClusterSpec
    (worker,) = cluster.workerGroupSpecs
    pods = [cluster.headGroupSpec.template.spec, worker.template.spec]
    for pod in pods:
        (claim,) = [volume for volume in pod.volumes if volume.persistentVolumeClaim]
        (mount,) = [mount for mount in pod.containers[0].volumeMounts if mount.name == claim.name]
        assert mount.mountPath == "/mnt/influencespace"
        assert pod.containers[0].resources.requests == pod.containers[0].resources.limits
    assert ["nvidia.com/gpu" in pod.containers[0].resources.limits for pod in pods] == [False, True]
    assert [toleration.key for toleration in pods[1].tolerations] == ["nvidia.com/gpu"]


def test_the_rayjob_runs_our_job_with_options_that_exist() -> None:
    python, script, *options = shlex.split(load("kuberay-rayjob.yaml")["spec"]["entrypoint"])
    assert python == "python"
    assert (ROOT / Path(script).relative_to("/home/ray/influencespace")).is_file()
    assert options[::2] == ["--config", "--out"]
    assert all(path.startswith("/mnt/influencespace/") for path in options[1::2])


CLUSTER = ("spec", "rayClusterSpec")
WORKER = (*CLUSTER, "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    "mistake",
    [
        spoil("apiVersion", value="ray.io/v1alpha1"),
        spoil("spec", "entryPoint", value="python x.py"),
        spoil("spec", "backoffLimit", value="2"),
        spoil("spec", "shutdownAfterJobFinishes", value=0),
        spoil(*CLUSTER, "headGroupSpec", "template"),
        spoil(*CLUSTER, "authOptions", "mode", value="none"),
        spoil(*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus", value=1),
        spoil(*WORKER, "groupName"),
        spoil(*WORKER, "minReplicas", value=3),
        spoil(*WORKER, "template", "spec", "volumes", 0),
        spoil(*WORKER, "template", "spec", "containers", 0, "resources", "limits", "memory", value="32 GB"),
    ],
)
def test_a_spoiled_rayjob_is_refused(mistake: Callable[[Tree], None]) -> None:
    tree = load("kuberay-rayjob.yaml")
    mistake(tree)
    with pytest.raises(ValidationError):
        RayJob.model_validate(tree)
