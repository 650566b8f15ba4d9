"""What Ray's workers wrote, beside the results: Ray keeps it on each machine, where it is gone with the machine."""

from contextlib import suppress
from pathlib import Path

import ray

MAX_BYTES = 10 * 2**20
"""The end of a longer log is kept."""
MARK_BYTES = 4096  # Ray marks a log with its job at the beginning
WAIT_SECONDS = 20.0
"""How long is waited for machines that may be dying."""


def keep_logs(folder: Path) -> None:
    """Copy what the workers of this job wrote, on each machine that is alive, into a folder that all of them see.

    What cannot be had is left out: the run has ended, well or not.
    """
    with suppress(ray.exceptions.RayError):
        job = ray.get_runtime_context().get_job_id()
        copy = ray.remote(copy_logs)
        copies = [
            copy.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node["NodeID"])).remote(
                str(folder), job, node["NodeID"][:8]
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        ray.wait(copies, num_returns=len(copies), timeout=WAIT_SECONDS)


def _on(node: str) -> object:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def copy_logs(folder: str, job: str, name: str) -> None:
    """On one machine: the logs of a job's workers, where they wrote anything."""
    from ray._private import worker

    logs = Path(worker._global_node.get_session_dir_path()) / "logs"
    for path in sorted(logs.glob("worker-*")):
        with path.open("rb") as source:
            if f":job_id:{job}".encode() not in source.read(MARK_BYTES):  # of another job
                continue
            source.seek(max(0, path.stat().st_size - MAX_BYTES))
            lines = [line for line in source if not line.startswith(b":")]  # Ray's own marks
        if lines:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}-{path.name}").write_bytes(b"".join(lines))
