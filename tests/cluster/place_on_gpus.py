"""Run as a program: embeds on a large head and two small nodes with a logical GPU each; writes where as JSON."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import ray
from embedding import FakeEncoder, load_fake, load_fake_preprocessing, write_world
from ray.cluster_utils import Cluster

from influencespace.config import load_config
from influencespace.engine.placement import Resources
from influencespace.engine.session import start_ray
from influencespace.errors import InputError
from influencespace.run import Run, carry_out
from influencespace.stages.ingest.embed import Embed, embed_share
from influencespace.stages.ingest.encode import EmbedConfig

OBJECT_STORE = 100 * 2**20
SHARDS = 5
# Idle processes for all of the head's cores are not what is tried here.
QUIET = {"prestart_worker_first_driver": False}


def main(folder: Path) -> None:
    cluster = Cluster()
    node = {"object_store_memory": OBJECT_STORE}
    cluster.add_node(num_cpus=16, include_dashboard=False, _system_config=QUIET, **node)
    gpu_nodes = [cluster.add_node(num_cpus=4, num_gpus=1, **node).node_id for _ in range(2)]

    def load(config: EmbedConfig, device: str) -> FakeEncoder:
        started = {"node": ray.get_runtime_context().get_node_id(), "device": device}
        (folder / f"worker-{ray.get_runtime_context().get_actor_id()}.json").write_text(json.dumps(started))
        return load_fake(folder / "log", config, device)

    data = write_world(folder / "data", SHARDS)
    config = load_config(None, {"embed.encoder": "fake", "data.pool": data})
    try:
        with start_ray(address=cluster.address) as engine:
            share = embed_share(config.embed, engine, SHARDS)
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
        cluster.shutdown()
    started = [json.loads(path.read_text()) for path in folder.glob("worker-*.json")]
    outcome = {"share": asdict(share), "pairs": manifest.rows_out, "gpu_nodes": gpu_nodes}
    (folder / "outcome.json").write_text(json.dumps(outcome | {"started": started, "refusal": refusal}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
