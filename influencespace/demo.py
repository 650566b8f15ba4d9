"""The demo: a synthetic world with wrong captions, a tiny CLIP fitted on its own dirty pretrain split, the whole job."""

from pathlib import Path
from typing import Any

from influencespace import pipeline
from influencespace.config import load_config
from influencespace.data.locations import alone_in, local_folder
from influencespace.data.synthetic import SPLITS, WorldConfig, count_shards, write_world
from influencespace.engine.local import Engine, run_once
from influencespace.engine.progress import progress
from influencespace.run import Run
from influencespace.stages.ingest.fit_encoder import FitEncoder
from influencespace.stages.ingest.shards import ROLES

LOCAL_ONLY = "the demo is small and stays on this machine"
# a proxy for 6,000 pairs on two cores, in at most 400 steps; everything else is the default
SMALL_PROXY = {
    "proxy.train.batch_size": 256,
    "proxy.train.dimension": 128,
    "proxy.max_doublings": 2,
}


def run_demo(out: Path, engine: Engine, *, seed: int = 0, pairs: int = 6000, steps: int = 300) -> Run:
    """Write the world and its encoder below `out`, and curate it there; the finished Run."""
    out = local_folder(out, "--out", LOCAL_ONLY).expanduser().absolute()
    with alone_in(out):
        return _demo(out, engine, seed, pairs, steps)


def _demo(out: Path, engine: Engine, seed: int, pairs: int, steps: int) -> Run:
    world = out / "world"
    # the demo shows one dirt: wrong captions
    dirt: dict[str, Any] = {"near_duplicates": 0.0, "boilerplate": 0.0, "irrelevant": 0.0}
    # The encoder has seen far less of this world than the pool holds, as one from the web has of anybody's own domain.
    size = {"pool": pairs} | {role: max(100, pairs // 6) for role in ("pretrain", "target", "test")}
    scenes = WorldConfig(seed=seed, wrong_captions=0.25, **size, **dirt)
    shards = sum(count_shards(scenes, split) for split in SPLITS)
    with progress("world", shards, "shards") as bar:
        write_world(world, scenes, bar.advance)
    encoder = out / "encoder"
    run_once(engine, FitEncoder(shards=str(world / "pretrain"), out=encoder, steps=steps, seed=seed))
    settings = {f"data.{role}": str(world / role) for role in ROLES}
    config = load_config(None, SMALL_PROXY | settings | {"embed.encoder": str(encoder)})
    return pipeline.curate(config, out, engine)
