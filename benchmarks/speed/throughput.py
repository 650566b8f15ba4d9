"""Embedding through the stage against a bare torch loop over the same decoded batches, and the driver's memory.

Both run in this one call, in turn, on the same cores; start-up is reported apart. The ratio is the figure.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.data.datasets import embed_by, encoder_of
from benchmarks.speed.processes import last_line_of, peak_mb, tiny_world
from influencespace.data.images import decode_image
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine.session import start_ray
from influencespace.models.encoders import load_encoder
from influencespace.stages.ingest.encode import EmbedConfig

BENCHMARK = Benchmark(seeds=(0,))
REPORTED = ("workers", "startup_seconds", "steady_seconds", "pairs_per_second")


def bare_rates(pool: Path, encoder: str, batch_size: int) -> dict[str, float]:
    """Pairs a second with all cores: of a loop over batches that are decoded already, and of decoding them first."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    model = load_encoder(encoder)
    shards = [read_shard(shard) for shard in list_shards(str(pool))]
    samples = [sample for shard in shards for sample in shard if isinstance(sample, Sample)]
    texts = sorted((caption for sample in samples for caption in sample.captions), key=len)
    began = time.monotonic()
    images = [
        model.preprocess_images([decode_image(sample.image) for sample in samples[i : i + batch_size]])
        for i in range(0, len(samples), batch_size)
    ]
    tokens = [model.tokenize(texts[i : i + batch_size])[0] for i in range(0, len(texts), batch_size)]
    decoding = time.monotonic() - began
    model.encode_image(images[0])
    began = time.monotonic()
    for pixels in images:
        model.encode_image(pixels).cpu().numpy()
    for batch in tokens:
        model.encode_text(batch).cpu().numpy()
    return {
        "bare_pairs_a_second": len(texts) / (time.monotonic() - began),
        "decoding_pairs_a_second": len(texts) / (decoding / cores),
    }


def embed_part(bench: Bench, name: str, pool: Path, encoder: str, rounds: int) -> None:
    """The stage and the bare loop in turn, on the same pairs."""
    ratios, bounds = [], []
    with tempfile.TemporaryDirectory() as folder, start_ray() as engine:
        for turn in range(rounds):
            bare = bare_rates(pool, encoder, EmbedConfig(encoder=encoder).batch_size)
            details = embed_by(engine, Path(folder) / str(turn), str(pool), encoder).details
            ratios.append(details["pairs_per_second"] / bare["bare_pairs_a_second"])
            bounds.append(1 / (1 + bare["bare_pairs_a_second"] / bare["decoding_pairs_a_second"]))
            reported = {key: details[key] for key in REPORTED}
            bench.row(turn=turn, share_of_bare_loop=ratios[-1], **bare, **reported)
    what = f"throughput of the embed stage, as a share of a bare loop over decoded batches ({name}, median)"
    bench.target(what, wanted.at_least(0.85), median(ratios), (min(ratios), max(ratios)))
    bench.row(turn="most that decoding leaves", share_of_bare_loop=median(bounds))


@BENCHMARK.part
def synthetic(bench: Bench) -> None:
    """The tiny CLIP over synthetic scenes."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = tiny_world(Path(folder), pool=bench.pick(4000, 1000), shard_size=250, steps=2)
        embed_part(bench, "synthetic", Path(folder) / "pool", encoder, bench.pick(3, 1))


@BENCHMARK.part
def real(bench: Bench) -> None:
    """The pretrained encoder over photographs, where there are any."""
    if bench.data is None or not (bench.data / "flickr8k").is_dir():
        print("skipped: set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        return
    pool = bench.data / "flickr8k" / "dev"
    embed_part(bench, "real", pool, str(encoder_of(bench.data)), bench.pick(2, 1))


@BENCHMARK.part
def driver(bench: Bench) -> None:
    """Peak memory of the driver for two numbers of pairs, in processes of their own."""
    sizes, peaks = bench.pick((10_000, 100_000), (500, 2000)), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoder = tiny_world(folder, pool=0, shard_size=250, steps=2)
        for pairs in sizes:
            world = folder / f"world-{pairs}"
            write_world(world, WorldConfig(pretrain=0, pool=pairs, target=0, test=0, shard_size=2000))
            out = str(folder / f"embed-{pairs}")
            peaks.append(
                float(last_line_of("benchmarks.speed.throughput", str(world / "pool"), encoder, out))
            )
    bench.row(pairs=list(sizes), peak_mb=peaks)
    what = f"peak memory of the driver, {sizes[1]:,} pairs against {sizes[0]:,} (ratio)"
    bench.target(what, wanted.at_most(1.1), peaks[1] / peaks[0])


if __name__ == "__main__":  # the process of a driver
    with start_ray() as _engine:
        embed_by(_engine, Path(sys.argv[3]), sys.argv[1], sys.argv[2])
    print(peak_mb())
