"""The k-means of the cluster stage against faiss and scikit-learn: inertia, seconds and unshared memory, on the same rows.

Each works in a process of its own on all cores: centroids are fitted, then every row is labelled. Rivals are given the rows in
memory, ours reads them from the file. The inertia is that of the partition: rows against the mean of their cluster.
"""

import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.data.datasets import Dataset
from benchmarks.speed.processes import last_line_of
from benchmarks.speed.stored import Noisy
from influencespace.core.arrays import IntArray
from influencespace.core.kmeans import nearest
from influencespace.data.buckets import buckets_of
from influencespace.engine.local import LocalEngine
from influencespace.stages.scoring.cluster import FoldWorker, KMeans
from influencespace.stages.scoring.cluster_config import ClusterConfig

BENCHMARK = Benchmark(seeds=(0,))
Matrix = NDArray[np.float32]
BLOCK = 16_384
OURS = "influencespace"


@dataclass(frozen=True)
class Stored:
    """Unit rows in a file of float32, read where they are used."""

    path: Path
    rows_in_file: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        width = self.path.stat().st_size // 4 // self.rows_in_file
        flat = np.fromfile(self.path, np.float32, (stop - start) * width, offset=4 * start * width)
        return torch.from_numpy(flat.reshape(-1, width))


def by_ours(data: Stored, k: int, seed: int) -> IntArray:
    """The stage's k-means in the plain loop."""
    kmeans = KMeans.of(data, data.rows_in_file, ClusterConfig(k=k), seed)
    with LocalEngine().pool(FoldWorker(data)) as pool:
        centroids = kmeans.fit(pool)
    spans = kmeans.spans(0, data.rows_in_file)
    return np.concatenate([nearest(data.rows(*span), centroids)[0].numpy() for span in spans])


def by_faiss(data: Matrix, k: int, seed: int) -> IntArray:
    """faiss.Kmeans as it is by default: 25 iterations on 256 rows a cluster."""
    import faiss

    kmeans = faiss.Kmeans(data.shape[1], k, seed=seed + 1)
    kmeans.train(data)
    labels: IntArray = kmeans.index.search(data, 1)[1][:, 0]
    return labels


def by_scikit_learn(data: Matrix, k: int, seed: int) -> IntArray:
    """MiniBatchKMeans as it is by default."""
    from sklearn.cluster import MiniBatchKMeans

    labels: IntArray = MiniBatchKMeans(k, random_state=seed, n_init=1).fit(data).labels_.astype(np.int64)
    return labels


RIVALS: dict[str, Callable[[Matrix, int, int], IntArray]] = {
    "faiss": by_faiss,
    "scikit-learn": by_scikit_learn,
}


def unshared_mb() -> float:
    """Memory of this process that no file backs."""
    (size,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(size) / 1024


@contextmanager
def peak_unshared(every: float = 0.02) -> Iterator[list[float]]:
    """A list that holds the largest unshared memory of this process so far."""
    peak, over = [unshared_mb()], threading.Event()

    def watch() -> None:
        while not over.wait(every):
            peak[0] = max(peak[0], unshared_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def inertia(data: Stored, label: IntArray, k: int) -> float:
    """The sum of squared distances of the rows to the means of their clusters."""
    count, squares = np.bincount(label, minlength=k), 0.0
    total = torch.zeros(k, data.rows(0, 1).shape[1], dtype=torch.float64)
    for start, stop in buckets_of(data.rows_in_file, BLOCK):
        rows = data.rows(start, stop).double()
        total.index_add_(0, torch.from_numpy(label[start:stop]), rows)
        squares += float(rows.square().sum())
    return squares - float((total.square().sum(1).numpy()[count > 0] / count[count > 0]).sum())


def measure(method: str, path: Path, rows: int, k: int, seed: int) -> dict[str, float]:
    """One method, in this process."""
    data = Stored(path, rows)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    given = data.rows(0, rows).numpy() if method in RIVALS else None
    with peak_unshared() as peak:
        began = time.monotonic()
        label = by_ours(data, k, seed) if given is None else RIVALS[method](given, k, seed)
        seconds = time.monotonic() - began
    return {"inertia": inertia(data, label, k), "seconds": seconds, "unshared_mb": peak[0]}


def compare(bench: Bench, part: str, blocks: Iterator[Matrix], k: int) -> None:
    """All methods on the rows of some blocks, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        path, rows = Path(folder) / "rows", 0
        with path.open("wb") as file:
            for block in blocks:
                block.tofile(file)
                rows += len(block)
        found: dict[str, dict[str, float]] = {}
        for method in (OURS, *RIVALS):
            line = last_line_of("benchmarks.speed.kmeans", method, str(path), str(rows), str(k), "0")
            found[method] = json.loads(line)
            dimension = path.stat().st_size // 4 // rows
            bench.row(method=method, pairs=rows, dimension=dimension, clusters=k, **found[method])
    ours, rivals = found[OURS], [found[name] for name in RIVALS]
    best = min(one["inertia"] for one in rivals)
    quickest = min(one["seconds"] for one in rivals if one["inertia"] <= 1.01 * best)
    asked = wanted.at_most(1.01)
    bench.target(
        f"inertia of k-means over the better of faiss and scikit-learn ({part})",
        asked,
        ours["inertia"] / best,
    )
    what = f"time of k-means over the quickest of those within 1 % of the better ({part})"
    bench.target(what, wanted.at_most(1), ours["seconds"] / quickest)
    what = f"unshared memory of k-means over faiss's ({part})"
    bench.target(what, wanted.at_most(0.2), ours["unshared_mb"] / found["faiss"]["unshared_mb"])


def unit(rows: NDArray[Any]) -> Matrix:
    scaled: Matrix = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def mixed(rows: int, dimension: int, centres: int) -> Iterator[Matrix]:
    """Unit rows about topics of very unequal size, which lie in themes; half of a row's square is noise."""
    generator = np.random.default_rng(0)
    themes = unit(generator.standard_normal((max(2, centres // 20), dimension)))
    topics = unit(generator.standard_normal((centres, dimension)))
    topics = unit(topics + themes[generator.integers(len(themes), size=centres)])
    share = generator.dirichlet(np.full(centres, 0.5))
    for start, stop in buckets_of(rows, BLOCK):
        noise = generator.standard_normal((stop - start, dimension), np.float32) / dimension**0.5
        yield unit(topics[generator.choice(centres, stop - start, p=share)] + noise)


@BENCHMARK.part
def synthetic(bench: Bench) -> None:
    """A mixture of three times as many topics as clusters."""
    rows, dimension, k = bench.pick((1_000_000, 512, 1000), (20_000, 64, 100))
    compare(bench, "synthetic", mixed(rows, dimension, 3 * k), k)


@BENCHMARK.part
def real(bench: Bench) -> None:
    """Embeddings of photographs with noise, where there are any."""
    if bench.data is None or not (bench.data / "flickr8k").is_dir():
        print("skipped: set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        return
    rows, k = bench.pick((1_000_000, 1000), (20_000, 100))
    compare(bench, "real", noisy(Noisy.of(Dataset.of(bench).pool), rows), k)


def noisy(pairs: Noisy, rows: int) -> Iterator[Matrix]:
    """So many rows made of the images of real pairs."""
    for number, (start, stop) in enumerate(buckets_of(rows, BLOCK)):
        generator = np.random.default_rng(number)
        rows_of = generator.integers(len(pairs.images), size=stop - start)
        yield unit(pairs.noisy(pairs.images, rows_of, generator).astype(np.float32))


if __name__ == "__main__":  # the process of one method
    _method, _path, _rows, _k, _seed = sys.argv[1:]
    print(json.dumps(measure(_method, Path(_path), int(_rows), int(_k), int(_seed))))
