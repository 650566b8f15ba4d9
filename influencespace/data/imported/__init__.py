"""Embeddings that the user already has, as pairs: uids, unit vectors, and the captions and groups beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from influencespace.data.captions import label
from influencespace.data.imported.files import (
    UID_COLUMNS,
    Floats,
    ImportedChunk,
    ImportOptions,
    list_chunks,
    read_blocks,
)
from influencespace.data.readers.parquet import raise_unless_damage, values_of
from influencespace.data.schema import ReadOptions, Rejection, printable
from influencespace.data.uids import digest
from influencespace.errors import InputError

__all__ = ["EmbeddingBatch", "ImportOptions", "import_options", "list_chunks", "read_imported_embeddings"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingBatch:
    """Some pairs with their embeddings, of unit length."""

    uids: list[str]
    images: Floats  # (n, D)
    texts: Floats  # (n, D)
    captions: list[str] | None = None
    """None when the data has none; one that is missing is empty."""
    groups: list[str | None] | None = None


def import_options(read: ReadOptions, joined: bool) -> ImportOptions:
    """The part of `embed.read` that concerns imported embeddings: none where it describes shards (`joined`)."""
    if joined:
        return ImportOptions()
    uid = read.uid_column if read.uid_column != ReadOptions.uid_column else None
    return ImportOptions(uid_column=uid, group_column=read.group_column)


def read_imported_embeddings(
    path: str, options: ImportOptions | None = None
) -> Iterator[EmbeddingBatch | Rejection]:
    """All pairs of a folder, file, glob or URL of embeddings, in batches, each uid once.

    A pair with a missing, zero or non-finite embedding, without a uid, or with the uid of an earlier one is a
    Rejection. The uids seen are remembered, in about 100 bytes each. Raises InputError as `list_chunks` and
    `read_chunk` do, and when the chunks differ in dimension.
    """
    seen: set[bytes] = set()
    dimension = 0
    for chunk in list_chunks(path):
        for batch in read_chunk(chunk, options):
            if isinstance(batch, Rejection):
                yield batch
                continue
            dimension = dimension or batch.images.shape[1]
            if batch.images.shape[1] != dimension:
                raise InputError(
                    f"{chunk.metadata} has embeddings of {batch.images.shape[1]} numbers, those before it "
                    f"of {dimension}. Import the output of one encoder at a time."
                )
            yield from _without_repeats(batch, seen, chunk)


def read_chunk(
    chunk: ImportedChunk, options: ImportOptions | None = None
) -> Iterator[EmbeddingBatch | Rejection]:
    """The pairs of one chunk in batches; repeated uids are not looked for.

    The rest of a damaged chunk is one Rejection. Raises InputError when columns or arrays are missing, of the
    wrong type, or differ in length or dimension: then rows cannot be trusted to belong together.
    """
    options = options or ImportOptions()
    row, blocks = 0, read_blocks(chunk, options)
    while True:
        try:
            block = next(blocks, None)
        except InputError:
            raise
        except UnicodeDecodeError as error:
            raise InputError(f"{chunk.metadata}: the name of a column is not UTF-8 ({error})") from None
        except (
            Exception
        ) as error:  # of hostile bytes zipfile, its decompressors and numpy make almost anything
            raise_unless_damage(error)
            reason = f"damaged, the rows from {row} on are lost: {error or type(error).__name__}"
            yield Rejection(shard=chunk.metadata, uid=f"row {row}", reason=reason)
            return
        if block is None:
            return
        yield from _judge(chunk, options, row, *block)
        row += len(block[1])


def _without_repeats(
    batch: EmbeddingBatch, seen: set[bytes], chunk: ImportedChunk
) -> Iterator[EmbeddingBatch | Rejection]:
    new = []
    for i, uid in enumerate(batch.uids):
        if (key := digest(uid.encode())) in seen:
            yield Rejection(shard=chunk.metadata, uid=uid, reason="an earlier pair has the same uid")
        else:
            seen.add(key)
            new.append(i)
    if new:
        yield EmbeddingBatch(
            uids=[batch.uids[i] for i in new],
            images=batch.images[new],
            texts=batch.texts[new],
            captions=batch.captions and [batch.captions[i] for i in new],
            groups=batch.groups and [batch.groups[i] for i in new],
        )


def _judge(
    chunk: ImportedChunk, options: ImportOptions, first_row: int, table: Any, images: Floats, texts: Floats
) -> Iterator[EmbeddingBatch | Rejection]:
    """The usable rows of a block, if any, then a Rejection for each other."""
    norms = [np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (images, texts)]
    usable: dict[int, str] = {}
    rejections = []
    for i, value in enumerate(_column(table, _uid_column(table.schema.names, chunk, options)) or []):
        try:
            uid = label(value, "uid")
            problem = "the pair has no uid" if uid is None else ""
        except ValueError as error:
            uid, problem = None, str(error)
        for kind, norm in zip(("image", "text"), norms):
            if not problem and (norm[i] == 0 or not np.isfinite(norm[i])):
                problem = f"the {kind} embedding is missing, incomplete, zero or not finite"
        if problem or uid is None:
            uid = uid or f"row {first_row + i}"
            rejections.append(Rejection(shard=chunk.metadata, uid=uid, reason=problem))
        else:
            usable[i] = uid
    if usable:
        rows = list(usable)
        units = [(x[rows] / n[rows, None]).astype(np.float32) for x, n in zip((images, texts), norms)]
        captions = _column(table, next((n for n in ("caption", "text") if n in table.schema.names), ""))
        groups = _column(table, options.group_column)
        yield EmbeddingBatch(
            uids=list(usable.values()),
            images=units[0],
            texts=units[1],
            captions=None if captions is None else [_text(captions[i]) or "" for i in rows],
            groups=None if groups is None else [_text(groups[i]) for i in rows],
        )
    yield from rejections


def _uid_column(names: list[str], chunk: ImportedChunk, options: ImportOptions) -> str:
    wanted = [options.uid_column] if options.uid_column else list(UID_COLUMNS)
    for name in wanted:
        if name in names:
            return name
    raise InputError(
        f"{chunk.metadata}: no column {' or '.join(wanted)}. It has {', '.join(names)}. "
        "Name the one that identifies a pair as embed.read.uid_column, or uid where the pairs are those of shards."
    )


def _column(table: Any, name: str) -> list[object] | None:
    if name not in table.schema.names:
        return None
    return values_of(table.column(name))


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else printable(str(value))
