"""Chunks: what the workers of the embed stage write for each shard, until all are merged.

An *index chunk* has a row for each pair of a shard (or for what was rejected instead), without any decoding.
An *embed chunk* has the embeddings of the distinct images and captions that the shard owns: of all shards that
hold an image, the first embeds it. Both are Arrow files, read by memory map; their metadata carries the
fingerprint of what made them, so that a resumed run knows which to keep.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from influencespace.data.artifacts import atomic_path
from influencespace.data.schema import ImageRef, Rejection, Sample
from influencespace.data.uids import digest, pair_uids

Digests = npt.NDArray[np.bytes_]  # fixed 16 bytes each
Floats = npt.NDArray[np.float32]

DIGEST = np.dtype("S16")
BATCH_ROWS = 8192
NO_DIGEST = bytes(16)

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.large_string()),
        ("uid", pa.large_string()),
        ("own", pa.bool_()),  # the uid is the data's own, not a hash of the content
        ("key", pa.binary(16)),  # digest of the uid: the canonical order
        ("tie", pa.binary(16)),  # orders pairs of equal uid: by content, then by place
        ("caption", pa.large_string()),
        ("image", pa.binary(16)),
        ("text", pa.binary(16)),
        ("image_path", pa.large_string()),
        ("image_offset", pa.int64()),
        ("image_length", pa.int64()),
        ("image_row", pa.int64()),
        ("group", pa.large_string()),
        ("reason", pa.large_string()),  # why this is no pair; null for pairs
    ]
)
OWNED_SCHEMA = pa.schema([("digest", pa.binary(16))])


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Embeddings of distinct images (or captions), one row for each digest, in the order of the digests."""

    digests: Digests  # (n,)
    embeddings: Floats  # (n, D)
    truncated: npt.NDArray[np.bool_]  # (n,)
    reasons: list[str | None]  # (n,) why there is no embedding; None where there is
    sharpness: Floats  # (n,) of images; nan for captions, and where no picture was seen


def pair_rows(shard: str, items: Iterable[Sample | Rejection]) -> Iterator[dict[str, Any]]:
    """Rows of INDEX_SCHEMA for what a reader yields."""
    for item in items:
        if isinstance(item, Rejection):
            yield rejected_row(item)
            continue
        image = digest(item.image)
        for uid, caption in zip(pair_uids(item), item.captions, strict=True):
            yield pair_row(
                shard=shard,
                uid=uid,
                own=item.uid is not None,
                caption=caption,
                image=image,
                text=digest(caption.encode()),
                ref=item.ref,
                group=item.group,
            )


def pair_row(
    *,
    shard: str,
    uid: str,
    own: bool,
    caption: str,
    image: bytes,
    text: bytes,
    ref: ImageRef,
    group: str | None,
) -> dict[str, Any]:
    """One row of INDEX_SCHEMA."""
    content = digest(image + text + (group or "").encode())
    place = digest(f"{ref.path}:{ref.offset}:{ref.row}".encode())
    return {
        "shard": shard,
        "uid": uid,
        "own": own,
        "key": digest(uid.encode()),
        "tie": content[:8] + place[:8],
        "caption": caption,
        "image": image,
        "text": text,
        "group": group,
        **ref.columns(),
    }


def rejected_row(rejection: Rejection) -> dict[str, Any]:
    """A row of INDEX_SCHEMA that is no pair."""
    digests = dict.fromkeys(("key", "tie", "image", "text"), NO_DIGEST)
    return {"shard": rejection.shard, "uid": rejection.uid, "reason": rejection.reason} | digests


@contextmanager
def _arrow_file(path: Path, schema: Any, fingerprint: str = "") -> Iterator[Any]:
    """A writer of record batches to a file that appears when all are written."""
    with (
        atomic_path(path) as aside,
        pa.OSFile(str(aside), "wb") as sink,
        pa.ipc.new_file(sink, schema.with_metadata({"fingerprint": fingerprint})) as file,
    ):
        yield file


def write_index(path: Path, fingerprint: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write an index chunk, a few rows in memory at a time."""
    rows = iter(rows)
    with _arrow_file(path, INDEX_SCHEMA, fingerprint) as file:
        while some := list(islice(rows, BATCH_ROWS)):
            file.write_batch(pa.RecordBatch.from_pylist(some, schema=INDEX_SCHEMA))


def read_index(path: Path, columns: Sequence[str] | None = None) -> Any:
    """The table of an index chunk, memory-mapped."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    return table if columns is None else table.select(list(columns))


def is_pair(table: Any) -> npt.NDArray[np.bool_]:
    """Which rows of an index chunk are pairs, not rejections."""
    mask: npt.NDArray[np.bool_] = pc.is_null(table["reason"]).to_numpy(zero_copy_only=False)
    return mask


def write_embedded(path: Path, fingerprint: str, images: Embedded, texts: Embedded) -> None:
    """Write an embed chunk: one record batch of images, one of texts."""
    dimension = images.embeddings.shape[1] or texts.embeddings.shape[1]
    vector = pa.list_(pa.float32(), dimension)
    schema = pa.schema(
        [
            ("digest", pa.binary(16)),
            ("embedding", vector),
            ("truncated", pa.bool_()),
            ("reason", pa.large_string()),
            ("sharpness", pa.float32()),
        ]
    )
    with _arrow_file(path, schema, fingerprint) as file:
        for some in (images, texts):
            numbers = pa.array(np.ascontiguousarray(some.embeddings).reshape(-1))
            columns = [
                to_digests(some.digests),
                pa.FixedSizeListArray.from_arrays(numbers, dimension) if dimension else pa.array([], vector),
                pa.array(some.truncated),
                pa.array(some.reasons, pa.large_string()),
                pa.array(some.sharpness),
            ]
            file.write_batch(pa.record_batch(columns, schema=schema))


def read_embedded(path: Path, kind: int) -> Embedded:
    """The images (kind 0) or texts (kind 1) of an embed chunk; the embeddings are memory-mapped."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(kind)
    dimension = batch.schema.field("embedding").type.list_size
    vectors = batch.column("embedding").flatten().to_numpy()
    return Embedded(
        digests=digests_of(batch.column("digest")),
        embeddings=vectors.reshape(-1, dimension) if dimension else np.zeros((0, 0), np.float32),
        truncated=batch.column("truncated").to_numpy(zero_copy_only=False),
        reasons=batch.column("reason").to_pylist(),
        sharpness=batch.column("sharpness").to_numpy(),
    )


def write_owned(path: Path, index_chunks: Sequence[Path]) -> None:
    """Decide which chunk embeds each distinct image and caption: the first that has it.

    One file, for each chunk a record batch of images and one of texts, each sorted. Takes some 40 bytes of
    memory for each distinct image or caption of a chunk.
    """
    owned = [_owned(index_chunks, column) for column in ("image", "text")]
    with _arrow_file(path, OWNED_SCHEMA) as file:
        for images, texts in zip(*owned, strict=True):
            for digests in (images, texts):
                file.write_batch(pa.record_batch([to_digests(digests)], schema=OWNED_SCHEMA))


def read_owned(path: Path, chunk: int) -> tuple[Digests, Digests]:
    """The digests of images and of texts that a chunk owns."""
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        images, texts = (digests_of(file.get_batch(2 * chunk + kind).column(0)) for kind in (0, 1))
    return images, texts


def has_fingerprint(path: Path, fingerprint: str) -> bool:
    """Whether `path` is a whole chunk that `fingerprint` made."""
    with suppress(FileNotFoundError, pa.ArrowInvalid), pa.memory_map(str(path)) as source:
        metadata = pa.ipc.open_file(source).schema.metadata or {}
        return bool(metadata.get(b"fingerprint") == fingerprint.encode())
    return False


def digests_of(column: Any) -> Digests:
    """An Arrow column of 16-byte binaries as numpy strings of fixed width, which sort like the bytes.

    Take single digests from `tobytes()`: numpy strips trailing zero bytes from its scalars.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    arrays = [
        np.frombuffer(chunk.buffers()[1], DIGEST, count=chunk.offset + len(chunk))[chunk.offset :]
        for chunk in chunks
        if len(chunk)
    ]
    return np.concatenate(arrays) if arrays else np.zeros(0, DIGEST)


def to_digests(digests: Digests) -> Any:
    """Numpy strings of 16 bytes as an Arrow array."""
    data = pa.py_buffer(np.ascontiguousarray(digests))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(digests), [None, data])


def find(sorted_digests: Digests, wanted: Digests) -> npt.NDArray[np.int64]:
    """Place of each wanted digest among the sorted ones; -1 where it is not there."""
    if not len(sorted_digests):
        return np.full(len(wanted), -1)
    places = np.searchsorted(sorted_digests, wanted)
    inside = np.minimum(places, len(sorted_digests) - 1)
    return np.where(sorted_digests[inside] == wanted, inside, -1)


def _owned(index_chunks: Sequence[Path], column: str) -> list[Digests]:
    per_chunk = []
    for path in index_chunks:
        table = read_index(path, [column, "reason"])
        per_chunk.append(np.unique(digests_of(table[column])[is_pair(table)]))
    everything = np.concatenate([np.zeros(0, DIGEST), *per_chunk])
    owned = np.zeros(len(everything), bool)
    owned[np.unique(everything, return_index=True)[1]] = True
    ends = np.cumsum([len(digests) for digests in per_chunk])
    return [digests[mine] for digests, mine in zip(per_chunk, np.split(owned, ends[:-1]), strict=True)]
