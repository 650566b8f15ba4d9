"""What Ray itself warns of, on whatever machine: the few things that a user can mend, in plain words and not too often."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from influencespace.engine.waiting import say

SPEAKERS = ("raylet", "gcs_server", "autoscaler")
MAX_CHARACTERS = 300
KINDS = (
    (
        r"(\d+) Workers \(tasks / actors\) killed due to memory pressure",
        "Ray ended {0} worker(s), as a machine's memory was nearly full; their tasks are tried again. If this goes on, free "
        "memory there, or let fewer workers work at once (of encoders: embed.num_actors)",
    ),
    (
        r"Spilled (\d+) MiB",
        "Ray's memory for objects is full on a machine: {0} MiB in all were put on its disk, which is slower. A larger object "
        "store (`ray start --object-store-memory`) avoids it",
    ),
    (
        r"(\S+) is over (\S+)% full, available space: ([\d.]+ \w+)",
        "the disk of {0} on a machine of Ray is over {1} % full, {2} are free: when it is full, work ends",
    ),
    (r"(?:Error|Warning): (.+)", "Ray's autoscaler says: {0}"),
)
"""Patterns of lines, and what becomes of them; of the autoscaler's own warnings the text."""


class RayWarnings:
    """A handler of lines that Ray's own processes write: each kind is said the first, second, fourth, eighth ... time."""

    def __init__(self, say: Callable[[str], None] = say) -> None:
        self._say, self._times = say, Counter[str]()

    def __call__(self, batch: Mapping[str, Any]) -> None:
        with suppress(Exception):  # a line of another form is no reason to end Ray's thread
            if batch.get("pid") in SPEAKERS:
                for line in batch["lines"]:
                    self._hear(str(line), batch["pid"] == "autoscaler")

    def _hear(self, line: str, autoscaler: bool) -> None:
        for pattern, text in KINDS if autoscaler else KINDS[:-1]:
            if found := re.search(pattern, line):
                self._times[pattern] += 1
                times = self._times[pattern]
                if times & (times - 1) == 0:
                    self._say(text.format(*found.groups())[:MAX_CHARACTERS])
                return
