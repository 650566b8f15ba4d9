"""What there is to process: the pairs of each role, counted where the data is small, else estimated from its beginning."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.config import RunConfig
from influencespace.data.chunks import pair_rows
from influencespace.data.imported import (
    EmbeddingBatch,
    ImportOptions,
    import_options,
    list_parts,
    read_imported_embeddings,
)
from influencespace.data.merge import PAIRS_SCHEMA
from influencespace.data.readers import read_shard
from influencespace.data.schema import ReadOptions, Sample, Shard
from influencespace.errors import InputError
from influencespace.models.encoders import embedding_dimension
from influencespace.pipeline import shards_of
from influencespace.stages.ingest.index import LOOKUPS, file_version
from influencespace.stages.proxies.proxies import MIN_GROUP_IMAGES

# Bytes of shards that are indexed for a role (a second or two from a disk); a smaller data set is counted exactly.
INDEX_BYTES = 64 * 2**20
SAMPLE_ROWS = 8192
COCO_IMAGE_BYTES = 163_000  # mean of train2017


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the data of one role holds; an estimate where not all shards were indexed."""

    shards: int
    indexed: int
    """Shards that were indexed whole."""
    bytes: int
    pairs: int
    images: int
    """Distinct ones."""
    texts: int
    """Distinct ones."""
    row_bytes: float
    """Of a row of pairs.parquet."""
    uid_bytes: float
    image_bytes: float
    """Of an encoded image; 0 where there are no pictures."""
    groups: tuple[float, ...] = ()
    """Images of each group that is named, in proportion to the pairs looked at."""

    @property
    def exact(self) -> bool:
        return self.indexed == self.shards


@dataclass(frozen=True, kw_only=True)
class SetSize:
    """Pairs of the pool, target or test set, once they are split."""

    pairs: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The amounts on which every need depends."""

    surveys: Mapping[str, Survey]  # of the roles that have data of their own
    roles: Mapping[str, SetSize]  # pool, target, test
    dimension: int  # D

    @property
    def target_groups(self) -> bool:
        """Whether the target names two groups or more that are large enough to be served."""
        source = self.surveys["target" if "target" in self.surveys else "pool"]
        share = self.roles["target"].images / source.images
        return sum(share * images >= 2 * MIN_GROUP_IMAGES for images in source.groups) > 1


def survey_all(config: RunConfig) -> Sizes:
    """The sizes of a run of `config`; raises InputError for data or an encoder that cannot be used."""
    listed = shards_of(config)
    dimension = (
        embedding_dimension(config.embed.encoder, config.embed.trust_remote_code)
        if config.embed.encoder
        else 0
    )
    surveys = {role: survey(shards, config.embed.read) for role, shards in listed.items()}
    if config.data.embeddings is not None:
        options = import_options(config.embed.read, joined="pool" in listed)
        imported, dimension = survey_embeddings(config.data.embeddings, options)
        surveys.setdefault("pool", imported)
    return Sizes(surveys=surveys, roles=after_split(config, surveys), dimension=dimension)


def after_split(config: RunConfig, surveys: Mapping[str, Survey]) -> dict[str, SetSize]:
    """Pairs of each role after the split stage: what has no data of its own is cut from the others."""
    roles = {role: SetSize(pairs=found.pairs, images=found.images) for role, found in surveys.items()}
    if "target" not in roles:
        drawn = 1 / config.split.parts
        pool = roles["pool"]
        roles["pool"], roles["target"] = _part(pool, 1 - drawn), _part(pool, drawn / 2)
    if "test" not in roles:
        roles["target"] = roles["test"] = _part(roles["target"], 0.5)
    return roles


def survey(shards: Sequence[Shard], read: ReadOptions) -> Survey:
    """Index the first shards, INDEX_BYTES of them or a little more, and extrapolate by bytes.

    Raises InputError when they hold no pair.
    """
    weights = _weights(shards)
    rows: list[dict[str, Any]] = []
    images: set[bytes] = set()
    texts: set[bytes] = set()
    pairs, samples, encoded, indexed, covered = 0, 0, 0, 0, 0.0
    for shard, weight in zip(shards, weights):
        portion = 1.0
        for item in read_shard(shard, read):
            if not isinstance(item, Sample):
                continue
            samples, encoded = samples + 1, encoded + len(item.image)
            for row in pair_rows(shard.path, [item]):
                pairs += 1
                images.add(row["image"])
                texts.add(row["text"])
                if len(rows) < SAMPLE_ROWS:
                    rows.append(row)
            # Of a huge tar the beginning must do; other files come as shards of moderate size.
            if item.ref.offset > INDEX_BYTES:
                portion = min(1.0, (item.ref.offset + item.ref.length) / weight)
                break
        indexed += portion == 1.0
        covered += portion * weight
        if covered >= INDEX_BYTES:
            break
    if not pairs:
        raise InputError(f"no usable pair in {shards[0].path} or the shards after it; is it the right data?")
    factor = 1.0 if indexed == len(shards) else sum(weights) / covered
    return Survey(
        shards=len(shards),
        indexed=indexed,
        bytes=round(sum(weights)),
        pairs=round(factor * pairs),
        images=round(factor * len(images)),
        texts=round(factor * len(texts)),
        row_bytes=_row_bytes(rows),
        uid_bytes=float(np.mean([len(row["uid"]) for row in rows])),
        image_bytes=encoded / samples,
        groups=group_images([(row["group"], row["image"]) for row in rows], factor * pairs),
    )


def group_images(seen: Sequence[tuple[str | None, Any]], pairs: float) -> tuple[float, ...]:
    """Images of each group in `pairs` pairs, of some of which the group and the image were seen."""
    sizes = Counter(group for group, _ in set(seen) if group is not None)
    return tuple(size * pairs / len(seen) for size in sizes.values())


def survey_embeddings(path: str, options: ImportOptions) -> tuple[Survey, int]:
    """The rows that the metadata of imported embeddings counts, and the embeddings' dimension.

    Raises InputError when nothing usable is found.
    """
    parts = list_parts(path)
    files = sorted({name for part in parts for name in (part.metadata, part.images, part.texts) if name})
    batch = next((b for b in read_imported_embeddings(path, options) if isinstance(b, EmbeddingBatch)), None)
    if batch is None:
        raise InputError(f"{path} holds no usable pair")
    captions = batch.captions or [""] * len(batch.uids)
    pairs = sum(_rows_of(part.metadata) for part in parts)
    found = Survey(
        shards=len(parts),
        indexed=len(parts),
        bytes=sum(_size(name) for name in files),
        pairs=pairs,
        images=pairs,
        texts=pairs,
        row_bytes=_row_bytes([{"uid": uid, "caption": text} for uid, text in zip(batch.uids, captions)]),
        uid_bytes=float(np.mean([len(uid) for uid in batch.uids])),
        image_bytes=0.0,
        groups=group_images(list(zip(batch.groups or [None] * len(batch.uids), batch.uids)), pairs),
    )
    return found, batch.images.shape[1]


def _part(amount: SetSize, share: float) -> SetSize:
    return SetSize(pairs=round(share * amount.pairs), images=round(share * amount.images))


def _weights(shards: Sequence[Shard]) -> list[float]:
    """Bytes of each shard; shards of one Parquet file share its size, ranges of pictures count as many usual ones."""
    sharing = Counter(shard.path for shard in shards)
    with ThreadPoolExecutor(LOOKUPS) as executor:
        sizes = dict(zip(sharing, executor.map(_size, sharing)))
    return [
        (shard.rows[1] - shard.rows[0]) * COCO_IMAGE_BYTES
        if shard.rows
        else sizes[shard.path] / sharing[shard.path]
        for shard in shards
    ]


def _size(path: str) -> int:
    return int(file_version(path)["size"])


def _rows_of(path: str) -> int:
    with fsspec.open(path, "rb") as file:
        return int(pq.read_metadata(file).num_rows)


def _row_bytes(rows: Sequence[Mapping[str, Any]]) -> float:
    """Bytes of a row of pairs.parquet: a sample is written and measured."""
    generator = np.random.default_rng(0)
    columns = {name: pa.array([row.get(name) for row in rows]) for name in PAIRS_SCHEMA.names}
    columns |= {name: pa.array(generator.permutation(len(rows))) for name in ("image", "text")}
    columns["clip_score"] = pa.array(generator.random(len(rows), np.float32))
    columns["truncated"] = pa.array(np.zeros(len(rows), bool))
    columns["sharpness"] = pa.array(generator.random(len(rows), np.float32))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).cast(PAIRS_SCHEMA), sink)
    return float(sink.getvalue().size / len(rows))
