"""Embeddings that the user has already: the same chunks that the encoders write, file by file, continued where it stopped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from influencespace.data.artifacts import fingerprint
from influencespace.data.chunks import (
    ChunkFolder,
    is_whole,
    pair_row,
    pair_rows,
    rejected_row,
    table_of,
    write_chunk,
)
from influencespace.data.imported import EmbeddingBatch, ImportOptions, list_chunks, read_chunk
from influencespace.data.imported.files import ImportedChunk
from influencespace.data.readers import read_shard
from influencespace.data.schema import ImageRef, ReadOptions, Rejection
from influencespace.data.uids import digest
from influencespace.engine.placement import LIBRARY_BYTES
from influencespace.errors import InputError
from influencespace.stages.ingest.decode import ShardTask
from influencespace.stages.ingest.shards import file_version

# Pairs in one chunk: with embeddings of 512 numbers, 64 MB in each of the two towers.
CHUNK_PAIRS = 32_768


# Numbers in an embedding, where no file was opened yet.
USUAL_DIMENSION = 768


def import_bytes(dimension: int = USUAL_DIMENSION) -> int:
    """Memory that a task takes which writes chunks of imported embeddings, in bytes: a chunk as it is read, joined, sorted and
    written."""
    return LIBRARY_BYTES + CHUNK_PAIRS * (8000 + 48 * dimension)


def files_of(chunk: ImportedChunk) -> list[str]:
    """The files of one imported chunk."""
    return sorted({name for name in (chunk.metadata, chunk.images, chunk.texts) if name})


def imported_identity(path: str) -> dict[str, str]:
    """The fingerprint of the files that hold embeddings; raises InputError where there are none."""
    files = sorted({name for chunk in list_chunks(path) for name in files_of(chunk)})
    return {"embeddings": fingerprint([file_version(name) for name in files])}


@dataclass(frozen=True, kw_only=True)
class ImportFile:
    """Task: the chunks of one file of embeddings, those aside that are there; equal vectors are one image, or one caption.

    Returns its name, and the numbers in an embedding, 0 where it has none.
    """

    source: ImportedChunk
    options: ImportOptions
    chunks: ChunkFolder

    @property
    def name(self) -> str:
        return self.source.metadata

    def __call__(self) -> tuple[str, int]:
        number = rows = dimension = 0
        rejections: list[Rejection] = []
        for item in read_chunk(self.source, self.options):
            if isinstance(item, Rejection):
                rejections.append(item)
                continue
            dimension = item.images.shape[1]
            rows += self._write(number, item, rejections)
            number, rejections = number + 1, []
        if rejections:
            rows += self._write(number, _nothing(dimension), rejections)
            number += 1
        self.chunks.close(number, rows)
        return self.name, dimension

    def _write(self, number: int, batch: EmbeddingBatch, rejections: Sequence[Rejection]) -> int:
        chunk = self.chunks.chunk(number)
        if not is_whole(chunk):
            lost = np.zeros((len(rejections), batch.images.shape[1]), np.float32)
            rows = [*_imported_rows(batch, self.source.metadata), *map(rejected_row, rejections)]
            images, texts = (np.concatenate([values, lost]) for values in (batch.images, batch.texts))
            write_chunk(chunk, table_of(rows), images, texts)
        return len(batch.uids) + len(rejections)


def _nothing(dimension: int) -> EmbeddingBatch:
    empty = np.zeros((0, dimension), np.float32)
    return EmbeddingBatch(uids=[], images=empty, texts=empty)


def _imported_rows(batch: EmbeddingBatch, source: str) -> Iterator[dict[str, Any]]:
    nowhere = ImageRef(path="")
    for row, uid in enumerate(batch.uids):
        yield pair_row(
            shard=source,
            uid=uid,
            own=True,
            caption=batch.captions[row] if batch.captions is not None else "",
            image=digest(batch.images[row].tobytes()),
            text=digest(batch.texts[row].tobytes()),
            ref=nowhere,
            group=batch.groups[row] if batch.groups is not None else None,
        ) | {"truncated": False}


@dataclass(frozen=True, kw_only=True)
class IndexShard:
    """Task: the chunks of a shard whose embeddings are provided apart: pairs without decoding; 0, as `ImportFile`."""

    read: ReadOptions
    task: ShardTask

    @property
    def name(self) -> str:
        return self.task.name

    def __call__(self) -> tuple[str, int]:
        number = rows = 0
        found = pair_rows(self.task.name, read_shard(self.task.shard, self.read, seed=self.task.seed))
        while some := list(islice(found, CHUNK_PAIRS)):
            table = table_of(row | {"truncated": False} for row in some)
            nothing = np.zeros((len(table), 0), np.float32)
            if not is_whole(self.task.chunks.chunk(number)):
                write_chunk(self.task.chunks.chunk(number), table, nothing, nothing)
            number, rows = number + 1, rows + len(table)
        self.task.chunks.close(number, rows)
        return self.name, 0


def same_dimension(dimensions: Sequence[tuple[str, int]]) -> int:
    """The numbers in an embedding of all files, by name; raises InputError where files differ or hold no pair."""
    known = [(name, dimension) for name, dimension in dimensions if dimension]
    if not known:
        raise InputError("the imported files hold no pair")
    for name, dimension in known:
        if dimension != known[0][1]:
            raise InputError(
                f"{name} has embeddings of {dimension} numbers, {known[0][0]} of {known[0][1]}. "
                "Import the output of one encoder at a time."
            )
    return known[0][1]
