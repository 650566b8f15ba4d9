"""Embeddings that the user has already, made into the same artifact that the embed stage writes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from influencespace.data.artifacts import fingerprint
from influencespace.data.chunks import (
    DIGEST,
    Digests,
    Embedded,
    Floats,
    digests_of,
    find,
    is_pair,
    pair_row,
    read_index,
    rejected_row,
    write_embedded,
    write_index,
)
from influencespace.data.imported import (
    EmbeddingBatch,
    import_options,
    list_chunks,
    read_imported_embeddings,
)
from influencespace.data.merge import MergeReport, ProvidedEmbeddings, merge
from influencespace.data.schema import ImageRef, ReadOptions, Rejection
from influencespace.data.uids import digest
from influencespace.errors import InputError
from influencespace.stages.ingest.shards import file_version

# Pairs in one chunk: with embeddings of 512 numbers, 64 MB in each of the two towers.
CHUNK_PAIRS = 32_768


def imported_identity(path: str) -> dict[str, str]:
    """The fingerprint of the files that hold embeddings; raises InputError where there are none."""
    files = {name for part in list_chunks(path) for name in (part.metadata, part.images, part.texts) if name}
    return {"embeddings": fingerprint([file_version(name) for name in sorted(files)])}


def import_chunks(
    path: str, read: ReadOptions, chunks: Path, index_chunks: Sequence[Path], out: Path
) -> MergeReport:
    """Make the artifact `out` of the embeddings at `path`.

    With indexed shards, the pairs are those of the shards, joined by uid; a pair without an embedding is rejected,
    and embeddings of unknown uids are counted. Without, the pairs are those of `path`, and have no pictures.
    Raises InputError when nothing usable is found.
    """
    options = replace(import_options(read, joined=bool(index_chunks)), batch_rows=CHUNK_PAIRS)
    batches = read_imported_embeddings(path, options)
    if not index_chunks:
        alone = _Alone(chunks / "provided")
        alone.add(batches)
        return merge(out, alone.index_parts, alone.embed_parts)
    joined = _Joined(chunks / "provided", index_chunks)
    provided = joined.add(batches)
    report = merge(out, joined.index_parts, joined.embed_parts, provided)
    return replace(report, details=report.details | {"unmatched_embeddings": joined.unmatched})


class _Alone:
    """Parts of embeddings that come without shards: equal vectors are one image, or one caption."""

    def __init__(self, parts: Path) -> None:
        self.parts = parts
        self.index_parts: list[Path] = []
        self.embed_parts: list[Path] = []

    def add(self, batches: Iterable[EmbeddingBatch | Rejection]) -> None:
        rejections = []
        for batch in batches:
            if isinstance(batch, Rejection):
                rejections.append(batch)
                continue
            images, texts = _row_digests(batch.images), _row_digests(batch.texts)
            number = len(self.embed_parts)
            self.embed_parts.append(self.parts / f"import-{number:05d}.embed.arrow")
            write_embedded(
                self.embed_parts[-1], "", _distinct(images, batch.images), _distinct(texts, batch.texts)
            )
            self._write_index(_imported_rows(batch, images, texts))
        if not self.embed_parts and not rejections:
            raise InputError("the imported files hold no pair")
        self._write_index(rejected_row(rejection) for rejection in rejections)

    def _write_index(self, rows: Iterable[dict[str, Any]]) -> None:
        self.index_parts.append(self.parts / f"import-{len(self.index_parts):05d}.index.arrow")
        write_index(self.index_parts[-1], "", rows)


def _imported_rows(batch: EmbeddingBatch, images: Digests, texts: Digests) -> Iterable[dict[str, Any]]:
    nowhere = ImageRef(path="")
    image_bytes, text_bytes = images.tobytes(), texts.tobytes()
    for row, uid in enumerate(batch.uids):
        yield pair_row(
            shard="",
            uid=uid,
            own=True,
            caption=batch.captions[row] if batch.captions is not None else "",
            image=image_bytes[16 * row : 16 * row + 16],
            text=text_bytes[16 * row : 16 * row + 16],
            ref=nowhere,
            group=batch.groups[row] if batch.groups is not None else None,
        )


@dataclass(frozen=True, kw_only=True)
class _Known:
    """The pairs of the shards, sorted by the digest of their uid."""

    keys: Digests
    images: Digests
    texts: Digests


class _Joined:
    """Parts of embeddings whose pairs come from shards."""

    def __init__(self, parts: Path, index_parts: Sequence[Path]) -> None:
        self.parts = parts
        self.known = _known(index_parts)
        self.index_parts = list(index_parts)
        self.embed_parts: list[Path] = []
        self.unmatched = 0

    def add(self, batches: Iterable[EmbeddingBatch | Rejection]) -> ProvidedEmbeddings:
        keys, refused, rejections = [np.zeros(0, DIGEST)], {}, []
        for batch in batches:
            if isinstance(batch, Rejection):
                refused[digest(batch.uid.encode())] = batch.reason
                rejections.append(batch)
                continue
            uids = np.frombuffer(b"".join(digest(uid.encode()) for uid in batch.uids), DIGEST)
            places = find(self.known.keys, uids)
            known = places >= 0
            self.unmatched += int((~known).sum())
            keys.append(uids[known])
            self.embed_parts.append(self.parts / f"import-{len(self.embed_parts):05d}.embed.arrow")
            write_embedded(
                self.embed_parts[-1],
                "",
                _distinct(self.known.images[places[known]], batch.images[known]),
                _distinct(self.known.texts[places[known]], batch.texts[known]),
            )
        named = find(self.known.keys, np.array([digest(r.uid.encode()) for r in rejections], DIGEST)) >= 0
        # rows without a uid, the rest of a damaged file, foreign uids again
        strangers = [rejection for rejection, known in zip(rejections, named) if not known]
        if strangers:
            self.index_parts.append(self.parts / "import-rejected.index.arrow")
            write_index(self.index_parts[-1], "", map(rejected_row, strangers))
        return ProvidedEmbeddings(keys=np.sort(np.concatenate(keys)), refused=refused)


def _known(index_parts: Sequence[Path]) -> _Known:
    columns: dict[str, list[Digests]] = {"key": [], "image": [], "text": []}
    for path in index_parts:
        table = read_index(path, [*columns, "reason"])
        for name, held in columns.items():
            held.append(digests_of(table[name])[is_pair(table)])
    whole = {name: np.concatenate(held) for name, held in columns.items()}
    order = np.argsort(whole["key"], kind="stable")
    return _Known(keys=whole["key"][order], images=whole["image"][order], texts=whole["text"][order])


def _distinct(digests: Digests, embeddings: Floats) -> Embedded:
    """One row for each digest: the first."""
    distinct, first = np.unique(digests, return_index=True)
    return Embedded(
        digests=distinct,
        embeddings=embeddings[first],
        truncated=np.zeros(len(distinct), bool),
        reasons=[None] * len(distinct),
        sharpness=np.full(len(distinct), np.nan, np.float32),
    )


def _row_digests(embeddings: Floats) -> Digests:
    return np.frombuffer(b"".join(digest(row.tobytes()) for row in embeddings), DIGEST)
