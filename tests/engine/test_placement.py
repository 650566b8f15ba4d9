"""Workers are placed machine by machine: every GPU has its worker, and what fits nowhere is refused by what to set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.engine.placement import Machine, Resources, check_place, places, share
from influencespace.errors import InputError

ON_A_GPU = Resources(cpus=0, gpus=1)
MIXED = {
    "a large head and two small GPU nodes": ([Machine(cpus=64), *[Machine(cpus=8, gpus=1)] * 2], 2, 8),
    "four GPU nodes of four": ([Machine(cpus=16), *[Machine(cpus=48, gpus=4)] * 4], 16, 12),
    "as many nodes without GPUs": ([*[Machine(cpus=96, gpus=8)] * 8, *[Machine(cpus=96)] * 8], 64, 12),
}


@pytest.mark.parametrize("shape", MIXED)
def test_every_gpu_has_its_worker(shape: str) -> None:
    """With the cores that its own machine can give, however many the largest has."""
    machines, workers, cpus = MIXED[shape]
    placed = share(machines, 1000, need=ON_A_GPU, max_cpus=63)
    assert (placed.workers, placed.resources.cpus, placed.resources.gpus) == (workers, cpus, 1)
    assert places(machines, placed.resources) == workers
    assert placed.device == "cuda"


@pytest.mark.parametrize(
    ("gpus", "fraction", "workers"),
    [(2, 0.4, 4), (2, 0.5, 4), (2, 0.6, 2), (3, 2, 1), (1, 0.1, 10), (2, 0.2, 10), (1, 2, 0)],
)
def test_a_fraction_lies_within_one_gpu(gpus: int, fraction: float, workers: int) -> None:
    assert places([Machine(cpus=64, gpus=gpus)], Resources(gpus=fraction)) == workers


def test_the_scarcest_of_all_that_is_asked_for_counts() -> None:
    machine = Machine(cpus=16, gpus=2, memory=10)
    assert machine.places(Resources(cpus=3)) == 5
    assert machine.places(Resources(cpus=3, memory=4)) == 2
    assert machine.places(Resources(cpus=12, gpus=0.5, memory=1)) == 1
    assert machine.places(Resources(cpus=17)) == 0


def test_what_is_asked_for_is_given_and_no_more_than_there_are_tasks() -> None:
    machines = [Machine(cpus=8)] * 2
    assert share(machines, 100, need=Resources(cpus=0), workers=4, max_cpus=8).resources.cpus == 4
    assert share(machines, 100, need=Resources(cpus=3), max_cpus=8).workers == 4
    few = share(machines, 1, need=Resources(cpus=0), max_cpus=7)
    assert (few.workers, few.resources.cpus) == (1, 7)


@given(
    machines=st.lists(
        st.builds(
            Machine, cpus=st.integers(1, 64), gpus=st.integers(0, 8), memory=st.sampled_from([0, 8, 100])
        ),
        min_size=1,
        max_size=5,
    ),
    gpus=st.sampled_from([0, 0.4, 1, 2]),
    memory=st.sampled_from([0, 7]),
    tasks=st.integers(1, 50),
)
def test_all_workers_find_a_place_wherever_one_does(
    machines: list[Machine], gpus: float, memory: int, tasks: int
) -> None:
    need = Resources(cpus=0, gpus=gpus, memory=memory)
    placed = share(machines, tasks, need=need, max_cpus=64)
    one = Resources(cpus=1, gpus=gpus, memory=memory)
    if places(machines, one):
        assert 1 <= placed.workers <= min(tasks, places(machines, one))
        assert places(machines, placed.resources) >= placed.workers
        check_place(machines, placed.resources)
    else:
        with pytest.raises(InputError):
            check_place(machines, placed.resources)


def test_a_worker_that_no_machine_has_room_for_is_refused_by_what_to_set() -> None:
    machines = [Machine(cpus=64), Machine(cpus=8, gpus=1, memory=4 * 10**9)]
    with pytest.raises(
        InputError, match=r"needs 16 CPU.*1 GPU.*at most 64 CPU.*one 1 GPU.*embed\.cpus_per_actor"
    ):
        check_place(machines, Resources(cpus=16, gpus=1))
    with pytest.raises(InputError, match=r"needs 1 CPU.*2 GPU.*one 1 GPU.*embed\.gpus_per_actor"):
        check_place(machines, Resources(gpus=2))
    with pytest.raises(InputError, match=r"5\.0 GB, and no machine has them"):
        check_place(machines, Resources(memory=5 * 10**9))
    check_place(machines, Resources(cpus=64))
    check_place([], Resources(cpus=64))  # nothing is known of a cluster that has yet to start
