"""Big inputs take bounded memory: each is read in a process of its own, whose peak is compared with the declared bound."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from influencespace.data.images import decoding_bytes

READ = r"""
import re, sys
from influencespace.data.images import RejectedImage, decode_image, sharpness
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample
def peak():  # not ru_maxrss, which begins with what the parent had when it forked
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
before = peak()
samples = rejected = 0
held = []
for shard in list_shards(sys.argv[1]):
    for result in read_shard(shard):
        if isinstance(result, Sample):
            samples += 1
            if sys.argv[2] == "decode":
                held.append(decode_image(result.image, near=224))
                sharpness(held[-1])
        else:
            rejected += 1
print(samples, rejected, (peak() - before) / 1024)
"""
MB = 2**20


def peak(path: Path, how: str = "read") -> tuple[int, int, float]:
    """Samples, rejections, and MB beyond what Python and its libraries take."""
    command = [sys.executable, "-c", READ, str(path), how]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    samples, rejected, peak_mb = output.split()
    return int(samples), int(rejected), float(peak_mb)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def photographs(folder: Path) -> Path:
    """64 JPEGs of 24 megapixels: a batch of them took 6.5 GB."""
    cells = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((6000, 4000)).save(buffer, "JPEG")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(64):
            add(tar, f"{i}.jpg", buffer.getvalue() + bytes([i]))
            add(tar, f"{i}.txt", b"a photograph")
    return folder / "0.tar"


def long_captions(folder: Path) -> Path:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(4):
            add(tar, f"{i}.jpg", b"image %d" % i)
            add(tar, f"{i}.txt", 10 * MB * b"x")
    return folder / "0.tar"


def dictionary(folder: Path) -> Path:
    """600 captions of a megabyte, different in four characters: less than a megabyte on disk."""
    texts = [f"{i:04d}" + MB * "x" for i in range(600)]
    table = pa.table({"jpg": [b"image %d" % i for i in range(600)], "txt": texts})
    how = {"dictionary_pagesize_limit": 2**31 - 1, "compression": "zstd", "use_dictionary": ["txt"]}
    pq.write_table(table, folder / "0.parquet", **how)
    assert (folder / "0.parquet").stat().st_size < MB
    return folder / "0.parquet"


def one_entry(folder: Path) -> Path:
    """600 rows with the one caption of a dictionary."""
    table = pa.table({"jpg": [b"image %d" % i for i in range(600)], "txt": [MB * "x"] * 600})
    pq.write_table(table, folder / "0.parquet", dictionary_pagesize_limit=2**31 - 1)
    return folder / "0.parquet"


def long_values(folder: Path, rows: int, megabytes: int, in_a_page: int) -> Path:
    """Captions of so many megabytes in one row group, some in each page; a few kilobytes on disk."""
    table = pa.table(
        {
            "jpg": [b"image %d" % i for i in range(rows)],
            "txt": [f"{i}" + megabytes * MB * "x" for i in range(rows)],
        }
    )
    how = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, folder / "0.parquet", write_batch_size=in_a_page, **how)
    return folder / "0.parquet"


def large_page(folder: Path) -> Path:
    """32 of 200 MB, some in a page, took 2.4 GB."""
    return long_values(folder, 12, 20, in_a_page=6)


def values_below_the_limit(folder: Path) -> Path:
    return long_values(folder, 12, 40, in_a_page=1)


def many_members(folder: Path) -> Path:
    """300,000 empty pictures; the headers of all were kept, in 1.75 GB for a million."""
    header = bytearray(tarfile.TarInfo("0000000.jpg").tobuf(tarfile.USTAR_FORMAT))
    checksum = sum(header[:148]) + sum(header[156:]) + 8 * 32 - 7 * ord("0")
    with (folder / "0.tar").open("wb") as file:
        for i in range(300_000):
            name = b"%07d" % i
            header[:7] = name
            header[148:155] = b"%06o\0" % (checksum + sum(name))
            file.write(header)
        file.write(bytes(1024))
    return folder / "0.tar"


def many_captions(folder: Path) -> Path:
    """A list of captions as long as a JSON may be."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(3):
            add(tar, f"{i}.jpg", b"image %d" % i)
            add(tar, f"{i}.json", b'{"captions": [' + 499_000 * b'"a",' + b'"a"]}')
        add(tar, "9.jpg", b"image")
        add(tar, "9.json", b'{"captions": [' + 3_900_000 * b'"a",' + b'"a"]}')
    return folder / "0.tar"


@pytest.mark.parametrize(
    ("make", "samples", "rejected", "limit_mb"),
    [
        (long_captions, 4, 0, 100),
        pytest.param(dictionary, 0, 1, 100, marks=pytest.mark.slow),
        (one_entry, 600, 0, 400),
        (large_page, 0, 1, 100),
        (values_below_the_limit, 12, 0, 400),
        (many_captions, 3, 4, 200),
        pytest.param(many_members, 0, 300_000, 100, marks=pytest.mark.slow),
    ],
)
def test_big_texts_take_bounded_memory(
    make: Callable[[Path], Path], samples: int, rejected: int, limit_mb: int, tmp_path: Path
) -> None:
    found = peak(make(tmp_path))
    assert found[:2] == (samples, rejected)
    assert found[2] < limit_mb


@pytest.mark.slow
def test_photographs_of_24_megapixels_take_what_is_declared(tmp_path: Path) -> None:
    one, held = decoding_bytes(6000 * 4000, near=224)
    found = peak(photographs(tmp_path), "decode")
    assert found[:2] == (64, 0)
    assert found[2] < (one + 64 * held) / MB
    assert found[2] < 1000
