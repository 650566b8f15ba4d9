"""A small world of shards, an encoder that embeds pixels by themselves, and the embed stage over them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from influencespace.config import load_config
from influencespace.data.artifacts import Manifest
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.uids import digest
from influencespace.engine.local import Engine, LocalEngine
from influencespace.run import Run, carry_out
from influencespace.stages.ingest.embed import Embed
from influencespace.stages.ingest.encode import EmbedConfig

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
    input_size: int = 64

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


def load_fake_preprocessing(config: EmbedConfig) -> FakeEncoder:
    return FakeEncoder(Path("/dev/null"))


def run(
    data: str,
    out: Path,
    engine: Engine | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    buckets: int = 10,
    **options: Any,
) -> Manifest:
    """The embed stage for the pool of a run, whose artifact is `out`."""
    assert out.match(POOL)
    config = load_config(None, SMALL | {"data.pool": data} | dict(settings or {}))
    stage = Embed(
        "pool", partial(load_fake, out.with_suffix(".log"), **options), load_fake_preprocessing, buckets
    )
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
    return pairs, *table.embeddings(slice(None))


def assert_same(left: Path, right: Path) -> None:
    (pairs, images, texts), (other_pairs, other_images, other_texts) = content(left), content(right)
    assert pairs == other_pairs
    np.testing.assert_allclose(images, other_images, atol=1e-3)  # one step of float16
    np.testing.assert_allclose(texts, other_texts, atol=1e-3)
