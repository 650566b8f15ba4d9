"""What a command and all of its processes take while it runs: memory, CPU seconds, bytes read and written."""

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at a tree of processes."""

    at: float
    """Seconds since the epoch."""
    largest: int
    """Unshared bytes of the process that has most."""
    name: str
    """Of that process."""
    together: int
    """Unshared bytes of all."""
    cpu: float
    """CPU seconds since the command began, of all processes that were ever seen."""
    written: int
    """Bytes handed to the disk since then."""


@dataclass
class Watched:
    """Samples of one command."""

    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)

    def between(self, began: float, ended: float) -> dict[str, Any]:
        """Peaks and sums of a span of time; of the whole with 0 and infinity."""
        inside = [one for one in self.samples if began <= one.at <= ended]
        if not inside:
            return {
                "peak_mb": None,
                "process": None,
                "together_mb": None,
                "cpu_seconds": None,
                "written_mb": None,
            }
        before = [one for one in self.samples if one.at < began]
        cpu, written = (before[-1].cpu, before[-1].written) if before else (0.0, 0)
        largest = max(inside, key=lambda one: one.largest)
        return {
            "peak_mb": largest.largest / 1e6,
            "process": largest.name,
            "together_mb": max(one.together for one in inside) / 1e6,
            "cpu_seconds": inside[-1].cpu - cpu,
            "written_mb": (inside[-1].written - written) / 1e6,
        }


def watch(command: Sequence[str], environment: Mapping[str, str], log: Path, every: float = 0.5) -> Watched:
    """Run a command, its output into `log`, and look at its processes so often; raises RuntimeError where it fails."""
    watched, ended = Watched(), threading.Event()
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
        tree = _Tree(process.pid)

        def look() -> None:
            while not ended.wait(every):
                watched.samples.append(tree.sample())

        looker = threading.Thread(target=look)
        looker.start()
        try:
            code = process.wait()
        finally:
            ended.set()
            looker.join()
    watched.seconds = time.monotonic() - began
    if code:
        tail = log.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{' '.join(command[:4])} ended with {code}; its last words:\n{tail}")
    return watched


class _Tree:
    """A process and all below it. CPU and bytes of those that have ended are kept as they were last seen."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._cpu: dict[int, float] = {}
        self._written: dict[int, int] = {}

    def sample(self) -> Sample:
        memory: dict[int, int] = {}
        for pid in descendants(self._root):
            with suppress(OSError, ValueError, IndexError):
                memory[pid] = unshared(pid)
                self._cpu[pid] = cpu_seconds(pid)
                self._written[pid] = _number(PROC / str(pid) / "io", "write_bytes:")
        largest = max(memory, key=memory.__getitem__, default=0)
        return Sample(
            at=time.time(),
            largest=memory.get(largest, 0),
            name=title(largest),
            together=sum(memory.values()),
            cpu=sum(self._cpu.values()),
            written=sum(self._written.values()),
        )


def descendants(root: int) -> list[int]:
    """A process and all that it began, and they, as far as they live."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                # the name of the program, in brackets, may hold spaces
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        found.append(one := waiting.pop())
        waiting += children.get(one, [])
    return found


def unshared(pid: int) -> int:
    """Bytes that a process alone has written to or allocated; pages of files that it only reads are the system's cache."""
    return _number(PROC / str(pid) / "smaps_rollup", "Private_Dirty:") * 1024


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def title(pid: int) -> str:
    """What a process calls itself, shortened: Ray's workers name their task."""
    with suppress(OSError):
        words = (
            (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
        )
        return " ".join(Path(word).name for word in words[:3])[:60]
    return ""


def _number(path: Path, name: str) -> int:
    return int(path.read_text().partition(name)[2].split()[0])
