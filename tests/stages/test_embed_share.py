"""How many encoders there are, and what each has, on machines of any kind."""

from collections.abc import Sequence
from typing import Any

import pytest

from influencespace.engine.local import LocalEngine
from influencespace.engine.placement import Machine
from influencespace.stages.ingest.embed import embed_share
from influencespace.stages.ingest.encode import EmbedConfig

GIGABYTE = 2**30
PLENTY = 1000 * GIGABYTE


class Machines(LocalEngine):
    """The plain loop that says it has such machines."""

    def __init__(self, *machines: Machine) -> None:
        self._machines = machines

    @property
    def machines(self) -> Sequence[Machine]:
        return self._machines

    @property
    def cores_per_task(self) -> int:
        return int(max(machine.cpus for machine in self._machines))


def machine(cpus: int, gpus: int = 0, memory: int = PLENTY) -> Machine:
    return Machine(cpus=cpus, gpus=gpus, memory=memory)


@pytest.mark.parametrize(
    ("machines", "settings", "expected"),
    [
        ([machine(1)], {}, (1, 1, 0)),
        ([machine(2)], {}, (2, 1, 0)),
        ([machine(200)], {}, (100, 2, 0)),  # no more workers than shards
        ([machine(16, memory=24 * GIGABYTE)], {}, (4, 4, 0)),
        ([machine(16, memory=GIGABYTE)], {}, (1, 16, 0)),
        ([machine(16)], {"num_actors": 4}, (4, 4, 0)),
        ([machine(16)], {"cpus_per_actor": 4}, (4, 4, 0)),
        ([machine(16, 2)], {}, (2, 1, 1)),
        ([machine(16, 2)], {"gpus_per_actor": 0.5}, (4, 1, 0.5)),
        ([machine(16, 2)], {"gpus_per_actor": 0}, (16, 1, 0)),
        # a head without GPUs that is larger than those with them
        ([machine(64), *[machine(8, 1)] * 2], {}, (2, 1, 1)),
        ([machine(16), *[machine(48, 4)] * 4], {}, (16, 1, 1)),
        ([*[machine(96, 8)] * 8, *[machine(96)] * 8], {}, (64, 1, 1)),
        ([machine(4, 2)], {"gpus_per_actor": 0.4}, (4, 1, 0.4)),
    ],
)
def test_machines_are_shared_among_the_workers(
    machines: list[Machine], settings: dict[str, Any], expected: tuple[int, int, float]
) -> None:
    share = embed_share(EmbedConfig(encoder="fake", **settings), Machines(*machines), tasks=100)
    resources = share.resources
    assert (share.workers, resources.cpus, resources.gpus) == expected
    assert share.device == ("cuda" if resources.gpus else "cpu")
