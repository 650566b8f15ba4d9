"""The plan for a cluster: machines in words, and what divides over them."""

from dataclasses import replace
from pathlib import Path

import pytest

from influencespace.config import load_config
from influencespace.engine.local import LocalEngine
from influencespace.engine.placement import Machine, Resources
from influencespace.errors import InputError
from influencespace.pipeline import STAGES
from influencespace.planning import plan
from influencespace.planning.cluster import gpu_in_cores, parse_cluster, parse_pairs
from influencespace.planning.cost_model import Cost, Timing
from influencespace.planning.forecast import ALONE, CORES, FEW, GPUS, UnitCosts, divided, on_cluster
from influencespace.planning.growth import GROWTH, growth_of
from tests.test_plan import Toy, config_of, printed, world  # noqa: F401

ORDINARY = Timing(stage="toy", pairs=1, read=0, written=0, memory=1, seconds=0.0)
TWO_GROUPS = "head 1x(4 cores, 16 GB), 4x(16 cores, 64 GB, 1xA10G)"


def costs_of(stage: str, *, fixed: float, a_pair: float, reading: float = 0.0, cores: int = 2) -> UnitCosts:
    """Two slices of 100 and 200 pairs on so many cores: seconds alone, and seconds of workers for each pair."""
    timings = [
        replace(
            ORDINARY,
            stage=stage,
            working=count * a_pair,
            reading=count * reading,
            seconds=fixed + count * a_pair / cores,
        )
        for count in (100, 200)
    ]
    return UnitCosts.of(timings[0], timings[1], (100, 200), cores)


def test_groups_of_machines_are_read() -> None:
    cluster = parse_cluster(TWO_GROUPS)
    head, workers = cluster.groups
    assert (head.count, head.machine, head.gpu) == (1, Machine(cpus=4, memory=16 * 10**9), "")
    assert workers.machine == Machine(cpus=16, gpus=1, memory=64 * 10**9)
    assert (workers.count, workers.gpu) == (4, "A10G")
    assert (len(cluster.machines), cluster.cores, cluster.gpus) == (5, 68, 4)
    assert cluster.cores_per_gpu == gpu_in_cores("A10G")
    assert parse_cluster("2 x ( 8 CPUs , 1.5 TB )").groups[0].machine.memory == 1.5e12
    mixed = parse_cluster("1x(8 cores, 8 GB, 3xT4), 1x(8 cores, 8 GB, 1xH100)").cores_per_gpu
    assert mixed == pytest.approx((3 * gpu_in_cores("T4") + gpu_in_cores("H100")) / 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it names no machine"),
        ("4 machines", "'4 machines' is not understood"),
        ("4x(16 cores, 64 GB) 2x(8 cores, 8 GB)", "a comma is missing before '2x"),
        ("4x(16 cores, 64 GB, 1xRTX)", "no GPU RTX is known; there are T4"),
        ("4x(16 cores, 64 GB, fast)", "'fast' is neither cores"),
        ("4x(16 cores)", "needs a number of machines, cores and GB"),
        ("0x(16 cores, 64 GB)", "needs a number of machines"),
    ],
)
def test_what_is_no_cluster_is_refused_with_an_example(text: str, reason: str) -> None:
    with pytest.raises(InputError, match="Write it as in") as error:
        parse_cluster(text)
    assert reason in str(error.value)


def test_numbers_of_pairs() -> None:
    texts = ("500000", "10k", "12.8M", "1.28B", "1,000")
    assert [parse_pairs(text) for text in texts] == [500_000, 10_000, 12_800_000, 1_280_000_000, 1000]
    for text in ("", "many", "-3", "0", "1e6x"):
        with pytest.raises(InputError, match="give a number of pairs"):
            parse_pairs(text)


def test_what_is_divided_shrinks_with_the_cores_and_what_is_not_stays() -> None:
    costs, config = costs_of("toy", fixed=7.0, a_pair=0.01), load_config(None, {})
    for machines, cores in ((1, 8), (10, 80)):
        cluster = parse_cluster(f"{machines}x(8 cores, 8 GB)")
        cost = on_cluster(Cost(stage="toy", worker=Resources()), costs, cluster, config, 10**6)
        assert cost.seconds == pytest.approx(7 + 10**4 / cores)
        assert (cost.gpu_seconds, cost.bound) == (0, CORES)
    small = on_cluster(Cost(stage="toy", worker=Resources()), costs, cluster, config, 1000)
    assert small.bound == ALONE


def test_gpus_encode_and_cores_read() -> None:
    costs = costs_of("embed/pool", fixed=0.0, a_pair=0.05, reading=0.002)
    config, cost = load_config(None, {}), Cost(stage="embed/pool", worker=Resources())
    few_cores = parse_cluster("4x(2 cores, 64 GB, 1xA100)")
    many_cores = parse_cluster("4x(640 cores, 64 GB, 1xA100)")
    slow, quick = (on_cluster(cost, costs, one, config, 10**6) for one in (few_cores, many_cores))
    assert slow.gpu_seconds == quick.gpu_seconds == pytest.approx(48_000 / gpu_in_cores("A100"))
    assert slow.seconds == pytest.approx(2000 / 8)
    assert quick.seconds == pytest.approx(48_000 / gpu_in_cores("A100") / 4)
    assert (slow.bound, quick.bound) == (CORES, GPUS)


def test_the_begin_and_end_of_a_stream_do_not_grow() -> None:
    small, large = (
        replace(ORDINARY, stage="embed/pool", working=count * 0.05, seconds=count * 0.025 + alone)
        for count, alone in ((100, 7.0), (200, 8.0))
    )
    costs = UnitCosts.of(small, large, (100, 200), 2)
    cost, cluster = Cost(stage="embed/pool", worker=Resources()), parse_cluster("1x(8 cores, 8 GB)")
    of_pictures = on_cluster(cost, costs, cluster, load_config(None, {}), 10**6)
    assert of_pictures.seconds == pytest.approx(10**6 * 0.05 / 8 + 8)
    stored = load_config(None, {"data.embeddings": "stored"})
    assert on_cluster(cost, costs, cluster, stored, 10**6).seconds == pytest.approx(
        10**6 * 0.05 / 8 + 8 + (10**6 - 200) / 100
    )


def test_proxies_are_no_quicker_with_more_machines_than_proxies() -> None:
    costs, config = costs_of("proxies", fixed=0.0, a_pair=0.01), load_config(None, {})
    cost = Cost(stage="proxies", worker=Resources())
    few, many = (
        on_cluster(cost, costs, parse_cluster(f"{count}x(1 cores, 8 GB)"), config, 10**6)
        for count in (3, 300)
    )
    assert few.seconds == many.seconds
    assert many.bound == FEW


@pytest.mark.parametrize(
    ("tasks", "places", "seconds"), [(3, 2, 8), (4, 2, 6), (3, 3, 4), (3, 64, 4), (float("inf"), 8, 1.5)]
)
def test_three_tasks_on_two_places_take_as_long_as_four(tasks: float, places: int, seconds: float) -> None:
    assert divided(12.0, places, tasks) == pytest.approx(seconds)


def test_time_of_the_last_round_is_not_taken_for_work_of_the_driver() -> None:
    # three proxies of 10 s each on two cores
    timing = replace(ORDINARY, stage="proxies", working=30.0, seconds=20.0)
    assert UnitCosts.of(timing, timing, (1, 1), 2, (3, 3)).alone == (0, 0)
    assert UnitCosts.of(timing, timing, (1, 1), 2).alone == (5, 5)


def test_a_sample_does_not_grow_with_the_pool() -> None:
    config = load_config(None, {})
    assert growth_of("influence", config).units(config, 10**9) == config.influence.max_samples
    assert growth_of("nothing that is known", config).units(config, 10**9) == 10**9
    assert {stage.name for stage in STAGES} >= GROWTH.keys()
    assert growth_of("embed/pool", config).gpu
    assert not growth_of("embed/pool", load_config(None, {"data.embeddings": "stored"})).gpu


def test_clustering_grows_with_pairs_and_clusters_until_there_are_enough() -> None:
    units, config = growth_of("cluster", load_config(None, {})).units, load_config(None, {})
    assert units(config, 10**7) == pytest.approx(10 * units(config, 10**6), rel=0.05)
    assert units(config, 10**6) > 50 * units(config, 10**5)


def test_copies_are_dearer_to_find_in_larger_clusters() -> None:
    units, config = growth_of("redundancy", load_config(None, {})).units, load_config(None, {})
    assert 2 * 10 < units(config, 10**7) / units(config, 10**6) < 4 * 10
    assert units(config, 10**9) == pytest.approx(100 * units(config, 10**7), rel=0.01)


def test_a_plan_for_a_cluster(world: Path, tmp_path: Path) -> None:  # noqa: F811
    cluster = parse_cluster(TWO_GROUPS)
    engine, out = LocalEngine(), tmp_path / "run"
    made = plan(config_of(world), 128, engine, out, cluster=cluster, pairs=12_800_000)
    assert made.sizes["pool"].pairs == 12_800_000
    pool, target = made.cost("embed/pool"), made.cost("embed/target")
    assert pool.gpu_seconds
    assert target.gpu_seconds
    assert 2 < made.cost("cluster").written / 12_800_000 < 20  # bytes a pair: a cluster and a cosine
    # bytes a pair: two embeddings of 64 numbers in half precision, and thin columns
    assert 256 < made.cost("embed/pool").written / 12_800_000 < 512
    text = printed(made)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    together = " ".join(text.split())
    assert "5 machines, 68 cores, 4 GPUs" in together
    assert "No GPU was measured" in together
    with pytest.raises(InputError, match="needs a measured slice"):
        plan(config_of(world), 0, engine, out, cluster=cluster)
    with pytest.raises(InputError, match="stage toy: a worker needs"):
        plan(config_of(world), 64, engine, out, (Toy(),), cluster=parse_cluster("1x(4 cores, 8 GB)"))
