"""Embeddings that the user has already, made into the same artifact that the embed stage writes."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from influencespace.data.artifacts import Manifest, fingerprint, reopen
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
    ImportOptions,
    import_options,
    list_parts,
    read_imported_embeddings,
)
from influencespace.data.merge import MergeReport, ProvidedEmbeddings
from influencespace.data.schema import ImageRef, ReadOptions, Rejection, Shard
from influencespace.data.uids import digest
from influencespace.engine.local import Engine, run_once
from influencespace.errors import InputError
from influencespace.stages.finish import finished_stage
from influencespace.stages.ingest.embed import conclude, finish
from influencespace.stages.ingest.index import file_version, index, shard_identities

# Pairs in one part: with embeddings of 512 numbers, 64 MB in each of the two towers.
PART_PAIRS = 32_768


def import_embeddings(
    path: str,
    out: Path,
    engine: Engine,
    *,
    shards: Sequence[Shard] = (),
    read: ReadOptions | None = None,
    options: ImportOptions | None = None,
) -> Manifest:
    """Make the artifact `out` of the embeddings at `path`; does nothing where that is done already.

    With `shards`, the pairs are those of the shards, joined by uid; a pair without an embedding is rejected,
    and embeddings of unknown uids are counted. Without, the pairs are those of `path`, and have no pictures.
    Raises InputError when nothing usable is found.
    """
    started = time.monotonic()
    read = read or ReadOptions()
    options = replace(options or import_options(read, joined=bool(shards)), batch_rows=PART_PAIRS)
    files = {name for part in list_parts(path) for name in (part.metadata, part.images, part.texts) if name}
    inputs = {"embeddings": fingerprint([file_version(name) for name in sorted(files)])}
    if shards:
        inputs["data"] = fingerprint(sorted(shard_identities(shards)))
    mark = fingerprint({"stage": "import", "config": [options, read, "sharpness"], "inputs": inputs})
    if (finished := finished_stage(out, mark)) is not None:
        return finished
    parts = reopen(out) / "parts"
    index_parts = [task.index_part for task in index(shards, read, parts, engine)] if shards else []
    done = run_once(engine, partial(_import, path, options, out, index_parts))
    draft = Manifest(stage="embed", fingerprint=mark, inputs=inputs)
    return conclude(out, done, draft, started, keep_parts=False)


def _import(
    path: str, options: ImportOptions, out: Path, index_parts: Sequence[Path]
) -> tuple[MergeReport, dict[str, str]]:
    batches = read_imported_embeddings(path, options)
    if not index_parts:
        alone = _Alone(out / "parts")
        alone.add(batches)
        return finish(out, alone.index_parts, alone.embed_parts)
    joined = _Joined(out / "parts", index_parts)
    given = joined.add(batches)
    counted, files = finish(out, joined.index_parts, joined.embed_parts, given)
    details = counted.details | {"unmatched_embeddings": joined.unmatched}
    return replace(counted, details=details), files


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
