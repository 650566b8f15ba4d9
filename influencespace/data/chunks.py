"""Chunks: what ingest commits, some pairs of a shard with their embeddings, until all are merged into buckets.

A chunk is an Arrow file of pairs sorted by the digest of their uid, so that the rows of a bucket lie together in it; what
was rejected is a row as well, with its reason. It is read by memory map.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from influencespace.data.artifacts import atomic_path, write_json
from influencespace.data.mirror import here, is_file, is_stored
from influencespace.data.schema import ImageRef, Rejection, Sample
from influencespace.data.uids import digest, pair_uids

Digests = npt.NDArray[np.bytes_]  # fixed 16 bytes each
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

DIGEST = np.dtype("S16")
BATCH_ROWS = 8192

PAIR_SCHEMA = pa.schema(
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
        ("clip_score", pa.float32()),
        ("truncated", pa.bool_()),
        ("sharpness", pa.float32()),
    ]
)
VECTORS = ("image_embedding", "text_embedding")


@dataclass(frozen=True)
class ChunkFolder:
    """The chunks of one shard, or of one file of embeddings: its name holds what they depend on, so that a file that is there is
    done."""

    folder: Path

    def chunk(self, number: int) -> Path:
        return self.folder / f"{number:06d}.arrow"

    def close(self, chunks: int, rows: int) -> None:
        """Note that the source was read to its end, and had so many chunks and rows."""
        write_json(self._closed, {"chunks": chunks, "rows": rows})

    @property
    def rows(self) -> int:
        """Of a source that was read to its end."""
        return int(json.loads(here(self._closed).read_bytes())["rows"])

    @property
    def chunks(self) -> list[Path]:
        """Of a source that was read to its end."""
        return [self.chunk(number) for number in range(json.loads(here(self._closed).read_bytes())["chunks"])]

    @property
    def done(self) -> bool:
        """Whether all chunks are there."""
        return is_file(self._closed) and all(is_whole(path) for path in self.chunks)

    @property
    def _closed(self) -> Path:
        return self.folder / "closed.json"


def pair_rows(shard: str, items: Iterable[Sample | Rejection]) -> Iterator[dict[str, Any]]:
    """Rows of PAIR_SCHEMA for what a reader yields."""
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
    """One row of PAIR_SCHEMA, without what an encoder adds."""
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
    """A row of PAIR_SCHEMA that is no pair."""
    place = digest(f"{rejection.shard}\0{rejection.uid}\0{rejection.reason}".encode())
    return {
        "shard": rejection.shard,
        "uid": rejection.uid,
        "reason": rejection.reason,
        "own": True,
        "key": digest(rejection.uid.encode()),
        "tie": place,
        "image": bytes(16),
        "text": bytes(16),
    }


def table_of(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Rows of PAIR_SCHEMA as a table; what they lack is null."""
    return pa.Table.from_pylist(list(rows), schema=PAIR_SCHEMA)


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with other values in one column."""
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(values, field.type))


def write_chunk(path: Path, pairs: pa.Table, images: Floats, texts: Floats) -> None:
    """Write pairs (n) of PAIR_SCHEMA and their unit embeddings (n, D), in canonical order.

    D is 0 for pairs whose embeddings are provided apart. The CLIP score is taken before embeddings are rounded to float16.
    """
    cosine = np.einsum("nd,nd->n", images, texts, dtype=np.float32)
    pairs = set_column(pairs, "clip_score", cosine)
    order = np.lexsort((digests_of(pairs["tie"]), digests_of(pairs["key"])))
    write_sorted(path, pairs.take(pa.array(order)), [images[order], texts[order]])


def write_sorted(path: Path, pairs: pa.Table, vectors: Sequence[npt.NDArray[Any]]) -> None:
    """Write a chunk whose pairs (n) and two embeddings (n, D) are in canonical order already."""
    dimension = vectors[0].shape[1]
    kind = pa.list_(pa.float16(), dimension)
    schema = pa.schema([*PAIR_SCHEMA, *((name, kind) for name in VECTORS)])
    with arrow_file(path, schema) as file:
        for start in range(0, len(pairs), BATCH_ROWS):
            some = pairs.slice(start, BATCH_ROWS).combine_chunks()
            columns = [some[name].combine_chunks() for name in PAIR_SCHEMA.names]
            columns += [vector_column(values[start : start + BATCH_ROWS]) for values in vectors]
            file.write_batch(pa.record_batch(columns, schema=schema))


def read_chunk(path: Path) -> pa.Table:
    """The table of a chunk, memory-mapped: columns that are not used are not read."""
    with pa.memory_map(str(here(path))) as source:
        return pa.ipc.open_file(source).read_all()


def is_whole(path: Path) -> bool:
    """Whether a chunk is there, with the footer that was written last."""
    if is_stored(path):  # an object is put whole or not at all
        return is_file(path)
    with suppress(FileNotFoundError, pa.ArrowInvalid), pa.memory_map(str(path)) as source:
        pa.ipc.open_file(source)
        return True
    return False


@contextmanager
def arrow_file(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """A writer of record batches to a file that appears when all are written."""
    with (
        atomic_path(path) as aside,
        pa.OSFile(str(aside), "wb") as sink,
        pa.ipc.new_file(sink, schema) as file,
    ):
        yield file


def vector_column(values: npt.NDArray[Any]) -> pa.Array:
    """Embeddings (n, D) as a column of float16 lists of fixed size."""
    rows, dimension = values.shape
    kind = pa.list_(pa.float16(), dimension)
    if not dimension:
        return pa.FixedSizeListArray.from_buffers(kind, rows, [None], children=[pa.array([], pa.float16())])
    flat = pa.array(np.ascontiguousarray(values, np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def gathered(parts: Sequence[npt.NDArray[Any]], starts: npt.NDArray[np.int64], rows: Any) -> npt.NDArray[Any]:
    """Some rows (m,) of arrays (n, k) that lie one after another, each from its row of `starts` on: (m, k); no more is read."""
    values = np.empty((len(rows), parts[0].shape[1]), parts[0].dtype)
    owner = np.searchsorted(starts, rows, side="right") - 1
    for part in np.unique(owner):
        mine = owner == part
        values[mine] = parts[part][rows[mine] - starts[part]]
    return values


def vectors_of(column: Any) -> list[Halves]:
    """Embeddings of a column (n, D), a view of each of its batches."""
    batches = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    dimension = column.type.list_size
    return [batch.flatten().to_numpy().reshape(len(batch), dimension) for batch in batches]


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


def numbers_of(digests: Digests) -> npt.NDArray[np.int64]:
    """The first 63 bits of digests (n,): equal if and only if the content is, by all chance."""
    words = np.ascontiguousarray(digests).view("<u8").reshape(len(digests), 2)[:, 0]
    return (words & np.uint64(2**63 - 1)).astype(np.int64)


def dimension_of(chunks: Sequence[Path]) -> int:
    """The numbers in an embedding of the chunks; 0 where there is none."""
    return max((read_chunk(path)[VECTORS[0]].type.list_size for path in chunks[:1]), default=0)
