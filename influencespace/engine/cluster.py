"""What the Ray cluster has just now, and whether it may get more."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray

from influencespace.engine.placement import Machine, Resources
from influencespace.errors import InputError

WAIT_VARIABLE = "INFLUENCESPACE_WAIT"
"""The environment variable that says for how many seconds machines that are still to come are waited for."""


def ray_options(resources: Resources) -> dict[str, float]:
    """Resources as Ray calls them."""
    optional = {"num_gpus": resources.gpus, "memory": resources.memory}
    return {"num_cpus": resources.cpus} | {name: value for name, value in optional.items() if value}


def alive_machines() -> list[Machine]:
    """What each machine that is alive has."""
    return [_machine(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_machines() -> list[Machine]:
    """What of it nobody holds."""
    from ray._private.state import available_resources_per_node

    return [_machine(has) for has in available_resources_per_node().values()]


def is_alive(node: str) -> bool:
    """Whether a machine is alive, by the id of its node."""
    return any(one["NodeID"] == node and one["Alive"] for one in ray.nodes())


def autoscales() -> bool:
    """Whether an autoscaler can add machines (of a cluster that somebody started node by node, none can)."""
    from ray._private.state import state

    with suppress(Exception):  # where Ray does not say, it has none
        config = state.get_cluster_config()
        if config is not None and config.node_group_configs:
            return True
    with suppress(Exception):
        status = ray.experimental.internal_kv._internal_kv_get("__autoscaling_status")
        report = json.loads(status)["autoscaler_report"] if status else {}
        types = {*report.get("active_nodes", {}), *report.get("pending_launches", {})}
        types |= {one[1] for one in report.get("pending_nodes", [])}
        return any(not name.startswith("node_") for name in types)  # Ray's name for what it did not start
    return False


def request(needs: Sequence[Resources]) -> None:
    """Show an autoscaler what is waited for; none of it any more where `needs` is empty."""
    from ray.autoscaler import sdk

    bundles: list[dict[str, Any]] = [
        {"CPU": need.cpus, **({"GPU": need.gpus} if need.gpus else {})} for need in needs
    ]
    with suppress(Exception):  # without an autoscaler nobody reads it
        sdk.request_resources(bundles=bundles)


def seconds_to_wait() -> float:
    """What WAIT_VARIABLE says; raises InputError where that is no number of seconds."""
    text = os.environ.get(WAIT_VARIABLE, "0")
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{WAIT_VARIABLE} is {text!r}: give seconds, such as {WAIT_VARIABLE}=600") from None


def _machine(has: dict[str, float]) -> Machine:
    return Machine(cpus=has.get("CPU", 0), gpus=has.get("GPU", 0), memory=int(has.get("memory", 0)))
