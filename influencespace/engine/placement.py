"""Which workers fit where: a worker needs one machine that has all it asks for, however much the others have."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from influencespace.errors import InputError

LIBRARY_BYTES = 700_000_000
"""Memory of a process that has loaded torch and computed something."""
WORKER_BYTES = 900_000_000
"""Of one that also holds some thin columns of a part of the pool: what a task declares if nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker needs."""

    cpus: float = 1
    gpus: float = 0
    """A fraction shares a GPU."""
    memory: int = 0
    """Bytes; 0 where nothing is declared."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one machine has for workers."""

    cpus: float
    gpus: float = 0
    memory: int = 0

    def places(self, need: Resources) -> int:
        """How many workers of this need fit at once."""
        limits = [_whole(self.cpus / need.cpus)] if need.cpus else []
        if need.gpus:
            whole = need.gpus >= 1  # a fraction lies within one GPU
            limits.append(_whole(self.gpus / need.gpus) if whole else int(self.gpus) * _whole(1 / need.gpus))
        if need.memory:
            limits.append(self.memory // need.memory)
        return int(min(limits, default=0))

    def without(self, need: Resources, count: int) -> "Machine":
        """What is left beside so many workers of a need."""
        return Machine(
            cpus=self.cpus - count * need.cpus,
            gpus=self.gpus - count * need.gpus,
            memory=self.memory - count * need.memory,
        )


def _whole(ratio: float) -> int:
    return int(ratio + 1e-9)  # ten tenths are one, of floats too


def places(machines: Sequence[Machine], need: Resources) -> int:
    """How many workers of this need fit on all machines together."""
    return sum(machine.places(need) for machine in machines)


def fitting(memory: int, machines: Sequence[Machine]) -> int:
    """An estimate of what a worker holds, or all that the largest machine has: an estimate is no reason to refuse one."""
    return min(memory, max((machine.memory for machine in machines), default=memory))


def beside(machines: Sequence[Machine], need: Resources, other: Resources) -> int:
    """How many workers of this need fit so that one of the other still finds a place: without it they would wait for ever."""
    losses = []
    for machine in machines:
        most = machine.places(need)
        kept = next((k for k in range(most, -1, -1) if machine.without(need, k).places(other)), None)
        if kept is not None:
            losses.append(most - kept)
    return places(machines, need) - min(losses, default=0)


def described(need: Resources) -> str:
    """What a worker needs, or machines have, in words."""
    parts = [f"{need.cpus:g} CPU(s)", f"{need.gpus:g} GPU(s)"]
    return " and ".join([", ".join(parts), f"{need.memory / 1e9:.1f} GB"] if need.memory else parts)


def check_place(machines: Sequence[Machine], need: Resources, hint: str = "") -> None:
    """Refuse workers that no machine has room for: they would wait for ever. Raises InputError, which names what is missing."""
    if not machines or places(machines, need):
        return
    most = Machine(
        cpus=max(machine.cpus for machine in machines),
        gpus=max(machine.gpus for machine in machines),
        memory=max(machine.memory for machine in machines),
    )
    raise InputError(
        f"a worker needs {need.cpus:g} CPU(s), {need.gpus:g} GPU(s) and {need.memory / 1e9:.1f} GB, and no machine has them: one "
        f"has at most {most.cpus:g} CPU(s), one {most.gpus:g} GPU(s), one {most.memory / 1e9:.1f} GB. Add a machine that has "
        f"all of it, or lower what is asked for (of encoders: embed.cpus_per_actor, embed.gpus_per_actor){hint}"
    )


def shrunk(machines: Sequence[Machine], need: Resources, max_cpus: float) -> Resources:
    """The need with as many CPU cores as a machine still gives it: a task with fewer takes longer, and is done."""
    fitting = (
        smaller
        for cpus in range(int(min(need.cpus, max_cpus)), 0, -1)
        if places(machines, smaller := replace(need, cpus=cpus))
    )
    return need if places(machines, need) else next(fitting, need)


@dataclass(frozen=True, kw_only=True)
class Share:
    """So many workers, and what each has."""

    workers: int
    resources: Resources

    @property
    def device(self) -> str:
        return "cuda" if self.resources.gpus else "cpu"


def share(
    machines: Sequence[Machine], tasks: int, *, need: Resources, workers: int = 0, max_cpus: int
) -> Share:
    """As many workers as fit, are asked for, or have a task, with the CPU cores that their machines can give each.

    `need.cpus` = 0 leaves the cores open: the most, up to `max_cpus`, with which all the workers still find a place.
    """
    open_cpus = not need.cpus
    smallest = Resources(cpus=1 if open_cpus else need.cpus, gpus=need.gpus, memory=need.memory)
    count = max(1, min(workers or places(machines, smallest), tasks))
    cpus = smallest.cpus
    if open_cpus:
        fitting = (
            c
            for c in range(max_cpus, 0, -1)
            if places(machines, Resources(cpus=c, gpus=need.gpus, memory=need.memory)) >= count
        )
        cpus = next(fitting, 1)
    return Share(workers=count, resources=Resources(cpus=cpus, gpus=need.gpus, memory=need.memory))
