"""Embedding through the stage against a bare torch loop over the same decoded batches, and the driver's memory.

Both run in this one call, in turn, on the same cores; start-up is reported apart. The ratio is the figure.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from common import Benchmark, arguments, real_data

from influencespace.data.images import decode_image
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine.session import start_ray
from influencespace.models.encoders import load_encoder
from influencespace.stages.ingest.embed import embed
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.ingest.fit_encoder import FitEncoder

PARTS = ("synthetic", "real", "driver")


def bare_rates(pool: Path, encoder: str, batch_size: int) -> dict[str, float]:
    """Pairs a second with all cores: of a loop over batches that are decoded already, and of decoding them first."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load_encoder(encoder)
    shards = [read_shard(shard) for shard in list_shards(str(pool))]
    samples = [sample for shard in shards for sample in shard if isinstance(sample, Sample)]
    texts = [caption for sample in samples for caption in sample.captions]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    began = time.monotonic()
    images = [
        model.preprocess_images([decode_image(sample.image) for sample in samples[i : i + batch_size]])
        for i in range(0, len(samples), batch_size)
    ]
    tokens = [
        model.tokenize([texts[j] for j in order[i : i + batch_size]])[0]
        for i in range(0, len(order), batch_size)
    ]
    decoding = time.monotonic() - began
    model.encode_image(images[0])
    began = time.monotonic()
    for pixels in images:
        model.encode_image(pixels).cpu().numpy()
    for batch in tokens:
        model.encode_text(batch).cpu().numpy()
    cores = len(os.sched_getaffinity(0))
    return {
        "bare_pairs_a_second": len(texts) / (time.monotonic() - began),
        "decoding_pairs_a_second": len(texts) / (decoding / cores),
    }


def embed_part(bench: Benchmark, name: str, pool: Path, encoder: str, folder: Path, rounds: int) -> None:
    """The stage and the bare loop in turn, on the same pairs."""
    config = EmbedConfig(encoder=encoder)
    ratios, bounds = [], []
    with start_ray() as engine:
        for turn in range(rounds):
            bare = bare_rates(pool, encoder, config.batch_size)
            out = folder / f"{name}-{turn}"
            details = embed(list_shards(str(pool)), config, out, engine).details
            ratios.append(details["pairs_per_second"] / bare["bare_pairs_a_second"])
            bounds.append(1 / (1 + bare["bare_pairs_a_second"] / bare["decoding_pairs_a_second"]))
            told = ("workers", "startup_seconds", "steady_seconds", "pairs_per_second")
            share = details["pairs_per_second"] / bare["bare_pairs_a_second"]
            bench.row(turn=turn, share_of_bare_loop=share, **bare, **{key: details[key] for key in told})
    bench.target(
        name=f"throughput of the embed stage, as a share of a bare loop over decoded batches ({name}, median)",
        target="at least 0.85",
        measured=median(ratios),
        interval=(min(ratios), max(ratios)),
        reached=median(ratios) >= 0.85,
    )
    bench.row(turn="most that decoding leaves", share_of_bare_loop=median(bounds))


def driver_memory(pairs: int, out: Path, encoder: Path) -> float:
    """Peak resident memory in MB of a driver that embeds `pairs` pairs, in a process of its own."""
    world = out / f"world-{pairs}"
    write_world(world, WorldConfig(pretrain=0, pool=pairs, target=0, test=0, shard_size=2000))
    command = [
        sys.executable,
        __file__,
        "--driver",
        str(world / "pool"),
        str(encoder),
        str(out / f"embed-{pairs}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def as_driver(pool: str, encoder: str, out: str) -> None:
    with start_ray() as engine:
        embed(list_shards(pool), EmbedConfig(encoder=encoder), Path(out), engine)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    # not ru_maxrss: that begins with what the parent had when it forked
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    print(int(peak) / 1024)


def driver_part(bench: Benchmark, encoder: str, folder: Path, sizes: tuple[int, int]) -> None:
    """Peak memory of the driver for two numbers of pairs."""
    small, large = (driver_memory(size, folder, Path(encoder)) for size in sizes)
    bench.row(pairs=list(sizes), peak_mb=[small, large])
    bench.target(
        name=f"peak memory of the driver, {sizes[1]:,} pairs against {sizes[0]:,} (ratio)",
        target="at most 1.1",
        measured=large / small,
        reached=large / small <= 1.1,
    )


def main() -> None:
    options = arguments(__doc__ or "", "throughput", parts=PARTS)
    bench = Benchmark("throughput", options.quick, options.out, seeds=(0,))
    data = real_data()
    if data is None:
        print("without real data: set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        options.parts = [part for part in options.parts if part != "real"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pool = 1000 if options.quick else 4000
        write_world(folder, WorldConfig(pretrain=200, pool=pool, target=0, test=0, shard_size=250))
        tiny = str(folder / "encoder")
        FitEncoder(shards=str(folder / "pretrain"), out=Path(tiny), steps=2, seed=0)()

        def part(name: str) -> None:
            if name == "synthetic":
                embed_part(bench, name, folder / "pool", tiny, folder, 1 if options.quick else 3)
            elif name == "real" and data is not None:
                given = str(data.parent / "models" / "mobilenetv2-minilm")
                embed_part(bench, name, data / "flickr8k" / "dev", given, folder, 1 if options.quick else 2)
            else:
                driver_part(bench, tiny, folder, (500, 2000) if options.quick else (10_000, 100_000))

        bench.measure(options.parts, part, PARTS)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--driver":
        as_driver(*sys.argv[2:])
    else:
        main()
