"""Embedding through the stage against a bare loop of threads and torch over the same shards, and the driver's memory.

Both run in this one call, in turn, on the same cores; start-up is reported apart. The ratio is the figure.
"""

import itertools
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
NEAR = 224
REPORTED = ("workers", "startup_seconds", "steady_seconds", "pairs_per_second")


def bare_rate(pool: Path, encoder: str, batch_size: int) -> float:
    """Pairs a second of a loop without Ray over the same shards, with all cores: a batch is read, decoded by as many threads, and
    encoded."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    model = load_encoder(encoder)
    samples = (item for shard in list_shards(str(pool)) for item in read_shard(shard))
    batches = iter(lambda: list(itertools.islice(samples, batch_size)), [])
    pairs, began = 0, time.monotonic()
    with ThreadPoolExecutor(cores) as threads:
        for batch in batches:
            images = [sample for sample in batch if isinstance(sample, Sample)]
            captions = sorted((caption for sample in images for caption in sample.captions), key=len)
            decode = partial(decode_image, near=NEAR)
            pictures = list(threads.map(decode, (sample.image for sample in images)))
            model.encode_image(model.preprocess_images(pictures)).cpu().numpy()
            for start in range(0, len(captions), batch_size):
                model.encode_text(model.tokenize(captions[start : start + batch_size])[0]).cpu().numpy()
            pairs += len(captions)
    return pairs / (time.monotonic() - began)


def embed_part(bench: Bench, name: str, pool: Path, encoder: str, rounds: int) -> None:
    """The stage and the bare loop in turn, on the same shards."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder, start_ray() as engine:
        for turn in range(rounds):
            bare = bare_rate(pool, encoder, EmbedConfig(encoder=encoder).batch_size)
            details = embed_by(engine, Path(folder) / str(turn), str(pool), encoder).details
            ratios.append(details["pairs_per_second"] / bare)
            reported = {key: details[key] for key in REPORTED}
            bench.row(turn=turn, share_of_bare_loop=ratios[-1], bare_pairs_a_second=bare, **reported)
    what = f"steady state of the embed stage, as a share of a bare loop that reads, decodes and encodes ({name}, median)"
    bench.target(what, wanted.at_least(0.95), median(ratios), (min(ratios), max(ratios)))


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
            peaks.append(float(last_line_of("benchmarks.speed.ingest", str(world / "pool"), encoder, out)))
    bench.row(pairs=list(sizes), peak_mb=peaks)
    what = f"peak memory of the driver, {sizes[1]:,} pairs against {sizes[0]:,} (ratio)"
    bench.target(what, wanted.at_most(1.1), peaks[1] / peaks[0])


if __name__ == "__main__":  # the process of a driver
    with start_ray() as _engine:
        embed_by(_engine, Path(sys.argv[3]), sys.argv[1], sys.argv[2])
    print(peak_mb())
