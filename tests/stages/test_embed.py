"""Embedding: any shards, any engine, any interruption give the same artifact, and nothing disappears."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from influencespace.config import load_config
from influencespace.data.artifacts import Manifest, read_manifest
from influencespace.data.embeddings import EmbeddingTable, read_rejected, rejected_reasons
from influencespace.data.readers import list_shards
from influencespace.data.uids import digest
from influencespace.engine.local import ONE_CORE, Engine, LocalEngine
from influencespace.engine.placement import Machine, Resources
from influencespace.errors import InputError
from influencespace.run import Run, carry_out
from influencespace.stages.ingest.embed import Embed, embed_share
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.ingest.shards import shard_identities

SIDE = 4
DIMENSION = SIDE * SIDE * 3
POOL = "embed/pool"
SMALL: dict[str, Any] = {"embed.encoder": "fake", "embed.batch_size": 4, "embed.keep_chunks": True}


@dataclass
class FakeEncoder:
    """Embeds pixels by themselves and a text by its digest; writes down how often it ran."""

    log: Path
    fail_after: int | None = None
    dimension: int = DIMENSION
    fingerprint: str = "fake"

    def preprocess_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = [np.asarray(image.resize((SIDE, SIDE)), np.float32).reshape(-1) for image in images]
        return torch.tensor(np.stack(pixels)) - 127.3

    def tokenize(self, texts: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[bool]]:
        rows = [np.frombuffer(digest(text.encode()), np.uint8).astype(np.float32) for text in texts]
        return {"ids": torch.tensor(np.stack(rows))}, [len(text) > 40 for text in texts]

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.note("image", len(pixels))
        return torch.nn.functional.normalize(pixels, dim=1)

    def encode_text(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        self.note("text", len(tokens["ids"]))
        return torch.nn.functional.normalize(tokens["ids"].repeat(1, DIMENSION // 16) - 127.3, dim=1)

    def note(self, kind: str, count: int) -> None:
        with self.log.open("a") as file:
            file.write(f"{kind} {count}\n")
        if self.fail_after is not None and len(self.log.read_text().splitlines()) >= self.fail_after:
            raise RuntimeError("the power is gone")


def load_fake(log: Path, config: EmbedConfig, device: str, **options: Any) -> FakeEncoder:
    return FakeEncoder(log, **options)


def run(
    data: str,
    out: Path,
    engine: Engine | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Manifest:
    """The embed stage for the pool of a run, whose artifact is `out`."""
    assert out.match(POOL)
    config = load_config(None, SMALL | {"data.pool": data} | dict(settings or {}))
    stage = Embed("pool", partial(load_fake, out.with_suffix(".log"), **options))
    return carry_out(stage, Run(folder=out.parents[1], config=config), engine or LocalEngine())


def provided(path: Path, out: Path, engine: Engine | None = None, data: str = "", **read: Any) -> Manifest:
    """The same where the embeddings are there already."""
    settings = {"data.embeddings": str(path)} | {f"embed.read.{name}": value for name, value in read.items()}
    return run(data, out, engine, settings=settings)


def chunks(out: Path) -> Path:
    return out.with_name("pool.chunks")


def calls(out: Path, kind: str) -> int:
    """Images or texts that were embedded for `out` so far."""
    log = out.with_suffix(".log")
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return sum(int(count) for name, count in lines if name == kind)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path: Path, samples: Sequence[dict[str, bytes]]) -> Path:
    """A WebDataset shard; a sample is its members by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, sample in enumerate(samples):
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{key:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def sample(number: int, *, uid: str | None = None, captions: int = 2) -> dict[str, bytes]:
    texts = [f"picture {number} seen in way {i}" + " again" * (number % 4) for i in range(captions)]
    fields: dict[str, Any] = {"captions": texts} | ({"uid": uid} if uid else {})
    return {"jpg": jpeg(number), "json": json.dumps(fields).encode()}


def write_world(folder: Path, shards: int, order: Sequence[int] | None = None) -> str:
    """24 samples, some with a uid of their own, some exact copies, in so many shards."""
    samples = [sample(i, uid=f"own-{i}" if i % 2 else None) for i in range(18)]
    samples += [sample(i) for i in (0, 2, 2)]  # exact copies without a uid
    samples += [sample(1, uid="own-1"), sample(40, uid="own-3"), sample(5, uid="other")]
    samples = [samples[i] for i in order] if order is not None else samples
    for i in range(shards):
        write_tar(folder / f"{i}.tar", samples[i::shards])
    return str(folder / "*.tar")


PLACES = ("image_path", "image_offset", "image_length", "image_row")


def content(out: Path) -> tuple[dict[str, list[Any]], np.ndarray, np.ndarray]:
    """The artifact without the places of the images, which tell shards apart."""
    table = EmbeddingTable.open(out)
    pairs = table.pairs().drop_columns([*PLACES, "clip_score"]).to_pydict()
    return pairs, np.array(table.images), np.array(table.texts)


def assert_same(left: Path, right: Path) -> None:
    (pairs, images, texts), (other_pairs, other_images, other_texts) = content(left), content(right)
    assert pairs == other_pairs
    np.testing.assert_allclose(images, other_images, atol=1e-6)
    np.testing.assert_allclose(texts, other_texts, atol=1e-6)


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
    assert pq.read_schema(world[1] / "pairs.parquet").names == [
        *("uid", "image", "text", "caption", *PLACES, "group", "clip_score", "truncated", "sharpness")
    ]
    keys = [digest(uid.encode()) for uid in table.pairs("uid")["uid"].to_pylist()]
    assert keys == sorted(set(keys))
    for vectors in (table.images, table.texts):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    images, texts = table.images[table.column("image")], table.texts[table.column("text")]
    np.testing.assert_allclose(table.column("clip_score"), (images * texts).sum(1), atol=1e-6)
    manifest = table.manifest
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (48, 44, 4)
    assert manifest.details["truncated_captions"] == sum(table.column("truncated")) > 0
    assert manifest.details["exact_copies"] == 6
    assert set(manifest.files) == {"images.npy", "texts.npy", "pairs.parquet", "rejected.parquet"}


def test_every_pair_keeps_its_own_image_and_caption(world: tuple[str, Path]) -> None:
    table = EmbeddingTable.open(world[1])
    pairs = {row["uid"]: row for row in table.pairs().to_pylist()}
    encoder = FakeEncoder(world[1].with_suffix(".expected"))
    for number in (1, 5, 17):
        row = pairs[f"own-{number}#1"]
        assert row["caption"].startswith(f"picture {number} seen in way 1")
        image = Image.open(io.BytesIO(jpeg(number)))
        expected = encoder.encode_image(encoder.preprocess_images([image])).numpy()[0]
        np.testing.assert_allclose(table.images[row["image"]], expected, atol=1e-6)
        with Path(row["image_path"]).open("rb") as file:
            file.seek(row["image_offset"])
            assert file.read(row["image_length"]) == jpeg(number)


def test_each_tower_runs_once_for_each_distinct_image_and_caption(world: tuple[str, Path]) -> None:
    assert calls(world[1], "image") == EmbeddingTable.open(world[1]).images.shape[0] == 19
    assert calls(world[1], "text") == EmbeddingTable.open(world[1]).texts.shape[0] == 38


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
    for name in ("pairs.parquet", "rejected.parquet"):
        assert pq.read_table(there / name).equals(pq.read_table(here / name))


def test_a_finished_stage_is_not_run_again(world: tuple[str, Path]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in world[1].iterdir()}
    assert run(*world) == read_manifest(world[1])
    assert before == {path.name: path.stat().st_mtime_ns for path in world[1].iterdir()}


def test_a_stopped_run_goes_on_at_its_last_shard(world: tuple[str, Path], tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 7), tmp_path / POOL
    with pytest.raises(RuntimeError, match="the power is gone"):
        run(data, out, fail_after=9)
    assert read_manifest(out) is None
    done = len(list(chunks(out).glob("*.embed.arrow")))
    assert 0 < done < 7
    manifest = run(data, out)
    assert manifest.details["resumed_shards"] == done
    assert_same(out, world[1])
    assert not list(out.rglob("*.tmp"))


def test_lost_chunks_are_made_again_and_only_those(tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 3), tmp_path / POOL
    files = run(data, out).files
    embedded = calls(out, "image")
    (out / "manifest.json").unlink()
    for name in ("00001.embed.arrow", "00002.index.arrow"):
        (chunks(out) / name).unlink()
    manifest = run(data, out)
    assert manifest.files == files
    assert manifest.details["resumed_shards"] == 2
    assert 0 < calls(out, "image") - embedded < embedded


def test_a_broken_chunk_is_made_again(tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 2), tmp_path / POOL
    files = run(data, out).files
    (out / "manifest.json").unlink()
    (chunks(out) / "00000.embed.arrow").write_bytes(b"ARROW1")
    assert run(data, out).files == files


def test_a_changed_config_is_embedded_anew(tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 2), tmp_path / POOL
    first = run(data, out)
    second = run(data, out, settings={"embed.dtype": "bfloat16"})
    assert second.fingerprint != first.fingerprint
    assert second.details["resumed_shards"] == 0
    third = run(data, out, settings={"embed.read.captions": "first"})
    assert third.rows_out < first.rows_out


def test_changed_data_is_embedded_anew(tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 2), tmp_path / POOL
    first = run(data, out)
    write_tar(tmp_path / "data" / "1.tar", [sample(77, uid="new")])
    second = run(data, out)
    assert second.inputs["data"] != first.inputs["data"]
    assert second.details["resumed_shards"] == 1
    uids = EmbeddingTable.open(out).pairs("uid")["uid"].to_pylist()
    assert {"new#0", "new#1"} <= set(uids)


def test_chunks_are_removed_when_they_have_served(tmp_path: Path) -> None:
    data, out = write_world(tmp_path / "data", 1), tmp_path / POOL
    run(data, out, settings={"embed.keep_chunks": False})
    assert sorted(path.name for path in out.iterdir()) == [
        *("images.npy", "manifest.json", "pairs.parquet", "rejected.parquet", "texts.npy")
    ]
    assert not chunks(out).exists()


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_embed
from test_embed import FakeEncoder, run
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
        while not list(chunks(out).glob("*.embed.arrow")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert read_manifest(out) is None
    assert run(data, out).details["resumed_shards"] >= 1
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


GIGABYTE = 2**30
PLENTY = 1000 * GIGABYTE


class Machines(LocalEngine):
    """The plain loop that says it has such machines."""

    def __init__(self, *machines: Machine) -> None:
        self._machines = machines

    @property
    def machines(self) -> Sequence[Machine]:
        return self._machines

    @property
    def cores_per_task(self) -> int:
        return int(max(machine.cpus for machine in self._machines))


def machine(cpus: int, gpus: int = 0, memory: int = PLENTY) -> Machine:
    return Machine(cpus=cpus, gpus=gpus, memory=memory)


@pytest.mark.parametrize(
    ("machines", "settings", "expected"),
    [
        ([machine(1)], {}, (1, 1, 0)),
        ([machine(2)], {}, (2, 1, 0)),
        ([machine(200)], {}, (100, 2, 0)),  # no more workers than shards
        ([machine(16, memory=24 * GIGABYTE)], {}, (4, 4, 0)),
        ([machine(16, memory=GIGABYTE)], {}, (1, 16, 0)),
        ([machine(16)], {"num_actors": 4}, (4, 4, 0)),
        ([machine(16)], {"cpus_per_actor": 4}, (4, 4, 0)),
        ([machine(16, 2)], {}, (2, 8, 1)),
        ([machine(16, 2)], {"gpus_per_actor": 0.5}, (4, 4, 0.5)),
        ([machine(16, 2)], {"gpus_per_actor": 0}, (16, 1, 0)),
        # a head without GPUs that is larger than those with them
        ([machine(64), *[machine(8, 1)] * 2], {}, (2, 8, 1)),
        ([machine(16), *[machine(48, 4)] * 4], {}, (16, 12, 1)),
        ([*[machine(96, 8)] * 8, *[machine(96)] * 8], {}, (64, 12, 1)),
        ([machine(4, 2)], {"gpus_per_actor": 0.4}, (4, 1, 0.4)),
    ],
)
def test_machines_are_shared_among_the_workers(
    machines: list[Machine], settings: dict[str, Any], expected: tuple[int, int, float]
) -> None:
    share = embed_share(EmbedConfig(encoder="fake", **settings), Machines(*machines), tasks=100)
    resources = share.resources
    assert (share.workers, resources.cpus, resources.gpus) == expected
    assert share.device == ("cuda" if resources.gpus else "cpu")


def test_only_workers_with_an_encoder_ask_for_what_it_takes(tmp_path: Path) -> None:
    """Not those that read the shards a first time."""
    asked: list[Resources] = []

    class Asked(LocalEngine):
        def map(self, *arguments: Any, resources: Resources = ONE_CORE, **options: Any) -> Iterator[Any]:
            asked.append(resources)
            return super().map(*arguments, **options)

    run(write_world(tmp_path / "data", 2), tmp_path / POOL, Asked(), settings={"embed.gpus_per_actor": 0})
    (encoder,) = (resources for resources in asked if resources.memory)
    assert len(asked) > 3
    assert set(asked) == {encoder, ONE_CORE}


def write_imported(path: Path, uids: Sequence[str | None], seed: int = 0) -> None:
    """Embeddings as our own Parquet holds them."""
    import pyarrow as pa

    images, texts = np.random.default_rng(seed).normal(size=(2, len(uids), 8)).astype(np.float32)
    columns = {"uid": list(uids), "image_embedding": images.tolist(), "text_embedding": texts.tolist()}
    columns["caption"] = [f"about {uid}" for uid in uids]
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_imported_embeddings_alone_make_the_artifact(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    engine = LocalEngine() if kind == "local" else request.getfixturevalue("ray_engine")
    write_imported(tmp_path / "a.parquet", ["x", "y", "z", "y"])
    manifest = provided(tmp_path / "a.parquet", tmp_path / POOL, engine)
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (4, 3, 1)
    table = EmbeddingTable.open(tmp_path / POOL)
    assert dict(
        zip(table.pairs("uid")["uid"].to_pylist(), table.pairs("caption")["caption"].to_pylist())
    ) == {uid: f"about {uid}" for uid in "xyz"}
    images, texts = table.images[table.column("image")], table.texts[table.column("text")]
    np.testing.assert_allclose(table.column("clip_score"), (images * texts).sum(1), atol=1e-6)
    assert provided(tmp_path / "a.parquet", tmp_path / POOL, engine) == manifest


def test_imported_embeddings_are_joined_by_uid_and_the_missing_are_listed(tmp_path: Path) -> None:
    samples = [sample(i, uid=f"own-{i}", captions=1) for i in range(4)] + [sample(0, uid="again", captions=1)]
    write_tar(tmp_path / "data" / "0.tar", samples)
    write_imported(tmp_path / "a.parquet", ["own-3", "own-0", "stranger", "own-1"])
    manifest = provided(tmp_path / "a.parquet", tmp_path / POOL, data=str(tmp_path / "data"))
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (5, 3, 2)
    assert manifest.details["unmatched_embeddings"] == 1
    rejected = read_rejected(tmp_path / POOL).to_pylist()
    assert {row["uid"]: row["reason"] for row in rejected} == {
        "own-2": "no embedding given",
        "again": "no embedding given",
    }
    table = EmbeddingTable.open(tmp_path / POOL)
    given = {row["uid"]: row["image_embedding"] for row in pq.read_table(tmp_path / "a.parquet").to_pylist()}
    for row in table.pairs().to_pylist():
        expected = np.array(given[row["uid"]]) / np.linalg.norm(given[row["uid"]])
        np.testing.assert_allclose(table.images[row["image"]], expected, atol=1e-6)
        assert row["caption"].startswith("picture")
        assert row["image_path"].endswith("0.tar")


def test_joined_rows_that_name_no_pair_are_listed_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [sample(i, uid=f"own-{i}", captions=1) for i in range(2)])
    write_imported(tmp_path / "a.parquet", ["own-0", None, "own-1", None])
    manifest = provided(tmp_path / "a.parquet", tmp_path / POOL, data=str(tmp_path / "data"))
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (4, 2, 2)
    assert rejected_reasons(tmp_path / POOL) == {"the pair has no uid": 2}


def test_pictures_that_arrive_later_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "val2017"
    folder.mkdir()
    entries = [{"id": i, "file_name": f"{i}.png"} for i in range(2)]
    captions = [{"image_id": i, "caption": f"picture {i}"} for i in range(2)]
    (tmp_path / "annotations").mkdir()
    document = tmp_path / "annotations" / "captions_val2017.json"
    document.write_text(json.dumps({"images": entries, "annotations": captions}))
    for i in range(2):
        Image.new("RGB", (8, 8), (90 * i, 10, 10)).save(folder / f"{i}.png")
        manifest = run(str(document), tmp_path / POOL)
        assert manifest.rows_out == i + 1


def test_the_column_that_identifies_imported_pairs_can_be_named(tmp_path: Path) -> None:
    write_imported(tmp_path / "a.parquet", ["x", "y"])
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.rename_columns({"uid": "name"}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column uid .* as embed\.read\.uid_column"):
        provided(tmp_path / "a.parquet", tmp_path / POOL)
    provided(tmp_path / "a.parquet", tmp_path / POOL, uid_column="name")
    assert EmbeddingTable.open(tmp_path / POOL).pairs("uid")["uid"].to_pylist() == ["x", "y"]
