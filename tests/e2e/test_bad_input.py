"""Dirty shards: the run ends well, every bad pair is listed with its reason, everything else is there."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import run_here

pytestmark = pytest.mark.e2e


def png_bomb(side: int) -> bytes:
    """A PNG that says it is side x side pixels, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def one_jpeg(world: Path) -> bytes:
    with tarfile.open(sorted((world / "pool").glob("*.tar"))[0]) as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


def test_five_bad_samples_are_listed_and_the_rest_is_curated(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    for shard in (world / "pool").glob("*.tar"):
        (pool / shard.name).write_bytes(shard.read_bytes())
    jpeg = one_jpeg(world)
    write_tar(
        pool / "bad.tar",
        {
            "cut": {"jpg": jpeg[: len(jpeg) // 2], "txt": b"a cut picture", "json": b'{"uid": "cut"}'},
            "empty": {"jpg": jpeg, "txt": b"  ", "json": b'{"uid": "empty"}'},
            "text": {"jpg": b"this is no picture", "txt": b"a text", "json": b'{"uid": "text"}'},
            "bomb": {"png": png_bomb(50_000), "txt": b"a bomb", "json": b'{"uid": "bomb"}'},
            "good": {"jpg": jpeg, "txt": b"a good pair <b>&", "json": b'{"uid": "good"}'},
        },
    )
    write_tar(tmp_path / "whole.tar", {"lost": {"jpg": jpeg, "txt": b"lost", "json": b'{"uid": "lost"}'}})
    whole = (tmp_path / "whole.tar").read_bytes()
    (pool / "truncated.tar").write_bytes(whole[: 512 + len(jpeg) // 2])

    out = tmp_path / "run"
    summary = run_here(world, out, data__pool=str(pool))
    rejected = pq.read_table(out / "embed" / "pool" / "rejected.parquet").to_pydict()
    assert len(rejected["uid"]) == 5, rejected
    assert summary["rejected"]["pool"] == 5
    assert {"cut", "empty", "text", "bomb"} <= set(rejected["uid"])
    assert all(rejected["reason"])
    assert sum(summary["rejected_reasons"].values()) == 5
    assert summary["rows"]["pool"] == 301
    uids = pq.read_table(out / "curated.parquet")["uid"].to_pylist()
    assert "good" in uids
    assert "Traceback" not in capsys.readouterr().err
