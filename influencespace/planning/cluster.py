"""A cluster in words: `head 1x(4 cores, 16 GB), 4x(16 cores, 64 GB, 1xA10G)`."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from influencespace.engine.placement import Machine
from influencespace.errors import InputError

EXAMPLE = "4x(16 cores, 64 GB, 1xA10G)"
PEAK_TFLOPS = {
    "T4": 65.0,
    "V100": 125.0,
    "L4": 121.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}
"""Dense products in half precision by the makers' data sheets."""
SHARE_OF_PEAK = 0.1
CORE_TFLOPS = 0.05
"""Assumed, not measured: what of its peak a GPU reaches here, and what a core does."""

_GROUP = re.compile(r"\s*(head\s+)?(\d+)\s*x\s*\(([^()]*)\)\s*", re.IGNORECASE)
_CORES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:cores?|cpus?)", re.IGNORECASE)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|TB)", re.IGNORECASE)
_GPUS = re.compile(r"(\d+)\s*x\s*([A-Za-z]\w*)")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmb]?)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Like machines."""

    count: int
    machine: Machine
    gpu: str = ""
    """The kind of its GPUs; empty where it has none."""

    @property
    def gpus(self) -> float:
        return self.count * self.machine.gpus


@dataclass(frozen=True)
class Cluster:
    """Machines in groups; work is given to all of them, the head too."""

    groups: tuple[NodeGroup, ...]

    @property
    def machines(self) -> list[Machine]:
        return [group.machine for group in self.groups for _ in range(group.count)]

    @property
    def cores(self) -> int:
        return int(sum(machine.cpus for machine in self.machines))

    @property
    def gpus(self) -> int:
        return int(sum(group.gpus for group in self.groups))

    @property
    def cores_per_gpu(self) -> float:
        """The work of how many cores one GPU is assumed to do, on average; 0 without GPUs."""
        work = sum(group.gpus * gpu_in_cores(group.gpu) for group in self.groups if group.gpu)
        return work / self.gpus if self.gpus else 0.0


def gpu_in_cores(kind: str) -> float:
    """How many cores a GPU is assumed to stand for."""
    return PEAK_TFLOPS[kind] * SHARE_OF_PEAK / CORE_TFLOPS


def parse_cluster(text: str) -> Cluster:
    """The cluster of a text such as EXAMPLE, groups with commas between; raises InputError, which says what is not understood."""
    groups, place = [], 0
    while place < len(text):
        found = _GROUP.match(text, place)
        if found is None:
            raise _wrong(text, f"{text[place:].strip()[:40]!r} is not understood")
        groups.append(_group(text, int(found[2]), found[3]))
        place = found.end()
        if place < len(text):
            if text[place] != ",":
                raise _wrong(text, f"a comma is missing before {text[place:].strip()[:40]!r}")
            place += 1
    if not groups:
        raise _wrong(text, "it names no machine")
    return Cluster(tuple(groups))


def _group(text: str, count: int, inside: str) -> NodeGroup:
    cores = memory = gpus = 0.0
    kind = ""
    for part in (part.strip() for part in inside.split(",")):
        if found := _CORES.fullmatch(part):
            cores = float(found[1])
        elif found := _MEMORY.fullmatch(part):
            memory = float(found[1]) * (1e12 if found[2].upper() == "TB" else 1e9)
        elif found := _GPUS.fullmatch(part):
            gpus, kind = float(found[1]), found[2].upper()
            if kind not in PEAK_TFLOPS:
                raise _wrong(text, f"no GPU {found[2]} is known; there are {', '.join(PEAK_TFLOPS)}")
        else:
            raise _wrong(text, f"{part!r} is neither cores, nor GB, nor GPUs")
    if not (count and cores and memory):
        raise _wrong(text, "each group needs a number of machines, cores and GB")
    machine = Machine(cpus=cores, gpus=gpus, memory=int(memory))
    return NodeGroup(count=count, machine=machine, gpu=kind if gpus else "")


def _wrong(text: str, reason: str) -> InputError:
    return InputError(f"--cluster {text!r}: {reason}. Write it as in --cluster '{EXAMPLE}'")


def parse_pairs(text: str) -> int:
    """A number of pairs such as 500000, 10k, 12.8M or 1.28B; raises InputError for anything else."""
    found = _COUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    scale: Callable[[str], float] = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}.__getitem__
    count = round(float(found[1]) * scale(found[2].lower())) if found else 0
    if not count:
        raise InputError(f"--pairs {text!r}: give a number of pairs such as 500000, 10k, 12.8M or 1.28B")
    return count
