"""The files of an embedding artifact: for each bucket thin columns as Parquet, and embeddings as Arrow in the same order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import ROW_GROUP
from influencespace.data.chunks import VECTORS, Floats, Halves, arrow_file, vector_column
from influencespace.errors import InputError

PAIRS_SCHEMA = pa.schema(
    [
        ("uid", pa.large_string()),
        ("image", pa.int64()),
        ("text", pa.int64()),
        ("caption", pa.large_string()),
        ("image_path", pa.large_string()),
        ("image_offset", pa.int64()),
        ("image_length", pa.int64()),
        ("image_row", pa.int64()),
        ("group", pa.large_string()),
        ("clip_score", pa.float32()),
        ("truncated", pa.bool_()),
        ("sharpness", pa.float32()),
    ]
)
"""Columns of a bucket's pairs.parquet; `image` and `text` are numbers of their content's digest."""
REJECTED_SCHEMA = pa.schema(
    [("shard", pa.large_string()), ("uid", pa.large_string()), ("reason", pa.large_string())]
)

# Pairs of a bucket, about: with embeddings of 512 numbers, 200 MB.
BUCKET_PAIRS = 100_000
# Names of groups from which on a column is no group but an identifier.
MAX_GROUPS = 10_000


def bucket_folder(folder: Path, number: int) -> Path:
    """Where a bucket of an artifact lies."""
    return folder / f"bucket-{number:05d}"


def buckets_for(pairs: int, size: int = BUCKET_PAIRS) -> int:
    """How many buckets a pool of so many pairs gets."""
    return max(1, -(-pairs // size))


def write_bucket_files(
    folder: Path, pairs: pa.Table, vectors: Sequence[Iterator[Halves]], dimension: int
) -> None:
    """Write a bucket's pairs (n) of PAIRS_SCHEMA and their embeddings of images and of texts, in batches of (m, D)."""
    with atomic_path(folder / "pairs.parquet") as aside:
        pq.write_table(pairs, aside, row_group_size=ROW_GROUP)
    write_vectors(folder / "vectors.arrow", vectors, dimension)


def write_artifact(
    folder: Path, pairs: pa.Table, images: Floats, texts: Floats, size: int = BUCKET_PAIRS
) -> dict[str, Any]:
    """Write an artifact of pairs (n) in canonical order and their unit embeddings (n, D), without any rejected; the details that
    its manifest needs."""
    starts = range(0, max(1, len(pairs)), size)
    for number, start in enumerate(starts):
        out, rows = bucket_folder(folder, number), slice(start, start + size)
        vectors = [iter([values[rows].astype(np.float16)]) for values in (images, texts)]
        write_bucket_files(out, pairs.slice(start, size).cast(PAIRS_SCHEMA), vectors, images.shape[1])
    with atomic_path(folder / "rejected.parquet") as aside:
        pq.write_table(REJECTED_SCHEMA.empty_table(), aside)
    counts = [min(size, len(pairs) - start) for start in starts]
    return {"buckets": counts, "groups": group_names(pairs["group"]), "dimension": images.shape[1]}


def write_vectors(path: Path, batches: Sequence[Iterator[Halves]], dimension: int) -> None:
    """Write embeddings of images and of texts, each as batches of (n, D)."""
    kind = pa.list_(pa.float16(), dimension)
    schema = pa.schema([(name, kind) for name in VECTORS])
    with arrow_file(path, schema) as file:
        for some in zip(*batches, strict=True):
            file.write_batch(pa.record_batch([vector_column(values) for values in some], schema=schema))


def group_names(column: Any) -> list[str]:
    """The distinct names in a column of groups, sorted; raises InputError where they are too many to be groups."""
    names = column.unique().drop_null().to_pylist()
    if len(names) > MAX_GROUPS:
        raise InputError(
            f"the group column has more than {MAX_GROUPS:,} values, such as {names[0]!r}: it names no groups. "
            "Name another column as embed.read.group_column"
        )
    return sorted(names)
