"""What the benchmarks of speed and memory share: a tiny encoder, and processes of their own whose peak memory is read."""

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.cache import ROOT
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.stages.ingest.fit_encoder import FitEncoder


def tiny_world(folder: Path, pool: int, shard_size: int, steps: int) -> str:
    """Write `folder`/pool, and a tiny CLIP that was fitted on other scenes for so many steps; its path."""
    write_world(folder, WorldConfig(pretrain=200, pool=pool, target=0, test=0, shard_size=shard_size))
    encoder = folder / "encoder"
    FitEncoder(shards=str(folder / "pretrain"), out=encoder, steps=steps, seed=0)()
    return str(encoder)


def last_line_of(module: str, *arguments: str) -> str:
    """What a module prints last when it is run in a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip().splitlines()[-1]


def peak_mb() -> float:
    """Peak resident memory of this process; not ru_maxrss, which begins with what the parent had when it forked."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(peak) / 1024


def reset_peak() -> None:
    """Let the peak begin at what the process has now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
