"""A place for workers, asked for again and again: machines come, go, and are held by others."""

import time
from collections.abc import Callable, Sequence

from influencespace.engine import cluster
from influencespace.engine.placement import Machine, Resources, check_place, places, shrunk
from influencespace.engine.waiting import Patience, say, waiting_for

TICK_SECONDS = 2.0
"""How often is looked whether machines have come or gone."""
ASK_SECONDS = 30.0
"""How long is believed what was said about an autoscaler."""


class Place:
    """Where so many workers of one need are placed, at most `asked` (0: as many as there is room for, now and later).

    `machines` says what each machine has for workers. What no machine has is refused at once, or waited for where machines
    may come. Raises InputError where none will.
    """

    def __init__(self, machines: Callable[[], Sequence[Machine]], need: Resources, asked: int = 0) -> None:
        self.need = need
        self._machines, self._asked = machines, asked
        self._patience = Patience(need)
        self._grows = (-ASK_SECONDS, False)
        self._looked = -TICK_SECONDS
        self._room = 1
        self._wait()

    @property
    def room(self) -> int:
        """How many workers there may be just now."""
        return self._room

    @property
    def due(self) -> bool:
        """Whether it is time for `look`."""
        return time.monotonic() - self._looked >= TICK_SECONDS

    def look(self, at_work: Callable[[], bool]) -> bool:
        """See what there is, and say why nothing works for long; whether the need has changed, as no machine had it any more."""
        before, machines = self.need, self._machines()
        if not places(machines, self.need):
            self.need = shrunk(machines, self.need, max(machine.cpus for machine in machines) - 1)
            self._wait()
            if self.need != before:
                say(f"a machine is gone: tasks that had {before.cpus:g} CPU(s) go on with {self.need.cpus:g}")
        if self._patience.seconds > 0 and at_work():
            self._patience.at_work()
        self._speak(machines)
        self._looked, self._room = time.monotonic(), self._count(self._machines())
        return self.need != before

    def at_work(self) -> None:
        """A worker has started, or has just ended a task."""
        self._patience.at_work()

    def _count(self, machines: Sequence[Machine]) -> int:
        has = places(cluster.alive_machines() if self._asked else machines, self.need)
        if self.grows():
            has += max(1, has)  # what is asked for shows an autoscaler what is wanted
        return max(1, min(has, self._asked or has))

    def grows(self) -> bool:
        """Whether an autoscaler can add machines."""
        asked, grows = self._grows
        if time.monotonic() - asked >= ASK_SECONDS:
            grows = cluster.autoscales()
            self._grows = time.monotonic(), grows
        return grows

    def _wait(self) -> None:
        """Return as soon as some machine has room for one worker, were it free."""
        asked = False
        while not places(machines := self._machines(), self.need):
            if not self.grows() and self._patience.seconds >= cluster.seconds_to_wait():
                check_place(machines, self.need, _HINT)
            if not asked:
                cluster.request([self.need])
                asked = True
            self._speak(machines)
            time.sleep(TICK_SECONDS / 4)
        if asked:
            cluster.request([])
            self._patience.at_work()
        self._room = self._count(self._machines())

    def _speak(self, machines: Sequence[Machine]) -> None:
        if self._patience.due():
            seconds, free = self._patience.seconds, cluster.free_machines()
            say(waiting_for(self.need, seconds, machines, free, grows=self.grows()))


_HINT = (
    f"; where machines are still to come, set {cluster.WAIT_VARIABLE} to the seconds that they are waited for"
)
