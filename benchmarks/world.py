"""The worlds that benchmarks curate: real pairs, embedded once, with captions moved on purpose; and synthetic scenes."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Benchmark, arguments, real_data
from filelock import FileLock

from influencespace.data.artifacts import (
    Manifest,
    atomic_path,
    file_digest,
    fingerprint,
    folder_digest,
    read_manifest,
    reopen,
)
from benchmarks.data.shuffle import shuffle_captions
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine.local import LocalEngine
from influencespace.stages.finish import finish_stage
from influencespace.stages.ingest.embed import embed
from influencespace.stages.ingest.encode import EmbedConfig

RUNTIME = LocalEngine()
CLEAN_SCENES: dict[str, Any] = {
    **dict.fromkeys(("wrong_captions", "near_duplicates", "boilerplate", "irrelevant"), 0.0),
    "captions_per_image": 3,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One corrupted pool with one proxy and one target."""

    wrong: float
    captions: int
    steps: int
    noise_seed: int = 1
    target: int = 0
    """Which tar of dev is the target, where it is of dev; the other is the test set."""


def encoder_of(data: Path) -> Path:
    return data.parent / "models" / "mobilenetv2-minilm"


@dataclass(frozen=True)
class World:
    """The real pairs, embedded once."""

    data: Path
    cache: Path

    @property
    def encoder(self) -> str:
        return str(encoder_of(self.data))

    @cached_property
    def encoder_digest(self) -> str:
        return folder_digest(self.encoder)

    def embedded(self, name: str, shards: str) -> Path:
        """The embedding artifact of these shards, made once for their content, whatever date the files have."""
        folder = self.cache / "embed" / name
        listed, config = list_shards(shards), EmbedConfig(encoder=self.encoder)
        digests = [file_digest(shard.path) for shard in listed]
        content = fingerprint([self.encoder_digest, config.content(), digests])
        made_of = folder.with_suffix(".made_of")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # benchmarks that run at once share a cache
            if not (made_of.is_file() and made_of.read_text() == content and read_manifest(folder)):
                made_of.unlink(missing_ok=True)
                embed(listed, config, folder, RUNTIME)
                made_of.write_text(content)
        return folder

    @property
    def pool_shards(self) -> str:
        return str(self.data / "flickr8k" / "pool" / "*.tar")

    @cached_property
    def pool(self) -> Path:
        return self.embedded("pool", self.pool_shards)

    def dev(self, tar: int) -> PairSet:
        return PairSet(self.embedded(f"dev{tar}", str(self.data / "flickr8k" / "dev" / f"{tar:05d}.tar")))

    @cached_property
    def other_domain(self) -> Path:
        """Synthetic scenes, rightly captioned."""
        folder = self.cache / "scenes"
        write_world(folder, WorldConfig(pretrain=0, target=0, test=0, pool=3000, **CLEAN_SCENES))
        return self.embedded("scenes", str(folder / "pool" / "*.tar"))

    def corrupted(self, setting: Setting) -> tuple[PairSet, np.ndarray]:
        """The pool with some captions moved between images, and which pairs are wrong."""
        columns = pq.read_schema(self.pool / "pairs.parquet").names  # a cache may be older than one of them
        mark = fingerprint(["corrupted", setting.wrong, setting.captions, setting.noise_seed, columns])
        folder = self.cache / "pools" / mark
        if read_manifest(folder) is None or not (folder / "images.npy").exists():
            self._corrupt(setting, reopen(folder), mark)
        return PairSet(folder), np.load(folder / "wrong.npy")

    def _corrupt(self, setting: Setting, folder: Path, mark: str) -> None:
        table = pq.read_table(self.pool / "pairs.parquet")
        number = np.array([int(uid.rsplit("#", 1)[1]) for uid in table["uid"].to_pylist()])
        table = table.take(np.flatnonzero(number < setting.captions))
        image = table["image"].to_numpy()
        rows = [
            str(i) for i in range(len(table))
        ]  # row numbers stand for captions, so that embeddings move along
        moved, wrong = shuffle_captions(rows, image.tolist(), setting.wrong, setting.noise_seed)
        source = np.array([int(row) for row in moved])
        for column in ("text", "caption", "truncated"):
            table = table.set_column(table.column_names.index(column), column, table[column].take(source))
        for name in ("images.npy", "texts.npy"):
            (folder / name).unlink(missing_ok=True)
            # relative: a cache may be moved or copied
            (folder / name).symlink_to(os.path.relpath(self.pool / name, folder))
        images, texts = (np.load(folder / name, mmap_mode="r") for name in ("images.npy", "texts.npy"))
        score = (images[table["image"].to_numpy()] * texts[table["text"].to_numpy()]).sum(1)
        table = table.set_column(table.column_names.index("clip_score"), "clip_score", pa.array(score))
        with atomic_path(folder / "pairs.parquet") as aside:
            pq.write_table(table, aside)
        np.save(folder / "wrong.npy", wrong)
        manifest = Manifest(stage="embed", fingerprint=mark, rows_in=len(table), rows_out=len(table))
        finish_stage(folder, manifest, 0.0)


@dataclass(frozen=True)
class SyntheticWorld(World):
    """Synthetic scenes in place of photographs, which are the other domain; beside the real pairs' cache."""

    @cached_property
    def scenes(self) -> Path:
        folder = self.cache / "world"
        write_world(folder, WorldConfig(pretrain=0, pool=2000, target=500, test=500, **CLEAN_SCENES))
        return folder

    @property
    def pool_shards(self) -> str:
        return str(self.scenes / "pool" / "*.tar")

    def dev(self, tar: int) -> PairSet:
        split = ("target", "test")[tar]
        return PairSet(self.embedded(split, str(self.scenes / split / "*.tar")))

    @cached_property
    def other_domain(self) -> Path:
        return self.embedded("photographs", str(self.data / "flickr8k" / "dev" / "*.tar"))


def content_of(data: Path) -> str:
    """Of the real pairs and their encoder: what is computed of others lies elsewhere."""
    return fingerprint(
        [folder_digest(folder) for folder in (encoder_of(data), data / "flickr8k", data / "coco2017-mini")]
    )


def measure_on_real_pairs(
    description: str,
    name: str,
    seeds: tuple[Sequence[int], Sequence[int]],
    parts: Mapping[str, Callable[[Benchmark, World, bool], None]],
) -> int:
    """The command line of a benchmark on real pairs; `seeds` of a quick run and of a full one. Says where it has no data."""
    options = arguments(description, name, parts=tuple(parts))
    data = real_data()
    if data is None:
        print("skipped: no real data; set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        return 0
    bench = Benchmark(name, options.quick, options.out, seeds=seeds[0] if options.quick else seeds[1])
    world = World(data, options.cache / content_of(data))
    bench.measure(options.parts, lambda part: parts[part](bench, world, options.quick), tuple(parts))
    return 0
