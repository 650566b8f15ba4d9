"""Embedding artifacts of a planted world: images and captions of common meanings, some captions of other images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from influencespace.data.artifacts import Manifest, fingerprint, write_manifest
from influencespace.data.bucket_files import PAIRS_SCHEMA, write_artifact
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.schema import ImageRef
from influencespace.data.uids import digest

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Pairs in canonical order."""

    folder: Path
    fingerprint: str
    uids: list[str]
    wrong: NDArray[np.bool_]  # (n,) whether the caption is of another image

    def __len__(self) -> int:
        return len(self.uids)


def plant(
    folder: Path,
    images: int,
    *,
    captions: int = 1,
    wrong: float = 0.0,
    dimension: int = 16,
    meanings: int = 6,
    noise: float = 0.3,
    groups: tuple[str, ...] = (),
    unclear: float = 1.0,
    seed: int = 0,
    bucket_size: int = 150,
) -> Planted:
    """Write the artifact of `images` images with `captions` captions each, of which a share is wrong.

    Both modalities show the same meaning through maps of their own, which a proxy can learn and which are the same
    for every seed; an image's group is decided by its meaning, and images of the last group have `unclear` times the noise.
    """
    maps = np.random.default_rng(12345).normal(size=(2, meanings, dimension)) / meanings**0.5
    generator = np.random.default_rng(seed)
    meaning = generator.normal(size=(images, meanings))
    owner = np.repeat(np.arange(images), captions)
    n = len(owner)
    swapped = generator.permutation(n) < round(wrong * n)
    described = owner.copy()
    described[swapped] = (owner[swapped] + generator.integers(1, images, swapped.sum())) % images
    group = np.argmax(meaning[:, : len(groups)], axis=1) if groups else None
    blur = np.where(group == len(groups) - 1, unclear, 1.0)[:, None] if groups else 1.0
    shown = meaning @ maps[0] + noise * blur * generator.normal(size=(images, dimension))
    written = meaning[described] @ maps[1] + noise * generator.normal(size=(n, dimension))

    names = [f"pair-{seed}-{i}" for i in range(n)]
    order = np.array(sorted(range(n), key=lambda i: digest(names[i].encode())))
    uids = [names[i] for i in order]
    X, T = unit(shown), unit(written[order])
    image = owner[order]
    columns = {
        "uid": uids,
        "image": image,
        "text": np.arange(n),
        "caption": [f"caption of {uid}" for uid in uids],
        **{name: [value] * n for name, value in ImageRef(path="planted.tar").columns().items()},
        "group": [None if group is None else groups[group[i]] for i in image],
        "clip_score": (X[image] * T).sum(1),
        "truncated": np.zeros(n, bool),
        "sharpness": np.full(n, np.nan),
    }
    pairs = pa.table(columns).select(PAIRS_SCHEMA.names).cast(PAIRS_SCHEMA)
    details = write_artifact(folder, pairs, X[image], T, bucket_size)
    made_by = fingerprint([images, captions, wrong, dimension, meanings, noise, groups, unclear, seed])
    write_manifest(
        folder, Manifest(stage="embed", fingerprint=made_by, rows_in=n, rows_out=n, details=details)
    )
    return Planted(folder=folder, fingerprint=made_by, uids=uids, wrong=swapped[order])


def replant(folder: Path, images: NDArray[Any], texts: NDArray[Any]) -> None:
    """Give the pairs of an artifact other embeddings (n, D)."""
    table = EmbeddingTable.open(folder)
    write_artifact(folder, table.pairs(), images, texts, table.manifest.details["buckets"][0])


def write_pairs(folder: Path, columns: Mapping[str, Any], bucket_size: int = 50) -> None:
    """An artifact of pairs that nobody embeds: some columns of PAIRS_SCHEMA (n,), null where one is left out."""
    n = len(columns["uid"])
    given = {
        name: pa.array(columns.get(name, [None] * n), PAIRS_SCHEMA.field(name).type)
        for name in PAIRS_SCHEMA.names
    }
    nothing = np.zeros((n, 1), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    details = write_artifact(folder, pa.table(given, PAIRS_SCHEMA), nothing, nothing, bucket_size)
    write_manifest(
        folder, Manifest(stage="embed", fingerprint="f" * 32, rows_in=n, rows_out=n, details=details)
    )


def unit(rows: FloatArray) -> NDArray[np.float32]:
    """Rows of unit length."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
