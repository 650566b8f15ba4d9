"""Run as a program: `simulate.py WHAT FOLDER` on a cluster of simulated machines with logical cores and GPUs; writes JSON."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from influencespace.engine import place, waiting
from influencespace.engine.placement import Resources, share
from influencespace.engine.ray_engine import RayEngine
from influencespace.engine.session import start_ray
from influencespace.errors import InputError

OBJECT_STORE = 80 * 2**20
SYSTEM = {
    # Idle processes for all logical cores are not what is tried here.
    "prestart_worker_first_driver": False,
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 10,
}
SHAPES = {
    "large-head": [(64, 0), *[(8, 1)] * 2],
    "small-head": [(4, 0), *[(64, 0)] * 16, *[(16, 1)] * 4],
    "four-by-four": [(16, 0), *[(48, 4)] * 4],
    "eight-by-eight": [*[(96, 8)] * 8, *[(96, 0)] * 8],
}
GPU = Resources(gpus=1)
PATIENCE = 400.0


@dataclass(frozen=True)
class Together:
    """A factory whose workers each wait until so many of them are there, and then say where they are."""

    folder: Path
    count: int

    def __call__(self) -> Callable[[int], tuple[str, str]]:
        context = ray.get_runtime_context()
        me = context.get_actor_id()
        (self.folder / f"{me}.there").touch()

        def work(task: int) -> tuple[str, str]:
            until = time.monotonic() + PATIENCE
            while len(list(self.folder.glob("*.there"))) < self.count and time.monotonic() < until:
                time.sleep(0.1)
            return me, context.get_node_id()

        return work


@dataclass(frozen=True)
class Slow:
    """A task that takes a while the first time, and says how many cores it has."""

    marker: Path

    def __call__(self, *_: Any) -> float:
        if not self.marker.exists():
            self.marker.touch()
            time.sleep(PATIENCE)
        return float(ray.get_runtime_context().get_assigned_resources()["CPU"])


@contextmanager
def cluster_of(machines: list[tuple[int, int]]) -> Iterator[tuple[Cluster, list[Any]]]:
    cluster = Cluster()
    nodes = []
    try:
        for number, (cpus, gpus) in enumerate(machines):
            head = {} if number else {"include_dashboard": False, "_system_config": SYSTEM}
            nodes.append(
                cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=OBJECT_STORE, **head)
            )
        yield cluster, nodes
    finally:
        cluster.shutdown()


def refusal(engine: RayEngine, resources: Resources) -> str:
    try:
        list(engine.map(int, [0], resources=resources))
    except InputError as error:
        return str(error)
    return ""


def every_gpu(shape: str, folder: Path) -> dict[str, Any]:
    machines = SHAPES[shape]
    gpus = sum(one[1] for one in machines)
    with cluster_of(machines) as (cluster, nodes), start_ray(address=cluster.address) as engine:
        placed = share(engine.machines, 1000, need=GPU, max_cpus=1)
        results = list(engine.map(Together(folder, gpus), range(3 * gpus), workers=0, resources=GPU))
        return {
            "share": asdict(placed),
            "results": len(results),
            "actors": len({actor for actor, _ in results}),
            "nodes": sorted({node for _, node in results}),
            "gpu_nodes": sorted(node.node_id for node, one in zip(nodes, machines) if one[1]),
            "refusals": [refusal(engine, Resources(gpus=9)), refusal(engine, Resources(cpus=97))],
        }


def late(folder: Path) -> dict[str, Any]:
    """Machines with a GPU come when they are waited for, and one more when the work is under way."""
    waiting.FIRST_SECONDS, waiting.AGAIN_SECONDS = 1.0, 1.0
    added: list[str] = []
    with cluster_of([(4, 0)]) as (cluster, _), start_ray(address=cluster.address) as engine:
        said = waiting.say

        def say(text: str) -> None:
            """A machine comes when the first wait is spoken of."""
            said(text)
            if not added:
                added.append(
                    cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=OBJECT_STORE).node_id
                )

        place.say = say
        looked = place.Place.look

        def look(self: place.Place, at_work: Callable[[], bool]) -> bool:
            """Another one comes when a worker waits on the first."""
            if list(folder.glob("*.there")) and len(added) == 1:
                added.append(
                    cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=OBJECT_STORE).node_id
                )
            return looked(self, at_work)

        place.Place.look = look  # type: ignore[method-assign]
        results = list(engine.map(Together(folder, 2), range(6), workers=0, resources=GPU))
        return {"actors": len({one for one, _ in results}), "results": len(results), "added": added}


def stream_grows(folder: Path) -> dict[str, Any]:
    """A machine with a GPU comes in the middle of a stream; a stream that is left early gives back what it held."""

    def produce() -> Callable[[int], Iterator[tuple[int, int]]]:
        return lambda task: ((task, number) for number in range(20))

    def consume() -> Callable[[tuple[int, int]], tuple[tuple[int, int], str]]:
        def work(item: tuple[int, int]) -> tuple[tuple[int, int], str]:
            time.sleep(0.4)
            return item, ray.get_runtime_context().get_node_id()

        return work

    with cluster_of([(8, 0), (2, 1)]) as (cluster, _), start_ray(address=cluster.address) as engine:
        results, added = [], ""
        for result in engine.stream(produce, range(6), consume, workers=(1, 4), resources=GPU):
            results.append(result)
            if len(results) == 5:
                node = cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=OBJECT_STORE)
                added = node.node_id
        left = engine.stream(produce, range(2), consume, workers=2, resources=GPU)
        next(left)
        left.close()
        until = time.monotonic() + 60
        while ray.available_resources().get("GPU", 0) < 2 and time.monotonic() < until:
            time.sleep(0.5)
        return {
            "items": sorted(item for item, _ in results),
            "added": added,
            "nodes": sorted({node for _, node in results}),
            "free": ray.available_resources().get("GPU", 0),
        }


def largest_lost(folder: Path) -> dict[str, Any]:
    """The largest machine dies in the middle of tasks of its size: by each verb."""
    cores = {}
    with cluster_of([(3, 0), (8, 0)]) as (cluster, nodes), start_ray(address=cluster.address) as engine:
        for verb in ("tasks", "actors", "pool"):
            marker = folder / verb
            lost = threading.Thread(target=lose_after, args=(marker, cluster, nodes.pop()))
            lost.start()
            cores[verb] = sized(engine, verb, Slow(marker))
            lost.join()
            nodes.append(cluster.add_node(num_cpus=8, object_store_memory=OBJECT_STORE))
    return cores


def sized(engine: RayEngine, verb: str, slow: Slow) -> float:
    whole = Resources(cpus=engine.cores_per_task)
    if verb == "tasks":
        from influencespace.engine.local import run_task

        return float(next(iter(engine.map(run_task, [slow], resources=whole))))
    if verb == "actors":
        return float(next(iter(engine.map(lambda: slow, [0], resources=whole))))
    with engine.pool(lambda: slow, resources=whole) as pool:
        return float(pool.fold([0], max))


def lose_after(marker: Path, cluster: Cluster, node: Any) -> None:
    while not marker.exists():
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)


def main(what: str, folder: Path) -> None:
    os.environ.pop("RAY_ADDRESS", None)
    # Machines are added by threads, which may set no signal handlers.
    ray._private.utils.set_sigterm_handler = lambda handler: None
    others = {"late": late, "largest-lost": largest_lost, "stream-grows": stream_grows}
    outcome = others[what](folder) if what in others else every_gpu(what, folder)
    (folder / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
