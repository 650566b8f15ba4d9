"""Embedding: any shards, any engine, any interruption give the same artifact, and nothing disappears."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from embedding import (
    PLACES,
    POOL,
    SMALL,
    FakeEncoder,
    assert_same,
    calls,
    chunks,
    jpeg,
    run,
    sample,
    write_tar,
    write_world,
)
from PIL import Image

from influencespace.config import load_config
from influencespace.data.artifacts import read_manifest
from influencespace.data.embeddings import EmbeddingTable, read_rejected
from influencespace.data.merge import RUN_ROWS, chunks_of_run
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards
from influencespace.data.uids import digest
from influencespace.engine.local import Engine, LocalEngine
from influencespace.engine.placement import Machine
from influencespace.errors import InputError
from influencespace.models.encode import EncodePass
from influencespace.run import Run, carry_out
from influencespace.stages.ingest import decode, embed, encode
from influencespace.stages.ingest.embed import Embed
from influencespace.stages.ingest.shards import shard_identities


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Two shards, and what the plain loop makes of them."""
    folder = tmp_path_factory.mktemp("world")
    data = write_world(folder / "data", 2)
    run(data, folder / POOL)
    return data, folder / POOL


def test_the_artifact_is_whole_and_in_canonical_order(world: tuple[str, Path]) -> None:
    table = EmbeddingTable.open(world[1])
    assert len(table) == 2 * (18 + 3 + 1)
    assert len(table.manifest.details["buckets"]) == 5  # of some ten rows
    assert pq.read_schema(world[1] / "bucket-00000" / "pairs.parquet").names == [
        *("uid", "image", "text", "caption", *PLACES, "group", "clip_score", "truncated", "sharpness")
    ]
    uids = table.pairs("uid")["uid"].to_pylist()
    keys = [(digest(uid.partition("~")[0].encode()), uid) for uid in uids]
    assert keys == sorted(set(keys))  # copies come after the first
    for vectors in PairSet(world[1]).inputs(slice(None)):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    images, texts = table.embeddings(slice(None))
    scores = table.pairs("clip_score")["clip_score"].to_numpy()
    np.testing.assert_allclose(scores, (images * texts).sum(1), atol=1e-3)
    manifest = table.manifest
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (48, 44, 4)
    assert (
        manifest.details["truncated_captions"] == sum(table.pairs("truncated")["truncated"].to_pylist()) > 0
    )
    assert manifest.details["exact_copies"] == 6
    names = {path.relative_to(world[1]).as_posix() for path in world[1].rglob("*") if path.is_file()}
    assert names == {"manifest.json", "rejected.parquet"} | {
        f"bucket-{i:05d}/{name}" for i in range(5) for name in ("pairs.parquet", "vectors.arrow")
    }


def test_every_pair_keeps_its_own_image_and_caption(world: tuple[str, Path]) -> None:
    table = EmbeddingTable.open(world[1])
    pairs = {row["uid"]: row | {"row": i} for i, row in enumerate(table.pairs().to_pylist())}
    encoder = FakeEncoder(world[1].with_suffix(".expected"))
    for number in (1, 5, 17):
        row = pairs[f"own-{number}#1"]
        assert row["caption"].startswith(f"picture {number} seen in way 1")
        image = Image.open(io.BytesIO(jpeg(number)))
        expected = encoder.encode_image(encoder.preprocess_images([image])).numpy()[0]
        stored = table.embeddings(np.array([row["row"]]))[0][0]
        np.testing.assert_allclose(stored, expected, atol=1e-3)
        with Path(row["image_path"]).open("rb") as file:
            file.seek(row["image_offset"])
            assert file.read(row["image_length"]) == jpeg(number)


def test_equal_images_and_captions_of_a_shard_are_embedded_once(tmp_path: Path) -> None:
    run(write_world(tmp_path / "data", 1), tmp_path / POOL)
    assert calls(tmp_path / POOL, "image") == 18 + 1  # of 24, five that repeat others
    assert calls(tmp_path / POOL, "text") == 2 * (18 + 1)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_size_of_buckets_and_chunks_changes_nothing(
    world: tuple[str, Path], tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "CHUNK_IMAGES", size)
    together = 2 if size == 3 else 0  # buckets of runs, or of chunks
    monkeypatch.setattr(embed, "chunks_of_run", lambda rows, chunks, buckets: together)
    manifest = run(world[0], tmp_path / POOL, buckets=size)
    assert len(manifest.details["buckets"]) == -(-48 // size)
    assert_same(tmp_path / POOL, world[1])


def test_chunks_are_merged_into_runs_where_that_is_quicker_and_runs_fit_in_memory() -> None:
    million = 10**6
    assert chunks_of_run(million, 3900, 1) == chunks_of_run(100_000, 390, 2) == 0
    assert chunks_of_run(million, 3900, 10) == 256
    assert chunks_of_run(10 * million, 305, 100) == 0  # 32,768 rows each: quick to open
    assert chunks_of_run(1000 * million, 30_500, 10_000) == 6
    for rows, count in ((10 * million, 39_000), (1000 * million, 30_500), (1000 * million, 3 * million)):
        together = chunks_of_run(rows, count, rows // 100_000)
        assert 0 < together * rows / count <= RUN_ROWS


def test_repeated_uids_are_rejected_and_copies_without_one_are_numbered(world: tuple[str, Path]) -> None:
    rejected = read_rejected(world[1]).to_pylist()
    assert [(row["uid"], row["reason"]) for row in rejected if row["uid"].startswith("own-1#")] == [
        ("own-1#0", "duplicate uid"),
        ("own-1#1", "duplicate uid"),
    ]
    assert sorted(row["uid"] for row in rejected) == ["own-1#0", "own-1#1", "own-3#0", "own-3#1"]
    uids = EmbeddingTable.open(world[1]).pairs("uid")["uid"].to_pylist()
    endings = [uid.partition("~")[2] for uid in uids if "~" in uid]
    assert sorted(endings) == ["1", "1", "1", "1", "2", "2"]
    assert all(uid.partition("~")[0] in uids for uid in uids)


@pytest.mark.parametrize(("shards", "seed"), [(1, None), (2, 3), (7, None), (7, 5)])
def test_shards_and_their_order_change_nothing(
    world: tuple[str, Path], tmp_path: Path, shards: int, seed: int | None
) -> None:
    order = None if seed is None else np.random.default_rng(seed).permutation(24).tolist()
    run(write_world(tmp_path / "data", shards, order), tmp_path / POOL)
    assert_same(tmp_path / POOL, world[1])


def test_batch_size_changes_nothing_and_needs_no_new_run(world: tuple[str, Path], tmp_path: Path) -> None:
    run(world[0], tmp_path / POOL, settings={"embed.batch_size": 64})
    assert_same(tmp_path / POOL, world[1])
    before = calls(tmp_path / POOL, "image")
    run(world[0], tmp_path / POOL, settings={"embed.batch_size": 2})
    assert calls(tmp_path / POOL, "image") == before


class OneGpu(LocalEngine):
    """The plain loop that says it has a GPU."""

    @property
    def machines(self) -> Sequence[Machine]:
        return [Machine(cpus=4, gpus=1)]


def test_on_a_gpu_a_probe_finds_the_batch_once_and_nothing_else_changes(
    world: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[int] = []

    def rate(towers: EncodePass, pixels: np.ndarray, batch: int) -> float:
        probed.append(batch)
        assert towers.device.type == "cuda"
        return {4: 100.0, 8: 190.0, 16: 191.0}[batch]

    monkeypatch.setattr(encode, "image_rate", rate)
    manifest = run(world[0], tmp_path / POOL, OneGpu())
    assert_same(tmp_path / POOL, world[1])
    log = (tmp_path / POOL).with_suffix(".log").read_text().splitlines()
    sizes = [int(line.split()[1]) for line in log if line.startswith("image")]
    assert sizes == [8, 2, 8, 2]
    found = {"image_batch": 8, "images_per_second": {"4": 100.0, "8": 190.0, "16": 191.0}}
    assert manifest.details["probed"] == found
    assert manifest.details["images_per_second_per_gpu"] == manifest.details["images_per_second"] > 0
    assert probed == [4, 8, 16]
    shutil.rmtree(tmp_path / POOL)
    shutil.rmtree(chunks(tmp_path / POOL))
    assert run(world[0], tmp_path / POOL, OneGpu()).details["probed"] == found
    assert probed == [4, 8, 16]


@pytest.mark.ray
def test_ray_equals_the_plain_loop_with_bad_input_too(tmp_path: Path, ray_engine: Engine) -> None:
    data, here, there = tmp_path / "data", tmp_path / "here" / POOL, tmp_path / "there" / POOL
    write_world(data, 2)
    write_bad(data)
    expected = run(str(data), here)
    manifest = run(str(data), there, ray_engine, settings={"embed.num_actors": 2})
    assert_same(here, there)
    assert manifest.details["workers"] >= 1
    assert manifest.details["startup_seconds"] >= 0
    assert manifest.rejected == expected.rejected > 5
    assert read_rejected(there).equals(read_rejected(here))
    assert EmbeddingTable.open(there).pairs().equals(EmbeddingTable.open(here).pairs())


def test_a_finished_stage_is_not_run_again(world: tuple[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in world[1].rglob("*")}
    assert run(*world) == read_manifest(world[1])
    assert before == {path: path.stat().st_mtime_ns for path in world[1].rglob("*")}


def test_a_stopped_run_goes_on_at_its_last_chunk(
    world: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "CHUNK_IMAGES", 2)
    data, out = write_world(tmp_path / "data", 2), tmp_path / POOL
    with pytest.raises(RuntimeError, match="the power is gone"):
        run(data, out, fail_after=9)
    assert read_manifest(out) is None
    done = len(list(chunks(out).glob("*/*.arrow")))
    assert 0 < done < 12
    before = calls(out, "image")
    run(data, out)
    assert calls(out, "image") - before < 24 - 2 * done + 2
    assert_same(out, world[1])
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("fault", [b"", b"ARROW1", None])
def test_lost_and_broken_chunks_are_made_again_and_only_those(tmp_path: Path, fault: bytes | None) -> None:
    data, out = write_world(tmp_path / "data", 3), tmp_path / POOL
    files = run(data, out).files
    embedded = calls(out, "image")
    (out / "manifest.json").unlink()
    lost = sorted(chunks(out).glob("*/*.arrow"))[1]
    lost.unlink() if fault is None else lost.write_bytes(fault)
    assert run(data, out).files == files
    assert 0 < calls(out, "image") - embedded < embedded


def test_a_changed_config_is_embedded_anew(tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 2), tmp_path / POOL
    first = run(data, out)
    second = run(data, out, settings={"embed.dtype": "bfloat16"})
    assert second.fingerprint != first.fingerprint
    third = run(data, out, settings={"embed.read.captions": "first"})
    assert third.rows_out < first.rows_out


def test_changed_data_is_embedded_anew(tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 2), tmp_path / POOL
    first, before = run(data, out), calls(out, "image")
    write_tar(tmp_path / "data" / "1.tar", [sample(77, uid="new")])
    second = run(data, out)
    assert second.inputs["data"] != first.inputs["data"]
    assert calls(out, "image") - before == 1
    uids = EmbeddingTable.open(out).pairs("uid")["uid"].to_pylist()
    assert {"new#0", "new#1"} <= set(uids)


def test_chunks_are_removed_when_they_have_served(tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 1), tmp_path / POOL
    run(data, out, settings={"embed.keep_chunks": False})
    assert {path.name for path in out.iterdir()} == {
        *("manifest.json", "rejected.parquet", *(f"bucket-{i:05d}" for i in range(5)))
    }
    assert not chunks(out).exists()


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from embedding import FakeEncoder, run
note = FakeEncoder.note
FakeEncoder.note = lambda self, kind, count: (note(self, kind, count), time.sleep(0.2))
run(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_killed_process_leaves_what_the_next_one_finishes(world: tuple[str, Path], tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 7), tmp_path / POOL
    command = [sys.executable, "-c", KILLED, data, str(out), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(chunks(out).glob("*/*.arrow")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert read_manifest(out) is None
    before = calls(out, "image")
    run(data, out)
    assert calls(out, "image") - before < 24
    assert_same(out, world[1])


def bomb() -> bytes:
    """A PNG of 50,000 x 50,000 pixels in a few hundred bytes: the header says it all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(50_000)))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


def write_bad(data: Path) -> None:
    """Three shards of good and bad pairs, the first one cut."""

    def good(number: int) -> dict[str, bytes]:
        return {
            "jpg": jpeg(number),
            "txt": b"a picture of %d" % number,
            "json": b'{"uid": "good-%d"}' % number,
        }

    def bad(
        name: str, image: bytes, caption: bytes = b"a caption", extension: str = "jpg"
    ) -> dict[str, bytes]:
        return {extension: image, "txt": caption, "json": json.dumps({"uid": name}).encode()}

    cut = write_tar(data / "bad-0.tar", [good(i) for i in range(4)])
    with tarfile.open(cut) as tar:
        last = tar.getmembers()[-3]
    cut.write_bytes(cut.read_bytes()[: last.offset_data + 100])
    pairs = [good(10), bad("cut", jpeg(11)[:900]), good(12), bad("blank", jpeg(13), b" \n")]
    write_tar(data / "bad-1.tar", pairs)
    pairs = [bad("text", b"no image, words"), good(20), bad("bomb", bomb(), extension="png")]
    write_tar(data / "bad-2.tar", pairs)


def test_bad_input_is_listed_and_everything_else_is_there(tmp_path: Path) -> None:
    write_bad(tmp_path / "data")
    manifest = run(str(tmp_path / "data"), tmp_path / POOL)
    reasons = {row["uid"]: row["reason"] for row in read_rejected(tmp_path / POOL).to_pylist()}
    broken = reasons.keys() - {"cut", "blank", "text", "bomb"}
    assert len(reasons) == manifest.rejected == 5
    assert len(broken) == 1
    assert "cut" in reasons[broken.pop()]
    assert "damaged or cut" in reasons["cut"]
    assert "empty" in reasons["blank"]
    assert "not a readable image" in reasons["text"]
    assert "pixels" in reasons["bomb"]
    uids = set(EmbeddingTable.open(tmp_path / POOL).pairs("uid")["uid"].to_pylist())
    assert uids == {"good-0", "good-1", "good-2", "good-10", "good-12", "good-20"}


def test_an_undecodable_image_rejects_each_of_its_pairs_in_every_shard(tmp_path: Path) -> None:
    broken = {"jpg": b"no image", "json": json.dumps({"captions": ["one", "two"]}).encode()}
    for i in range(2):
        write_tar(tmp_path / "data" / f"{i}.tar", [sample(i), broken])
    manifest = run(str(tmp_path / "data"), tmp_path / POOL)
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (8, 4, 4)
    assert len(read_rejected(tmp_path / POOL)) == 4


def test_an_embedding_that_is_not_finite_is_a_rejection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FakeEncoder.encode_image

    def sometimes_nan(self: FakeEncoder, pixels: torch.Tensor) -> torch.Tensor:
        embeddings = original(self, pixels)
        embeddings[0] = torch.nan
        return embeddings

    monkeypatch.setattr(FakeEncoder, "encode_image", sometimes_nan)
    write_tar(tmp_path / "data" / "0.tar", [sample(i) for i in range(3)])
    manifest = run(str(tmp_path / "data"), tmp_path / POOL)
    assert (manifest.rows_out, manifest.rejected) == (4, 2)
    assert read_rejected(tmp_path / POOL)["reason"].to_pylist() == ["the embedding is not finite"] * 2


def test_what_cannot_be_read_at_all_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.tar, \.parquet, \.json file there"):
        run(str(tmp_path / "none" / "*.tar"), tmp_path / POOL)
    with pytest.raises(InputError, match="no shards"):
        shard_identities([])
    data = write_world(tmp_path / "data", 2)
    config = load_config(None, SMALL | {"data.pool": data, "embed.encoder": "/no/such/encoder"})
    with pytest.raises(InputError, match="does not exist"):
        carry_out(Embed("pool"), Run(folder=tmp_path, config=config), LocalEngine())
    shards = list_shards(data)
    (tmp_path / "data" / "1.tar").unlink()
    with pytest.raises(InputError, match=r"1\.tar is gone"):
        shard_identities(shards)
