"""The Ray that a run works on: one that runs already, a cluster by its address, or a new one on this machine."""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

from influencespace.engine.attempts import TASK_RETRIES
from influencespace.engine.endings import end_on_sigterm, watched
from influencespace.engine.local import machine_cores
from influencespace.engine.ray_engine import RayEngine
from influencespace.engine.ray_warnings import RayWarnings
from influencespace.errors import InputError

# Ray puts sockets below its temporary folder, and Linux allows a socket's path no more than 107 bytes.
LONGEST_TMPDIR = 40


@contextmanager
def start_ray(address: str | None = None, num_cpus: int | None = None) -> Iterator[RayEngine]:
    """A RayEngine: on the Ray that runs already, else on the cluster at `address`, else on a new local Ray.

    The address defaults to RAY_ADDRESS. What was started or joined here is left at the end. `num_cpus`
    counts the logical CPUs of a new local Ray (default: the cores, but at least 8, so that a small machine
    has room for a few waiting actors).
    """
    if ray.is_initialized():
        yield RayEngine()
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        _knock(address)
    _prepare()
    cores, remote = machine_cores(), address.startswith("ray://")
    options: dict[str, Any] = {}
    if address == "local":
        options = {"num_cpus": num_cpus or max(8, cores), "include_dashboard": False, **_short_folder()}
    try:
        with _native_stderr_held(), _processes_may_warn():
            ray.init(address=address, logging_level="warning", log_to_driver=not remote, **options)
    except ConnectionError as error:
        raise InputError(
            f"there is no Ray to join at {address} ({error}): start one with `ray start --head`, or leave the address out"
        ) from None
    if not remote:
        _hear_warnings()
    end_on_sigterm()  # anew: Ray has set its own
    try:
        with watched(_dead, _end_processes):
            yield RayEngine(min(cores, num_cpus or cores) if address == "local" else None)
    finally:
        ray.shutdown()


def _hear_warnings() -> None:
    """Of what Ray shows on the driver only its warnings, in plain words; what workers write is kept in the run folder."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as lines

    lines.remove_handler("ray_print_logs")
    lines.add_handler("ray_print_logs", RayWarnings())  # the name by which Ray removes it at the end


def _dead() -> str:
    """What has died of a Ray that was started here, or that is no more answered elsewhere; empty where all is well."""
    from ray._private import worker

    node = worker._global_node
    if node is None or not node.head:
        return _silent()
    names = {kind for kind, _ in node.dead_processes()} & {"gcs_server", "raylet"}
    return f"Ray's {min(names)}" if names else ""


def _silent() -> str:
    """The server of a cluster that has not answered for a while; empty where it answers."""
    from ray._private import worker

    client = getattr(worker.global_worker, "gcs_client", None)
    if client is None:  # of ray://: the client itself says so
        return ""
    for _ in range(3):
        with suppress(Exception):
            client.check_alive([], timeout=10)
            return ""
    return f"the Ray cluster's server (GCS) at {client.address}"


def _end_processes() -> None:
    """The end of what is left of a Ray that was started here."""
    from ray._private import worker

    with suppress(Exception):
        if worker._global_node is not None and worker._global_node.head:
            worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)


def _knock(address: str) -> None:
    """Raise InputError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        raise InputError(f"there is no address {address}: give host:port, such as ray://10.0.0.1:10001")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): is `ray start --head` running there, "
            "and is this the HOST:PORT that it reported?"
        ) from None


def _prepare() -> None:
    # Left to itself, a Ray that is started here begins a task that outgrows the machine's memory again for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(TASK_RETRIES))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Data makes Ray's core complain on the driver's stderr about each of its actor pools.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


@contextmanager
def _processes_may_warn() -> Iterator[None]:
    """Let the processes of a Ray that is started here write their errors, which `RayWarnings` hears: only this one is quiet."""
    from ray._private import services

    start = services.start_ray_process

    def started(*args: Any, env_updates: dict[str, str] | None = None, **more: Any) -> Any:
        level = os.environ["RAY_BACKEND_LOG_LEVEL"].replace("fatal", "error")
        return start(*args, env_updates={"RAY_BACKEND_LOG_LEVEL": level, **(env_updates or {})}, **more)

    services.start_ray_process = started
    try:
        yield
    finally:
        services.start_ray_process = start


@contextmanager
def _native_stderr_held() -> Iterator[None]:
    """Leave out the line of Ray's core that it was told to be quiet; all else that is written meanwhile is shown after."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if b"RAY_BACKEND_LOG_LEVEL" not in line:
                    os.write(2, line)


def _short_folder() -> dict[str, str]:
    if "RAY_TMPDIR" in os.environ or len(tempfile.gettempdir()) <= LONGEST_TMPDIR:
        return {}
    return {"_temp_dir": "/tmp/ray"}
