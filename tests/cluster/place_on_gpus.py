"""Run as a program: embeds on a large head and two small nodes with a logical GPU each, and on one more that comes when the first
encoder is there; writes where as JSON."""

import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from embedding import FakeEncoder, load_fake_preprocessing, write_world
from ray.cluster_utils import Cluster
from simulate import SYSTEM

from influencespace.config import load_config
from influencespace.engine.placement import Resources
from influencespace.engine.session import start_ray
from influencespace.errors import InputError
from influencespace.run import Run, carry_out
from influencespace.stages.ingest import embed
from influencespace.stages.ingest.embed import Embed, embed_share
from influencespace.stages.ingest.encode import EmbedConfig

OBJECT_STORE = 100 * 2**20
SHARDS = 12
PATIENCE = 200.0


class Patient(FakeEncoder):
    """Embeds nothing before three encoders are there."""

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        until = time.monotonic() + PATIENCE
        while len(list(self.log.parent.glob("worker-*.json"))) < 3 and time.monotonic() < until:
            time.sleep(0.2)
        return super().encode_image(pixels)


def add_late(
    cluster: Cluster, folder: Path, nodes: list[str], node: dict[str, Any], over: threading.Event
) -> None:
    """A machine with a GPU, as soon as the first encoder is there; its processes end with this thread."""
    until = time.monotonic() + PATIENCE
    while not list(folder.glob("worker-*.json")) and time.monotonic() < until:
        time.sleep(0.2)
    nodes.append(cluster.add_node(num_cpus=4, num_gpus=1, **node).node_id)
    over.wait()


def main(folder: Path) -> None:
    # The machine is added by a thread, which may set no signal handlers.
    ray._private.utils.set_sigterm_handler = lambda handler: None
    # So small shards would be work for one encoder.
    embed.amounts = lambda shards: ([100] * len(shards), "MB")
    cluster, over = Cluster(), threading.Event()
    node = {"object_store_memory": OBJECT_STORE}
    cluster.add_node(num_cpus=16, include_dashboard=False, _system_config=SYSTEM, **node)
    gpu_nodes = [cluster.add_node(num_cpus=4, num_gpus=1, **node).node_id for _ in range(2)]

    def load(config: EmbedConfig, device: str) -> FakeEncoder:
        actor = ray.get_runtime_context().get_actor_id()
        if actor is None:  # it only probes its batch
            return FakeEncoder(folder / "probe")
        started = {"node": ray.get_runtime_context().get_node_id(), "device": device}
        (folder / f"worker-{actor}.json").write_text(json.dumps(started))
        return Patient(folder / "log")

    data = write_world(folder / "data", SHARDS)
    config = load_config(None, {"embed.encoder": "fake", "data.pool": data})
    try:
        with start_ray(address=cluster.address) as engine:
            share = embed_share(config.embed, engine, SHARDS)
            machine_memory = min(machine.memory for machine in engine.machines)
            late = (cluster, folder, gpu_nodes, node, over)
            threading.Thread(target=add_late, args=late, daemon=True).start()
            manifest = carry_out(
                Embed("pool", load, load_fake_preprocessing),
                Run(folder=folder / "run", config=config),
                engine,
            )
            try:
                list(engine.map(int, [0], resources=Resources(cpus=8, gpus=1)))
                refusal = "none"
            except InputError as error:
                refusal = str(error)
    finally:
        over.set()
        cluster.shutdown()
    started = [json.loads(path.read_text()) for path in folder.glob("worker-*.json")]
    outcome = {
        "share": asdict(share),
        "pairs": manifest.rows_out,
        "gpu_nodes": gpu_nodes,
        "machine_memory": machine_memory,
    }
    (folder / "outcome.json").write_text(json.dumps(outcome | {"started": started, "refusal": refusal}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
