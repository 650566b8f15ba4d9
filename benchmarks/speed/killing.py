"""A command that is killed in the midst, or loses workers and nodes, and goes on."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cache import ROOT

KINDS = ("driver", "worker", "actor")
MINUTES = 30
SOON_MISSED = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
OBJECT_STORE = 100 * 2**20


@dataclass(frozen=True)
class Strike:
    """Somebody to be lost after some seconds of work."""

    after: float
    kind: str


@dataclass(frozen=True)
class Lost:
    """Who was lost: of a kind, and what the process was called."""

    kind: str
    name: str


@contextmanager
def environment() -> Iterator[None]:
    """Ray's own files in a short temporary folder, one thread, no hub; left again at the end."""
    with tempfile.TemporaryDirectory(prefix="is-", dir="/tmp", ignore_cleanup_errors=True) as home:
        settings = {"HOME": home, "RAY_TMPDIR": home, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        settings |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        before = {name: os.environ.get(name) for name in (*settings, "RAY_ADDRESS")}
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@dataclass
class Nodes:
    """A cluster in processes of this machine: a head, and a node that can be lost."""

    cluster: Any
    second: Any
    address: str

    def lose(self) -> str:
        """Take the second node away without a word, and let another come."""
        name = str(self.second.node_id)
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE)
        return name


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        options: dict[str, Any] = {"num_cpus": 2, "object_store_memory": OBJECT_STORE}
        cluster.add_node(**options, include_dashboard=False, _system_config=SOON_MISSED)
        yield Nodes(cluster, cluster.add_node(**options), cluster.address)
    finally:
        cluster.shutdown()


@dataclass
class Command:
    """`influencespace ARGUMENTS --out OUT`, as a process that can be lost and begun again."""

    arguments: tuple[str, ...]
    out: Path
    nodes: Nodes | None = None
    process: "subprocess.Popen[bytes] | None" = None
    began: float = field(default=0.0)

    def start(self) -> None:
        """Begin it, unless it runs or has ended well."""
        if self.process is not None and self.process.poll() in (None, 0):
            return
        self.began = time.time()
        command = [sys.executable, "-m", "influencespace.cli", *self.arguments, "--out", str(self.out)]
        log = self.out.with_name(f"{self.out.name}.log")
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def work_for(self, seconds: float) -> bool:
        """Wait until it has worked in its folder for some seconds, begun again where it fails; False where it ends well before.

        Raises RuntimeError where it fails three times.
        """
        for _ in range(3):
            self.start()
            if self._worked_for(seconds):
                return True
            if self._ended_well():
                return False
        raise RuntimeError(f"the run failed three times: {self._log_end()}")

    def _worked_for(self, seconds: float) -> bool:
        while not self._at_work():
            if self._ended():
                return False
            time.sleep(0.05)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._ended():
                return False
            time.sleep(0.01)
        return not self._ended()

    def finish(self) -> float:
        """Let it end well, begun again where it was ended; the seconds that it has worked since it was begun last.

        Raises RuntimeError where it fails three times.
        """
        for _ in range(3):
            self.start()
            assert self.process is not None
            worked = 0.0
            while not self._ended():
                if not worked and self._at_work():
                    worked = time.monotonic()
                if time.time() - self.began > 60 * MINUTES:
                    self.process.kill()
                time.sleep(0.05)
            if self._ended_well():
                return time.monotonic() - worked if worked else 0.0
        raise RuntimeError(f"the run failed three times: {self._log_end()}")

    def _ended_well(self) -> bool:
        assert self.process is not None
        return self.process.wait() == 0

    def _log_end(self) -> str:
        return self.out.with_name(f"{self.out.name}.log").read_text(errors="replace")[-3000:]

    def strike(self, kind: str) -> Lost:
        """Kill somebody, the driver where there is nobody of the kind."""
        assert self.process is not None
        if kind == "node" and self.nodes is not None:
            return Lost(kind, self.nodes.lose())
        family = descendants(self.process.pid)
        for pid, name in family.items():
            if kind == kind_of(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return Lost(kind, name)
        self.process.kill()
        self.process.wait()
        end_all(family)  # Ray ends them by itself, a little later
        return Lost("driver", f"driver for {kind}" if kind != "driver" else "driver")

    def _ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def _at_work(self) -> bool:
        """Whether anything in the folders of stages was written since it was begun."""
        with suppress(FileNotFoundError):
            for path in self.out.rglob("*"):
                if path.name not in (".lock", "config.yaml") and path.lstat().st_mtime > self.began:
                    return True
        return False


def kind_of(title: str) -> str:
    """What a process of Ray is at, by its title: an actor is called by its class, a task by its function."""
    name = title.removeprefix("ray::")
    if name in (title, "IDLE") or name.endswith("Agent"):  # those are Ray's own, and end the node
        return ""
    return "actor" if name.lstrip("_")[:1].isupper() else "worker"


def descendants(pid: int) -> dict[int, str]:
    """The processes that a process has started, and those that these have: their titles by number."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                titles[int(entry.name)] = title.strip()
    found: dict[int, str] = {}
    left = [pid]
    while left:
        above = left.pop()
        for child, parent in parents.items():
            if parent == above and child not in found:
                found[child] = titles.get(child, "")
                left.append(child)
    return found


def end_all(family: dict[int, str], seconds: float = 20) -> None:
    """Wait until these processes have ended, and end those that stay: numbers are compared with titles, lest another has one."""
    until = time.monotonic() + seconds
    while left := [pid for pid in family if Path(f"/proc/{pid}/stat").exists()]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    for pid in left:
        with suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if (
                title.strip()
                and title.split(" ")[0].split("::")[0] == family[pid].split(" ")[0].split("::")[0]
            ):
                os.kill(pid, signal.SIGKILL)
