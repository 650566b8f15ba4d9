"""Stored embeddings of many pairs, made of those of a few, to measure what comes after embedding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from influencespace.core.arrays import IntArray
from influencespace.data.pair_set import PairSet

Reals = NDArray[np.floating[Any]]
NOISE = 0.7
"""Length of the noise that is added to a unit vector: the cosine with the original is about .82, of two draws of one .67, so that
these are no copies of each other."""
FILE_PAIRS = 1000
"""Pairs of a file, at least: as many files as there are workers, but not of a handful of pairs."""


def near(vectors: Reals, rng: np.random.Generator) -> NDArray[np.float16]:
    """Unit vectors (n, D) near these unit vectors (n, D)."""
    noise = NOISE / vectors.shape[1] ** 0.5 * rng.standard_normal(vectors.shape, np.float32)
    moved = vectors + noise
    unit: NDArray[np.float16] = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float16)
    return unit


def stretched(pairs: PairSet, count: int, files: int, seed: int) -> list[pa.Table]:
    """`count` pairs in equal parts: images of these pairs, drawn with replacement with all their captions, and moved a little.

    Captions are theirs with a number behind, so that no caption is shared by images as it may be in the data.
    """
    images, texts = (vectors.numpy() for vectors in pairs.inputs(slice(None)))
    columns = pairs.read(slice(None), "image", "caption")
    groups = np.array(pairs.column("group"), object)
    tables = []
    for number, size in enumerate(parts(count, files)):
        rng = np.random.default_rng([seed, number])
        rows, drawn = draw_images(columns["image"], size, rng)
        first = np.flatnonzero(np.diff(drawn, prepend=-1))
        tables.append(
            table(
                [f"pair-{number}-{row}" for row in range(size)],
                [f"{text} {number}-{place}" for place, text in enumerate(columns["caption"][rows])],
                near(images[rows[first]], rng)[drawn],
                near(texts[rows], rng),
                groups[rows].tolist(),
            )
        )
    return tables


def draw_images(image: IntArray, count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Rows (count,) of drawn images with all their pairs, by each pair's image (n,); and which draw each is of, from 0."""
    order = np.argsort(image, kind="stable")
    _, starts, sizes = np.unique(image[order], return_index=True, return_counts=True)
    draws = rng.integers(len(starts), size=count)  # more than enough: each has a pair
    drawn = np.repeat(np.arange(count), sizes[draws])[:count]
    within = np.arange(count) - np.concatenate([[0], np.cumsum(sizes[draws])])[drawn]
    return order[starts[draws[drawn]] + within], drawn


def parts(count: int, files: int) -> list[int]:
    """Pairs of each of at most so many files; fewer where they would be small."""
    cuts = np.linspace(0, count, max(1, min(files, count // FILE_PAIRS)) + 1).astype(int)
    return [int(size) for size in np.diff(cuts)]


def table(
    uids: Sequence[str],
    captions: Sequence[str],
    images: Reals,
    texts: Reals,
    groups: Sequence[str | None] | None = None,
) -> pa.Table:
    """Embeddings (n, D) as `data.embeddings` takes them."""
    columns = {"uid": pa.array(uids, pa.string()), "caption": pa.array(captions, pa.string())}
    if groups is not None:
        columns["group"] = pa.array(groups, pa.string())
    vectors = {"image_embedding": images, "text_embedding": texts}
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in vectors.items()
    }
    return pa.table(columns | lists)


def write(folder: Path, tables: Sequence[pa.Table]) -> str:
    """The tables as Parquet files in a new folder; its path."""
    folder.mkdir(parents=True)
    for number, one in enumerate(tables):
        pq.write_table(one, folder / f"{number:05d}.parquet")
    return str(folder)
