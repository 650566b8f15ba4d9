"""Whole runs from stored embeddings by the command line, at several sizes of the pool: time, memory and bytes of each stage.

The runs are processes of their own with a local Ray, the target and the test set are embedded within them.
"""

import itertools
import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.cache import ROOT
from benchmarks.data.datasets import Dataset, embed_by, embed_into
from benchmarks.speed.processes import tiny_world
from benchmarks.speed.stored import FILE_PAIRS, Noisy
from benchmarks.speed.vit import vit_b_32
from benchmarks.speed.watch import Watched, watch
from influencespace.config import RunConfig, load_config
from influencespace.data.artifacts import MANIFEST, Manifest, read_manifest
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.data.tars import add_sample, new_tar
from influencespace.engine.session import start_ray
from influencespace.pipeline import STAGES, data_stages
from influencespace.planning import plan

BENCHMARK = Benchmark(seeds=(0,))
SIZES, QUICK_SIZES = (10_000, 100_000, 1_000_000), (2_000, 8_000)
LARGEST = 10_000_000
PICTURE_SHARDS = 2
"""Of Flickr8k's eight: 5,000 pairs."""
MIN_SECONDS = 2.0
"""A stage that takes less at the larger size says nothing of its exponent."""
MAX_MB, MINUTES = 2000, 15
DISK_COPIES = 3.5
"""Of the embeddings, on disk at once: the files that are imported, their chunks, the buckets, and what stages write."""
EXPONENT = 1.05
COST_SHARE = 0.015


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What runs are made of: real pairs to draw from, and the target and test set that a run embeds itself."""

    noisy: Noisy
    encoder: str
    target: str
    test: str


def origin(bench: Bench, folder: Path) -> Origin | None:
    """Flickr8k, or a synthetic world and a tiny encoder for a quick run; None where there are no real data."""
    if bench.quick:
        encoder = tiny_world(folder / "world", pool=400, shard_size=100, steps=20)
        write_world(folder / "sets", WorldConfig(pretrain=0, pool=0, target=60, test=60))
        pool = embed_into(folder / "base", str(folder / "world" / "pool"), encoder)
        return Origin(
            noisy=Noisy.of(pool),
            encoder=encoder,
            target=str(folder / "sets" / "target"),
            test=str(folder / "sets" / "test"),
        )
    if bench.data is None or not (bench.data / "flickr8k").is_dir():
        print("skipped: set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        return None
    dataset, dev = Dataset.of(bench), bench.data / "flickr8k" / "dev"
    return Origin(
        noisy=Noisy.of(dataset.pool),
        encoder=dataset.encoder,
        target=str(dev / "00000.tar"),
        test=str(dev / "00001.tar"),
    )


def measure(pairs: int, of: Origin, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One run of so many pairs in a folder that is removed again: what it took, and each stage."""
    embeddings = folder / f"embeddings-{pairs}"
    try:
        imported = of.noisy.write(embeddings, pairs)
        found = run_of({"embeddings": str(embeddings)}, of, folder / f"run-{pairs}", settings)
        return {"pairs": pairs, **found, "whole": found["whole"] | {"imported_mb": imported / 1e6}}
    finally:
        shutil.rmtree(embeddings, ignore_errors=True)


def run_of(pool: dict[str, str], of: Origin, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One run by the command line, whose folder is removed again: what it took, and each stage."""
    try:
        options = {**pool, **{name: getattr(of, name) for name in ("target", "test", "encoder")}, "out": out}
        command = [sys.executable, "-m", "influencespace.cli", "run"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        watched = watch(command, os.environ | {"PYTHONPATH": path}, out.with_suffix(".log"))
        whole = watched.between(0, math.inf) | {"seconds": watched.seconds, "disk_mb": size_of(out) / 1e6}
        return {"whole": whole, "stages": of_stages(out, watched)}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def of_stages(out: Path, watched: Watched) -> dict[str, dict[str, Any]]:
    """Seconds of each stage from its manifest, what its processes took between its beginning and its end, and its bytes."""
    known: dict[str, dict[str, Any]] = {}
    for name in stage_names(load_config(out / "config.yaml")):
        manifest = read_manifest(out / name)
        assert manifest is not None, f"{out} has no finished {name}"
        ended = (out / name / MANIFEST).stat().st_mtime
        known[name] = {
            "seconds": manifest.seconds,
            **watched.between(ended - manifest.seconds, ended),
            "rows": manifest.rows_in,
            "disk_mb": size_of(out / name) / 1e6,
            "reads_mb": sum(known[one]["disk_mb"] for one in inputs_of(manifest, known)),
        }
    return known


def inputs_of(manifest: Manifest, known: dict[str, Any]) -> set[str]:
    """The stages whose artifacts a stage reads; all after the split read the pool."""
    pool = {"embed/pool"} if not manifest.stage.startswith("embed/") else set()
    return (set(manifest.inputs) | pool) & set(known)


def stage_names(config: RunConfig) -> list[str]:
    return [str(stage.name) for stage in (*data_stages(config), *STAGES)]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def results(bench: Bench, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """A run of each size, from the cache where it was measured before; none where there are no data."""
    bench.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scale-", dir=bench.cache) as name:
        of = origin(bench, Path(name))
        if of is None:
            return []
        run = partial(measure, of=of, folder=Path(name), settings=settings_of(bench))
        return [bench.cached(["scale", bench.quick, pairs], partial(run, pairs)) for pairs in sizes]


def settings_of(bench: Bench) -> dict[str, Any]:
    """What is set beside the defaults."""
    return bench.pick({}, {"train.seeds": "[0]"})


def exponent(small: tuple[int, float], large: tuple[int, float]) -> float:
    """The power of the number of pairs by which an amount grows between two sizes."""
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])


def rows_of(bench: Bench, result: dict[str, Any]) -> None:
    """The run as a whole, then each stage."""
    bench.row(run="whole", pairs=result["pairs"], **result["whole"])
    for stage, cells in result["stages"].items():
        bench.row(stage=stage, pairs=result["pairs"], **cells)


@BENCHMARK.part
def runs(bench: Bench) -> None:
    """Seconds, memory and bytes by size, and the exponents between sizes."""
    done = results(bench, bench.pick(SIZES, QUICK_SIZES))
    for result in done:
        rows_of(bench, result)
    if not done:
        return
    powers = []
    for small, large in itertools.pairwise(done):
        for stage, cells in large["stages"].items():
            seconds = small["stages"][stage]["seconds"], cells["seconds"]
            if seconds[1] < MIN_SECONDS or not seconds[0]:
                continue
            power = exponent((small["pairs"], seconds[0]), (large["pairs"], seconds[1]))
            bench.row(of=stage, between=f"{small['pairs']:,} and {large['pairs']:,}", exponent=power)
            powers.append(power)
    bench.target("largest exponent of a stage's seconds", wanted.at_most(EXPONENT), max(powers, default=None))
    peaks = [result["whole"]["peak_mb"] for result in done]
    bench.target("largest unshared memory of any process, MB", wanted.at_most(MAX_MB), max(peaks))
    what = f"the same, {done[-1]['pairs']:,} pairs against {done[-2]['pairs']:,} (ratio)"
    bench.target(what, wanted.at_most(1.1), peaks[-1] / peaks[-2])
    minutes = done[-1]["whole"]["seconds"] / 60
    bench.target(f"minutes of a run of {done[-1]['pairs']:,} pairs", wanted.at_most(MINUTES), minutes)


@BENCHMARK.part
def ten_million(bench: Bench) -> None:
    """The largest size once: hours, and tens of gigabytes of disk."""
    pairs, dimension = bench.pick((LARGEST, 512), (FILE_PAIRS // 5, 64))
    bench.cache.mkdir(parents=True, exist_ok=True)
    needed, free = DISK_COPIES * pairs * 4 * dimension, shutil.disk_usage(bench.cache).free
    if needed > free:
        print(
            f"skipped: {bench.cache} has {free / 1e9:.0f} GB free of the {needed / 1e9:.0f} GB that this needs"
        )
        return
    for result in results(bench, (pairs,)):
        rows_of(bench, result)


@BENCHMARK.part
def cost(bench: Bench) -> None:
    """What all that comes after embedding takes, beside embedding the same pairs with a CLIP ViT-B/32."""
    done = results(bench, bench.pick(SIZES, QUICK_SIZES)[-1:])
    for result in done:
        after = sum(
            cells["seconds"] for stage, cells in result["stages"].items() if not stage.startswith("embed/")
        )
        ours, theirs = after / result["pairs"], embedding_seconds(bench)
        bench.row(
            pairs=result["pairs"],
            seconds_after_embedding=after,
            ms_a_pair=1e3 * ours,
            embedding_ms_a_pair=1e3 * theirs,
        )
        what = f"all after embedding, as a share of embedding with a ViT-B/32 ({result['pairs']:,} pairs)"
        bench.target(what, wanted.at_most(COST_SHARE), ours / theirs)


@BENCHMARK.part
def planned(bench: Bench) -> None:
    """What `plan` says of runs before they run, of the two larger pools of embeddings and of one of photographs, beside what they
    took."""
    sizes = bench.pick(SIZES, QUICK_SIZES)[1:]
    done = {f"{one['pairs']:,} stored pairs": one for one in results(bench, sizes)}
    if not done:
        return
    done["photographs"] = bench.cached(["photographs", bench.quick], partial(photographs, bench))
    said = bench.cached(["planned", bench.quick], partial(plans, bench, sizes))
    for name, result in done.items():
        stages = said[name]
        took = {stage: cells["seconds"] for stage, cells in result["stages"].items()}
        for stage in took:
            bench.row(stage=stage, run=name, planned_seconds=stages[stage], seconds=took[stage])
        ratio = sum(stages.values()) / sum(took.values())
        bench.row(run=name, planned_seconds=sum(stages.values()), seconds=sum(took.values()), ratio=ratio)
        bench.target(f"plan's error, {name}", wanted.at_most(0.3), max(ratio, 1 / ratio) - 1)


def pictures_of(bench: Bench, of: Origin) -> list[str]:
    """Some shards of pictures."""
    if bench.quick:
        return [str(Path(of.encoder).parent / "pool")]
    assert bench.data is not None, "there were runs, so there are data"
    return [str(path) for path in sorted((bench.data / "flickr8k" / "pool").glob("*.tar"))[:PICTURE_SHARDS]]


def photographs(bench: Bench) -> dict[str, Any]:
    """A run that embeds its pool."""
    with tempfile.TemporaryDirectory(prefix="photographs-", dir=bench.cache) as name:
        of = origin(bench, Path(name))
        assert of is not None, "there were runs, so there are data"
        return run_of({"data": ",".join(pictures_of(bench, of))}, of, Path(name) / "run", settings_of(bench))


def plans(bench: Bench, sizes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Seconds of each stage by `plan`, of the runs that are measured; larger pools by the data of the smallest."""
    with tempfile.TemporaryDirectory(prefix="plan-", dir=bench.cache) as name, start_ray() as engine:
        folder = Path(name)
        of = origin(bench, folder)
        assert of is not None, "there were runs, so there are data"
        of.noisy.write(folder / "embeddings", sizes[0])
        common = {
            "data.target": of.target,
            "data.test": of.test,
            "embed.encoder": of.encoder,
            **settings_of(bench),
        }
        stored = load_config(None, {**common, "data.embeddings": str(folder / "embeddings")})
        pictures = load_config(None, {**common, "data.pool": pictures_of(bench, of)})
        limit = bench.pick(None, 1000)
        made = {
            f"{pairs:,} stored pairs": plan(stored, limit, engine, folder, pairs=pairs) for pairs in sizes
        }
        made["photographs"] = plan(pictures, limit, engine, folder)
        return {run: {cost.stage: cost.seconds or 0.0 for cost in one.costs} for run, one in made.items()}


def embedding_seconds(bench: Bench) -> float:
    """Seconds a pair of one image and one caption, by the embed stage with a ViT-B/32 of random weights, all cores, without
    start-up."""
    with tempfile.TemporaryDirectory(prefix="vit-") as name, start_ray() as engine:
        folder = Path(name)
        shards, captions = some_images(folder / "images", bench, bench.pick(600, 100))
        encoder = vit_b_32(folder / "encoder", captions, tiny=bench.quick)
        details = embed_by(engine, folder / "run", shards, encoder).details
        return 1 / float(details["pairs_per_second"])


def some_images(folder: Path, bench: Bench, count: int) -> tuple[str, list[str]]:
    """The first images of the real data, or synthetic ones, as shards, each with one caption; and these captions."""
    source = folder / "world" / "pool"
    if bench.data is not None and (bench.data / "flickr8k").is_dir():
        source = bench.data / "flickr8k" / "dev"
    else:
        write_world(source.parent, WorldConfig(pretrain=0, pool=count, target=0, test=0))
    found = (
        item for shard in list_shards(str(source)) for item in read_shard(shard) if isinstance(item, Sample)
    )
    (folder / "shards").mkdir(parents=True)
    captions = []
    for number in range(count // 50):
        with new_tar(folder / "shards" / f"{number:05d}.tar") as tar:
            for row, sample in zip(range(50), found):
                captions.append(sample.captions[0])
                files = {"jpg": sample.image, "txt": captions[-1].encode()}
                add_sample(tar, f"{number:05d}{row:04d}", files)
    return str(folder / "shards"), captions
