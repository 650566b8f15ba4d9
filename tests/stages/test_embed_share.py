"""How many encoders there are, and what each has, on machines of any kind."""

from collections.abc import Sequence
from typing import Any

import pytest

from influencespace.engine.local import LocalEngine
from influencespace.engine.placement import Machine
from influencespace.stages.ingest.embed import embed_share, encoders_at_once, rates
from influencespace.stages.ingest.encode import ChunkResult, EmbedConfig

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


def test_a_number_of_encoders_that_is_left_open_grows_with_the_machines() -> None:
    machines = Machines(machine(16), machine(4, 2))
    for settings, expected in (({}, (2, 100)), ({"num_actors": 3}, (3, 3)), ({"num_actors": 1}, (1, 1))):
        config = EmbedConfig(encoder="fake", **settings)
        assert encoders_at_once(config, embed_share(config, machines, 100), 100) == expected
    few = EmbedConfig(encoder="fake")
    assert encoders_at_once(few, embed_share(few, machines, 1), 1) == (1, 1)


def test_rates_count_what_was_embedded_now_and_how_long_devices_computed() -> None:
    def chunk(worker: str, began: float, ended: float, busy: float) -> ChunkResult:
        counts = {"rows": 20, "images": 10, "items": 10, "bytes_read": 1000}
        return ChunkResult(**counts, began=began, ended=ended, busy=busy, worker=worker, gpus=0.5)

    found = ChunkResult(rows=5, bytes_read=70, items=5)  # its chunk was there
    measured = rates([found, chunk("a", 100, 102, 1.5), chunk("a", 102, 104, 2), chunk("b", 101, 104, 2.5)])
    assert measured["workers"] == 2
    assert measured["images_per_second"] == 30 / 4
    assert measured["images_per_second_per_gpu"] == 30 / 4
    assert measured["bytes_read"] == 3000
    assert measured["encoders_busy"] == 6 / (2 * 4)
    assert rates([found])["encoders_busy"] == 0
