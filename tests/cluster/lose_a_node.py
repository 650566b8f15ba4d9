"""Run as a program: two nodes, one is taken away in the middle of a map; writes what came back as JSON."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from influencespace.engine.session import start_ray

TASKS = 48
BEFORE_THE_LOSS = 6
OBJECT_STORE = 100 * 2**20
SOON_MISSED = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


@dataclass(frozen=True)
class SlowSquare:
    """A factory whose worker takes a while and says where it worked."""

    def __call__(self) -> Callable[[int], tuple[int, int, str]]:
        return self.work

    def work(self, task: int) -> tuple[int, int, str]:
        time.sleep(0.3)
        return task, task * task, ray.get_runtime_context().get_node_id()


def main() -> None:
    cluster = Cluster()
    cluster.add_node(
        num_cpus=2, object_store_memory=OBJECT_STORE, include_dashboard=False, _system_config=SOON_MISSED
    )
    second = cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE)
    try:
        with start_ray(address=cluster.address) as engine:
            before = engine.cores
            results, lost = [], False
            for result in engine.map(SlowSquare(), range(TASKS), workers=4):
                results.append(result)
                at_work = second.node_id in {node for *_, node in results}  # its workers may start late
                if not lost and at_work and len(results) >= BEFORE_THE_LOSS:
                    cluster.remove_node(second, allow_graceful=False)
                    lost = True
            outcome = {"results": results, "cores": [before, engine.cores], "lost": second.node_id}
            Path(sys.argv[1]).write_text(json.dumps(outcome), encoding="utf-8")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
