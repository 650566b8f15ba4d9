"""A real `ray start --head` on loopback, in a process of its own that is ended by its id."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
START_SECONDS = 90
OBJECT_STORE = 200 * 2**20


@dataclass(frozen=True)
class Head:
    """A running head node."""

    dashboard: str
    folder: Path
    environment: dict[str, str]

    def submit(
        self, *command: str, working_dir: Path = ROOT, timeout: float = 500
    ) -> "subprocess.CompletedProcess[str]":
        """`ray job submit --working-dir DIR -- COMMAND`, with what it printed."""
        submit = [str(RAY), "job", "submit", "--address", self.dashboard, "--working-dir", str(working_dir)]
        try:
            return subprocess.run(
                [*submit, "--", *command],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"the job is not done after {timeout} s:\n{(error.stdout or b'').decode()[-5000:]}")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[dict[str, str]]:
    """The environment of a Ray that leaves no trace: its own home and a short temporary folder."""
    with tempfile.TemporaryDirectory(prefix="is-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        yield kept | {
            "HOME": folder,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Nobody waits for what still runs on this head when it is asked to end.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            # Jobs are started as `python ...`: it has to be this one.
            "PATH": os.pathsep.join([str(RAY.parent), os.environ["PATH"]]),
        }


@pytest.fixture(scope="session")
def head(ray_environment: dict[str, str]) -> Iterator[Head]:
    """A head node with 2 logical CPUs and its dashboard."""
    folder = Path(ray_environment["HOME"])
    port, dashboard, client, agent, exporter, runtime_env = free_ports(6)
    command = [
        *(
            str(RAY),
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
        ),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={exporter}"),
        *(f"--runtime-env-agent-port={runtime_env}", f"--temp-dir={folder}"),
        *("--num-cpus=2", f"--object-store-memory={OBJECT_STORE}", "--disable-usage-stats"),
    ]
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=ray_environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for_jobs_api(address, process, log)
        yield Head(address, folder, ray_environment)
    finally:
        # `ray start --block` ends the processes of its node when it is asked to end itself.
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_jobs_api(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when the head has taken a job; fails with the head's log when it has died or is not ready in time.

    The dashboard answers some seconds before there is an agent to run a job.
    """
    nothing = urllib.request.Request(
        f"{address}/api/jobs/", data=b'{"entrypoint": "true"}', headers={"Content-Type": "application/json"}
    )
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(nothing, timeout=10):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"`ray start --head` is not ready:\n{log.read_text()}")
