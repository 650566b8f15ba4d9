"""The pairs that benchmarks curate: real ones, embedded once, with captions moved on purpose; and synthetic scenes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from benchmarks.bench import Bench
from benchmarks.data.distinct import RealArray
from benchmarks.data.shuffle import shuffle_captions
from influencespace.config import load_config
from influencespace.core.arrays import BoolArray
from influencespace.data.artifacts import (
    Manifest,
    atomic_path,
    file_digest,
    fingerprint,
    folder_digest,
    read_manifest,
    reopen,
    write_manifest,
)
from influencespace.data.bucket_files import PAIRS_SCHEMA, write_artifact
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine.local import Engine, LocalEngine
from influencespace.run import Run, carry_out
from influencespace.stages.ingest.embed import Embed

ENGINE = LocalEngine()
Content = tuple[pa.Table, RealArray, RealArray]
"""Pairs (n) in canonical order with the unit embeddings of their images and of their captions, two (n, D)."""
CLEAN_SCENES: dict[str, Any] = {
    **dict.fromkeys(("wrong_captions", "near_duplicates", "boilerplate", "irrelevant"), 0.0),
    "captions_per_image": 3,
}


def encoder_of(data: Path) -> Path:
    """The pretrained encoder beside the real data."""
    return data.parent / "models" / "mobilenetv2-minilm"


def embed_by(engine: Engine, folder: Path, shards: str, encoder: Path | str) -> Manifest:
    """Embed all pairs of some shards by the stage, once for their config."""
    run = Run(folder=folder, config=load_config(None, {"data.pool": shards, "embed.encoder": str(encoder)}))
    return carry_out(Embed("pool"), run, engine)


def embed_into(folder: Path, shards: str, encoder: Path | str) -> PairSet:
    """The pairs of some shards, embedded below a folder."""
    embed_by(ENGINE, folder, shards, encoder)
    return PairSet(folder / "embed" / "pool")


def store_pairs(folder: Path, key: Any, make: Callable[[Path], Content]) -> PairSet:
    """An embedding artifact by hand, made once for its key: `make` gives its content, and may write more into the folder."""
    mark, manifest = fingerprint(key), read_manifest(folder)
    if manifest is None or manifest.fingerprint != mark:
        reopen(folder)
        table, images, texts = make(folder)
        details = write_artifact(folder, table, images, texts)
        rows = len(table)
        write_manifest(
            folder, Manifest(stage="embed", fingerprint=mark, rows_in=rows, rows_out=rows, details=details)
        )
    return PairSet(folder)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def with_rows(pairs: PairSet, chosen: BoolArray, path: Path) -> PairSet:
    """The chosen pairs (n,) of a set, whose rows are kept in `path`."""
    with atomic_path(path) as aside, aside.open("wb") as file:
        np.save(file, pairs.rows[chosen])
    return PairSet(pairs.folder, path)


@cache
def _content(data: Path) -> str:
    return fingerprint(
        [folder_digest(path) for path in (encoder_of(data), data / "flickr8k", data / "coco2017-mini")]
    )


@dataclass(frozen=True)
class Dataset:
    """Flickr8k, embedded once by the encoder that lies beside it."""

    data: Path
    cache: Path

    @classmethod
    def of(cls, bench: Bench) -> "Dataset":
        """With a cache that is for the real data's content: what is computed of others lies elsewhere."""
        return cls(bench.real, bench.cache / _content(bench.real))

    @property
    def encoder(self) -> str:
        return str(encoder_of(self.data))

    @cached_property
    def encoder_digest(self) -> str:
        return folder_digest(self.encoder)

    def embedded(self, name: str, shards: str) -> PairSet:
        """These shards embedded, once for their content, whatever dates the files have."""
        folder = self.cache / "embed" / name
        content = fingerprint(
            [Embed.version, self.encoder_digest, [file_digest(shard.path) for shard in list_shards(shards)]]
        )
        made_of, done = folder.with_suffix(".made_of"), folder / "embed" / "pool"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # benchmarks that run at once share a cache
            if not (made_of.is_file() and made_of.read_text() == content and read_manifest(done)):
                made_of.unlink(missing_ok=True)
                embed_into(folder, shards, self.encoder)
                made_of.write_text(content)
        return PairSet(done)

    @property
    def pool_shards(self) -> str:
        return str(self.data / "flickr8k" / "pool" / "*.tar")

    @cached_property
    def pool(self) -> PairSet:
        return self.embedded("pool", self.pool_shards)

    def dev(self, tar: int) -> PairSet:
        """One half of the pairs that are no part of the pool: pictures that the encoder knows better than the pool's."""
        return self.embedded(f"dev{tar}", str(self.data / "flickr8k" / "dev" / f"{tar:05d}.tar"))

    @cached_property
    def other_domain(self) -> PairSet:
        """Synthetic scenes, rightly captioned."""
        folder = self.cache / "scenes"
        write_world(folder, WorldConfig(pretrain=0, target=0, test=0, pool=3000, **CLEAN_SCENES))
        return self.embedded("scenes", str(folder / "pool" / "*.tar"))

    def corrupted(self, share: float, captions: int, seed: int) -> tuple[PairSet, BoolArray]:
        """The pool with a share of the captions moved between images, and which pairs are wrong (n,)."""
        key = ["corrupted", share, captions, seed, PAIRS_SCHEMA.names]

        def make(folder: Path) -> Content:
            table = self.pool.table.pairs()
            number = np.array([int(uid.rsplit("#", 1)[1]) for uid in table["uid"].to_pylist()])
            rows = np.flatnonzero(number < captions)
            # row numbers stand for captions, so that embeddings move along
            numbers, image = [str(row) for row in rows], self.pool.image[rows].tolist()
            moved, wrong = shuffle_captions(numbers, image, share, seed)
            source = np.array([int(row) for row in moved])
            np.save(folder / "wrong.npy", wrong)
            images, texts = self.pool.inputs(rows)[0].numpy(), self.pool.inputs(source)[1].numpy()
            pairs = table.take(rows)
            for column in ("text", "caption", "truncated"):
                pairs = with_column(pairs, column, table[column].take(source))
            return with_column(pairs, "clip_score", pa.array((images * texts).sum(1))), images, texts

        pairs = store_pairs(self.cache / "pools" / fingerprint(key), key, make)
        return pairs, np.load(pairs.folder / "wrong.npy")


@dataclass(frozen=True)
class SyntheticDataset(Dataset):
    """Synthetic scenes in place of photographs, which are the other domain; beside the real pairs' cache."""

    @cached_property
    def scenes(self) -> Path:
        folder = self.cache / "world"
        write_world(folder, WorldConfig(pretrain=0, pool=6000, target=0, test=0, **CLEAN_SCENES))
        return folder

    @property
    def pool_shards(self) -> str:
        return str(self.scenes / "pool" / "*.tar")

    @cached_property
    def other_domain(self) -> PairSet:
        return self.embedded("photographs", str(self.data / "flickr8k" / "dev" / "*.tar"))
