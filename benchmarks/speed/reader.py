"""Our reader against a bare loop of tarfile and Pillow, and against ray.data.read_webdataset, on the same tars and one core.

All decode every picture to RGB. Ours also parses and judges captions and uids, and takes the sharpness of each picture; the bare
loop only reads the bytes. They run in turn, in this process; Ray has one logical CPU and is begun before its time counts.
"""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import ray
from PIL import Image

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from influencespace.data.images import decode_image, sharpness
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
from influencespace.data.synthetic import WorldConfig, write_world

BENCHMARK = Benchmark(seeds=(0,))
NEAR = 224


def bare(tars: Sequence[str]) -> int:
    """Pictures that tarfile and Pillow alone read and decode."""
    images = 0
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if member.name.endswith(".jpg"):
                    Image.open(io.BytesIO(data)).convert("RGB")
                    images += 1
    return images


def ours(tars: Sequence[str], sharp: bool) -> int:
    """Pictures that our reader gives, decoded near an encoder's size."""
    images = 0
    for shard in list_shards(tars):
        for sample in read_shard(shard):
            if isinstance(sample, Sample):
                picture = decode_image(sample.image, near=NEAR)
                if sharp:
                    sharpness(picture)
                images += 1
    return images


def by_ray(tars: Sequence[str]) -> int:
    """Pictures that Ray Data's reader gives, decoded."""
    data = ray.data.read_webdataset(list(tars), suffixes=["jpg", "txt"])
    return sum(len(batch["__key__"]) for batch in data.iter_batches(batch_size=64))


def rate(read: Callable[[], int]) -> float:
    """Images a second."""
    began = time.monotonic()
    images = read()
    return images / (time.monotonic() - began)


def compared(bench: Bench, name: str, folder: Path, rounds: int) -> None:
    """All readers in turn, on the tars of a folder."""
    tars = sorted(map(str, folder.glob("*.tar")))
    readers: dict[str, Callable[[], int]] = {
        "bare": lambda: bare(tars),
        "ours": lambda: ours(tars, sharp=False),
        "ours_with_sharpness": lambda: ours(tars, sharp=True),
        "ray": lambda: by_ray(tars),
    }
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        counts = {reader: read() for reader, read in readers.items()}  # also fills the page cache
        if len(set(counts.values())) > 1:
            raise RuntimeError(f"the readers disagree about how many pictures there are: {counts}")
        rates = [{reader: rate(read) for reader, read in readers.items()} for _ in range(rounds)]
    finally:
        ray.shutdown()
    for turn, measured in enumerate(rates):
        bench.row(pictures=name, turn=turn, images_a_second=measured)
    for other, reader, goal in (
        ("bare", "ours", wanted.at_least(1.0)),
        ("bare", "ours_with_sharpness", wanted.at_least(1.0)),
        ("ray", "ours_with_sharpness", wanted.at_least(1.0)),
    ):
        ratios = [measured[reader] / measured[other] for measured in rates]
        what = f"images a second, {reader} against {other} ({name}, median)"
        bench.target(what, goal, median(ratios), (min(ratios), max(ratios)))


@BENCHMARK.part
def synthetic(bench: Bench) -> None:
    """Small drawn scenes: most of the work is reading."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pool = bench.pick(4000, 400)
        write_world(folder, WorldConfig(pretrain=0, pool=pool, target=0, test=0, shard_size=pool // 4))
        compared(bench, "synthetic", folder / "pool", bench.pick(5, 1))


@BENCHMARK.part
def real(bench: Bench) -> None:
    """Photographs of Flickr8k at 192 x 192, where there are any."""
    if bench.data is None or not (bench.data / "flickr8k").is_dir():
        print("skipped: set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        return
    compared(bench, "real", bench.data / "flickr8k" / "dev", bench.pick(5, 1))
