"""Nothing waits in silence: where no worker has started for a while, the user reads what is missing and what to do."""

import sys
import time
from collections.abc import Sequence

from influencespace.engine.placement import Machine, Resources, described, places
from influencespace.engine.progress import duration

FIRST_SECONDS = 30.0
"""So long nothing is said."""
AGAIN_SECONDS = 60.0
"""And then again after so long."""


def say(text: str) -> None:
    """One line for the user, whatever progress is shown."""
    print(text, file=sys.stderr, flush=True)


class Patience:
    """How long workers of a need have been waited for."""

    def __init__(self, need: Resources) -> None:
        self.need = need
        self._since = time.monotonic()
        self._said = 0.0

    @property
    def seconds(self) -> float:
        """Since something last worked."""
        return time.monotonic() - self._since

    def at_work(self) -> None:
        """Something works, or has just ended."""
        self._since, self._said = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time to say something."""
        if self.seconds < (self._said + AGAIN_SECONDS if self._said else FIRST_SECONDS):
            return False
        self._said = self.seconds
        return True


def waiting_for(
    need: Resources, seconds: float, machines: Sequence[Machine], free: Sequence[Machine], *, grows: bool
) -> str:
    """The line that says what is missing, what the cluster has and what to do."""
    start = f"waiting for {duration(seconds)}: no worker has started; one needs {described(need)}. "
    has = f"{len(machines)} machine(s) with {described(_total(machines))}"
    if places(machines, need):
        return (
            f"{start}The cluster has {has}, of which {described(_total(free))} are free, but no machine has all of it free: "
            "other jobs hold it. It goes on when they end; or stop them, or ask for less"
            f"{_keys(need)}"
        )
    coming = "The autoscaler was asked for one. " if grows else "It goes on when one joins. "
    return (
        f"{start}No machine of the cluster has that: it has {has}. {coming}"
        f"Else let the cluster grow further (max_workers, maxReplicas), or ask for less{_keys(need)}"
    )


def _total(machines: Sequence[Machine]) -> Resources:
    return Resources(
        cpus=sum(machine.cpus for machine in machines),
        gpus=sum(machine.gpus for machine in machines),
        memory=sum(machine.memory for machine in machines),
    )


def _keys(need: Resources) -> str:
    return " (of encoders: embed.cpus_per_actor, embed.gpus_per_actor)" if need.gpus else ""
