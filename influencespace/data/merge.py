"""From chunks to the embedding artifact, in one canonical order that no shard, worker or order of work changes.

Only digests and row numbers of all pairs are in memory at once (about 100 bytes a pair); captions and
embeddings pass through in blocks, and every file is written front to back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from influencespace.data.artifacts import atomic_path
from influencespace.data.chunks import (
    DIGEST,
    Digests,
    digests_of,
    find,
    is_pair,
    read_embedded,
    read_index,
    to_digests,
)
from influencespace.data.uids import digest

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

PAIRS_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("image", pa.int64()),
        ("text", pa.int64()),
        ("caption", pa.string()),
        ("image_path", pa.string()),
        ("image_offset", pa.int64()),
        ("image_length", pa.int64()),
        ("image_row", pa.int64()),
        ("group", pa.string()),
        ("clip_score", pa.float32()),
        ("truncated", pa.bool_()),
        ("sharpness", pa.float32()),
    ]
)
REJECTED_SCHEMA = pa.schema([("shard", pa.string()), ("uid", pa.string()), ("reason", pa.string())])

FILES = ("images.npy", "texts.npy", "pairs.parquet", "rejected.parquet")

# Pairs in one row group of pairs.parquet; with their embeddings of 512 numbers they take a quarter of a GB.
BLOCK_PAIRS = 65_536
# Pairs whose embeddings are gathered at once for their cosines.
BLOCK_COSINES = 8_192
# Bytes of embeddings in memory while images.npy or texts.npy is written.
BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What became of the rows of all chunks."""

    rows_in: int
    rows_out: int
    rejected: int
    details: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ProvidedEmbeddings:
    """The uids for which embeddings were imported: pairs without one are rejected."""

    keys: Digests  # sorted digests of uids
    refused: dict[bytes, str] = field(default_factory=dict)  # digest of uid -> why its embedding is unusable


@dataclass(frozen=True, kw_only=True)
class _Distinct:
    """The images (or captions) that have an embedding, sorted, and why others have none."""

    digests: Digests
    truncated: Mask
    sharpness: npt.NDArray[np.float32]
    reasons: dict[bytes, str]
    dimension: int


@dataclass(frozen=True, kw_only=True)
class _Index:
    """All rows of all index chunks, in their order: digests and row numbers only."""

    chunks: Sequence[Path]
    starts: Rows  # (chunks + 1,) row at which each chunk begins
    pair: Mask  # False: rejected by the reader
    key: Digests  # the canonical order
    tie: Digests
    own: Mask
    image: Rows  # row of images.npy; -1: no embedding
    text: Rows

    @classmethod
    def read(cls, chunks: Sequence[Path], images: _Distinct, texts: _Distinct) -> "_Index":
        columns = []
        for path in chunks:
            table = read_index(path, ["key", "tie", "own", "image", "text", "reason"])
            columns.append(
                {
                    "pair": is_pair(table),
                    "key": digests_of(table["key"]),
                    "tie": digests_of(table["tie"]),
                    "own": pc.fill_null(table["own"], False).to_numpy(),
                    "image": find(images.digests, digests_of(table["image"])),
                    "text": find(texts.digests, digests_of(table["text"])),
                }
            )
        starts = np.cumsum([0, *(len(some["key"]) for some in columns)])
        return cls(chunks=chunks, starts=starts, **_joined(columns))

    def take(self, rows: Rows, columns: Sequence[str] | None = None) -> Any:
        """The table of these rows, in that order."""
        pieces, places = [], []
        for chunk, at, local in _by_chunk(rows, self.starts):
            pieces.append(read_index(self.chunks[chunk], columns).take(pa.array(local)))
            places.append(at)
        return pa.concat_tables(pieces).take(pa.array(np.argsort(np.concatenate(places))))


def merge(
    folder: Path,
    index_chunks: Sequence[Path],
    embed_chunks: Sequence[Path],
    provided: ProvidedEmbeddings | None = None,
) -> MergeReport:
    """Write images.npy, texts.npy, pairs.parquet and rejected.parquet of the artifact `folder`.

    Pairs are ordered by the digest of their uid, embeddings by the digest of the image or caption. Of pairs
    that share a uid of their own, the first (by content) stays and the others are rejected; exact copies
    without a uid of their own get the endings ~1, ~2 and so on.
    """
    images = _write_embeddings(folder / "images.npy", embed_chunks, 0)
    texts = _write_embeddings(folder / "texts.npy", embed_chunks, 1)
    index = _Index.read(index_chunks, images, texts)
    usable = index.pair & (index.image >= 0) & (index.text >= 0)
    if provided is not None:
        usable &= find(provided.keys, index.key) >= 0
    ordinals = _ordinals(index, usable)
    kept = usable & ~(index.own & (ordinals > 0))
    keys = _renamed(index, np.where(kept, ordinals, 0))
    order = np.flatnonzero(kept)
    order = order[np.argsort(keys[order], kind="stable")]
    _write_pairs(folder, index, order, ordinals, images, texts)
    _write_rejected(folder, index, kept, ordinals, images.reasons | texts.reasons, provided)
    return MergeReport(
        rows_in=len(kept),
        rows_out=pq.read_metadata(folder / "pairs.parquet").num_rows,
        rejected=pq.read_metadata(folder / "rejected.parquet").num_rows,
        details={
            "distinct_images": len(images.digests),
            "distinct_texts": len(texts.digests),
            "dimension": images.dimension,
            "truncated_captions": int(texts.truncated[index.text[order]].sum()),
            "exact_copies": int((ordinals[kept] > 0).sum()),
        },
    )


def _write_embeddings(path: Path, chunks: Sequence[Path], kind: int) -> _Distinct:
    empty = {"digests": DIGEST, "truncated": bool, "sharpness": np.float32, "rows": np.int64}
    columns: list[dict[str, Any]] = [{name: np.zeros(0, of) for name, of in empty.items()}]
    reasons: dict[bytes, str] = {}
    starts, dimension = [0], 0
    for source in chunks:
        embedded = read_embedded(source, kind)
        usable = np.array([reason is None for reason in embedded.reasons], bool)
        columns.append(
            {
                "digests": embedded.digests[usable],
                "truncated": embedded.truncated[usable],
                "sharpness": embedded.sharpness[usable],
                "rows": starts[-1] + np.flatnonzero(usable),
            }
        )
        failed = to_digests(embedded.digests[~usable]).to_pylist()
        reasons |= zip(failed, (reason for reason in embedded.reasons if reason is not None))
        starts.append(starts[-1] + len(usable))
        dimension = dimension or embedded.embeddings.shape[1]
    everything = _joined(columns)
    first = np.unique(everything["digests"], return_index=True)[1]
    distinct = {name: column[first] for name, column in everything.items()}
    order = distinct.pop("rows")
    with atomic_path(path) as aside, aside.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(order), dimension)}
        np.lib.format.write_array_header_1_0(file, header)
        block = max(1, BLOCK_BYTES // max(1, 4 * dimension))
        for start in range(0, len(order), block):
            some = order[start : start + block]
            values = np.empty((len(some), dimension), np.float32)
            for chunk, places, local in _by_chunk(some, np.array(starts)):
                values[places] = read_embedded(chunks[chunk], kind).embeddings[local]
            file.write(values.data)
    return _Distinct(**distinct, reasons=reasons, dimension=dimension)


def _joined(columns: Sequence[dict[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.concatenate([some[name] for some in columns]) for name in columns[0]}


def _ordinals(index: _Index, usable: Mask) -> Rows:
    """How many usable pairs of the same uid come before each pair."""
    rows = np.flatnonzero(usable)
    rows = rows[np.lexsort((index.tie[rows], index.key[rows]))]
    key = index.key[rows]
    place = np.arange(len(rows))
    first = np.ones(len(rows), bool)
    first[1:] = key[1:] != key[:-1]
    ordinals = np.zeros(len(usable), np.int64)
    ordinals[rows] = place - np.maximum.accumulate(np.where(first, place, 0))
    return ordinals


def _renamed(index: _Index, ordinals: Rows) -> Digests:
    """The keys of all rows, with those of renamed copies made from their new uids."""
    keys = index.key.copy()
    copies = np.flatnonzero(ordinals)
    if len(copies):
        names = _final_uids(index.take(copies, ["uid"])["uid"].to_pylist(), ordinals[copies])
        keys[copies] = np.frombuffer(b"".join(digest(name.encode()) for name in names), DIGEST)
    return keys


def _final_uids(uids: Sequence[str], ordinals: Rows) -> list[str]:
    return [f"{uid}~{ordinal}" if ordinal else uid for uid, ordinal in zip(uids, ordinals, strict=True)]


def _write_pairs(
    folder: Path, index: _Index, order: Rows, ordinals: Rows, images: _Distinct, texts: _Distinct
) -> None:
    left, right = (np.load(folder / name, mmap_mode="r") for name in ("images.npy", "texts.npy"))
    with atomic_path(folder / "pairs.parquet") as aside, pq.ParquetWriter(aside, PAIRS_SCHEMA) as writer:
        for start in range(0, len(order), BLOCK_PAIRS):
            rows = order[start : start + BLOCK_PAIRS]
            read = index.take(rows)
            image, text = index.image[rows], index.text[rows]
            columns = {name: read[name] for name in read.column_names} | {
                "uid": pa.array(_final_uids(read["uid"].to_pylist(), ordinals[rows])),
                "image": pa.array(image),
                "text": pa.array(text),
                "clip_score": pa.array(_cosines(left, right, image, text)),
                "truncated": pa.array(texts.truncated[text]),
                "sharpness": pa.array(images.sharpness[image]),
            }
            block = pa.table({name: columns[name] for name in PAIRS_SCHEMA.names})
            writer.write_table(block.cast(PAIRS_SCHEMA), row_group_size=BLOCK_PAIRS)


def _write_rejected(
    folder: Path,
    index: _Index,
    kept: Mask,
    ordinals: Rows,
    failures: dict[bytes, str],
    provided: ProvidedEmbeddings | None,
) -> None:
    columns = ["shard", "uid", "key", "image", "text", "reason"]
    with (
        atomic_path(folder / "rejected.parquet") as aside,
        pq.ParquetWriter(aside, REJECTED_SCHEMA) as writer,
    ):
        for start, stop in pairwise(index.starts):
            if len(rows := start + np.flatnonzero(~kept[start:stop])):
                rejected = index.take(rows, columns).to_pylist()
                for row, ordinal in zip(rejected, ordinals[rows], strict=True):
                    row["reason"] = row["reason"] or _reason(row, int(ordinal), failures, provided)
                writer.write_table(pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA))


def _reason(
    row: dict[str, bytes], ordinal: int, failures: dict[bytes, str], provided: ProvidedEmbeddings | None
) -> str:
    if ordinal:
        return "duplicate uid"
    unusable = failures.get(row["image"]) or failures.get(row["text"])
    if provided is not None:
        return provided.refused.get(row["key"]) or unusable or "no embedding given"
    assert unusable is not None, f"a pair without embedding and without a reason: {row}"
    return unusable


def _by_chunk(rows: Rows, starts: Rows) -> Iterator[tuple[int, Rows, Rows]]:
    """For each chunk that holds some of `rows`: the chunk, their places in `rows`, their rows in the chunk."""
    owner = np.searchsorted(starts, rows, side="right") - 1
    order = np.argsort(owner, kind="stable")
    chunks, first = np.unique(owner[order], return_index=True)
    for chunk, places in zip(chunks, np.split(order, first[1:])):
        yield int(chunk), places, rows[places] - starts[chunk]


def _cosines(images: Any, texts: Any, image: Rows, text: Rows) -> npt.NDArray[np.float32]:
    cosines = np.empty(len(image), np.float32)
    for start in range(0, len(image), BLOCK_COSINES):
        some = slice(start, start + BLOCK_COSINES)
        cosines[some] = np.einsum("nd,nd->n", images[image[some]], texts[text[some]])
    return cosines
