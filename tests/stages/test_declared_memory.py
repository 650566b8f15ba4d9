"""Tasks hold no more than they declare: each runs in a process of its own, whose peak is compared with the bound."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influencespace.data.buckets import WriteBucket
from influencespace.data.chunks import ChunkFolder, pair_row, table_of, write_chunk
from influencespace.data.imported import list_chunks
from influencespace.data.imported.files import ImportOptions
from influencespace.data.merge import MergeBucket, MergeRun, merge_bytes
from influencespace.data.pair_set import PairSet
from influencespace.data.schema import ImageRef
from influencespace.engine.placement import LIBRARY_BYTES, WORKER_BYTES
from influencespace.stages.ingest.imports import CHUNK_PAIRS, ImportFile, import_bytes
from influencespace.stages.scoring.fairness import FitForGroups, features_bytes
from tests.planted import plant

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc"),
]
RUN = r"""
import pickle, re, sys
import torch
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    task = pickle.load(file)
if sys.argv[2] == "do":
    task()
print(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]))
"""
DIMENSION = 256


def peak_of(task: Callable[[], Any], folder: Path, what: str = "do") -> int:
    """Bytes of a process that loads torch and all modules of a task, and does it."""
    path = folder / "task.pickle"
    path.write_bytes(pickle.dumps(task))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), what], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def check(task: Callable[[], Any], folder: Path, bound: int) -> None:
    """A task holds less beside its libraries than is declared beside them, but not so much less that this says nothing."""
    nothing, peak = peak_of(task, folder, "nothing"), peak_of(task, folder)
    print(f"peak {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB, libraries {nothing / 1e6:.0f} MB")
    assert nothing < LIBRARY_BYTES
    assert peak - nothing < bound - LIBRARY_BYTES < 6 * (peak - nothing)


def write_chunks(folder: ChunkFolder, pairs: int, dimension: int) -> ChunkFolder:
    drawn = np.random.default_rng(0)
    size, starts = 8192, range(0, pairs, 8192)
    for number, start in enumerate(starts):
        rows = [
            pair_row(
                shard="/data/a-usual-name/of-a-shard-000123.tar",
                uid=f"{i:032x}",
                own=True,
                caption=f"a picture of something, the {i}th, in a street with trees and {i % 97} people",
                image=b"%016d" % i,
                text=b"%016d" % i,
                ref=ImageRef(path="/data/a-usual-name/of-a-shard-000123.tar", offset=i, length=1000),
                group=None,
            )
            | {"truncated": False}
            for i in range(start, min(start + size, pairs))
        ]
        vectors = [drawn.normal(size=(len(rows), dimension)).astype(np.float32) for _ in range(2)]
        write_chunk(folder.chunk(number), table_of(rows), vectors[0], vectors[1])
    folder.close(len(starts), pairs)
    return folder


@pytest.mark.parametrize("provided", [False, True])
def test_a_bucket_is_merged_in_what_is_declared(tmp_path: Path, provided: bool) -> None:
    pairs = 60_000
    chunks = write_chunks(ChunkFolder(tmp_path / "chunks"), pairs, DIMENSION).chunks
    without = write_chunks(ChunkFolder(tmp_path / "pairs"), pairs, 0).chunks if provided else chunks
    (tmp_path / "out").mkdir()
    given = chunks if provided else None
    merge = MergeBucket(folder=tmp_path / "out", number=0, count=1, chunks=without, provided=given)
    check(merge, tmp_path, LIBRARY_BYTES + merge_bytes(pairs, DIMENSION, provided))
    assert merge()[1].buckets == [pairs]


def test_a_run_of_chunks_is_merged_in_what_is_declared(tmp_path: Path) -> None:
    chunks = write_chunks(ChunkFolder(tmp_path / "chunks"), 60_000, DIMENSION).chunks
    run = MergeRun(chunks=chunks, out=tmp_path / "run.arrow")
    check(run, tmp_path, LIBRARY_BYTES + merge_bytes(60_000, DIMENSION))


def test_embeddings_are_imported_in_what_is_declared(tmp_path: Path) -> None:
    pairs = CHUNK_PAIRS + 2000
    drawn = np.random.default_rng(0)
    kind = pa.list_(pa.float32(), DIMENSION)
    columns: dict[str, Any] = {
        name: pa.FixedSizeListArray.from_arrays(
            pa.array(drawn.normal(size=pairs * DIMENSION).astype(np.float32)), type=kind
        )
        for name in ("image_embedding", "text_embedding")
    }
    columns |= {
        "uid": [f"{i:032x}" for i in range(pairs)],
        "caption": [f"a picture of {i}" for i in range(pairs)],
    }
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    (source,) = list_chunks(str(tmp_path / "pairs.parquet"))
    options = ImportOptions(batch_rows=CHUNK_PAIRS)
    task = ImportFile(source=source, options=options, chunks=ChunkFolder(tmp_path / "chunks"))
    check(task, tmp_path, import_bytes(DIMENSION))
    assert task.chunks.rows == pairs


def test_the_fit_for_groups_takes_what_is_declared(tmp_path: Path) -> None:
    plant(tmp_path / "pool", 20_000, dimension=DIMENSION, bucket_size=20_000)
    pool = PairSet(tmp_path / "pool")
    rows = np.arange(len(pool))
    influence = np.random.default_rng(0).normal(size=len(pool))
    WriteBucket(
        folder=tmp_path,
        table="scored",
        start=0,
        stop=len(pool),
        compute=lambda start, stop: {"pair": rows, "influence": influence},
    )()
    task = FitForGroups(pool=pool, folder=tmp_path, starts=(0,))
    check(task, tmp_path, features_bytes(pool, len(pool)))


def test_libraries_take_less_than_is_declared(tmp_path: Path) -> None:
    nothing = peak_of(int, tmp_path)
    assert nothing < LIBRARY_BYTES < WORKER_BYTES
