"""What there is to process: the pairs of each role, counted where the data is small, else estimated from its beginning."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import fsspec
import pyarrow.parquet as pq

from influencespace.config import RunConfig
from influencespace.data.imported import EmbeddingBatch, import_options, list_chunks, read_imported_embeddings
from influencespace.data.readers import read_shard
from influencespace.data.schema import ReadOptions, Sample, Shard
from influencespace.errors import InputError
from influencespace.models.encoders import embedding_dimension
from influencespace.stages.ingest.shards import LOOKUPS, file_version, shards_of

# Bytes of shards that are read for a role (a second or two from a disk); a smaller data set is counted exactly.
INDEX_BYTES = 64 * 2**20
COCO_IMAGE_BYTES = 163_000  # mean of train2017


@dataclass(frozen=True, kw_only=True)
class SetSize:
    """What the data of one role holds; an estimate where not all shards were read."""

    shards: int
    shards_read: int
    """Shards that were read whole."""
    bytes: int
    pairs: int
    dimension: int
    """Numbers of an embedding."""

    @property
    def exact(self) -> bool:
        return self.shards_read == self.shards

    def scaled(self, pairs: int) -> "SetSize":
        """Like data of so many pairs."""
        return replace(self, pairs=pairs, bytes=round(self.bytes * pairs / self.pairs))

    @property
    def embedding_bytes(self) -> int:
        """Of the float16 embeddings of image and caption of every pair."""
        return 2 * 2 * self.dimension * self.pairs


def dataset_stats(config: RunConfig) -> dict[str, SetSize]:
    """The size of every role that has data of its own; raises InputError for data or an encoder that cannot be used."""
    embed, embeddings = config.embed, config.data.embeddings
    listed = {role: shards for role, shards in shards_of(config).items() if shards}
    provided = (
        {} if embeddings is None else {"pool": embedding_stats(embeddings, embed.read, "pool" in listed)}
    )
    dimension = (
        provided["pool"].dimension
        if provided
        else embedding_dimension(embed.encoder, embed.trust_remote_code)
    )
    return provided | {role: shard_stats(shards, embed.read, dimension) for role, shards in listed.items()}


def shard_stats(shards: Sequence[Shard], read: ReadOptions, dimension: int) -> SetSize:
    """Read the first shards, INDEX_BYTES of them or a little more, and extrapolate by bytes.

    Raises InputError when they hold no pair.
    """
    weights = _weights(shards)
    pairs, shards_read, covered = 0, 0, 0.0
    for shard, weight in zip(shards, weights):
        portion = 1.0
        for item in read_shard(shard, read):
            if not isinstance(item, Sample):
                continue
            pairs += len(item.captions)
            # Only the beginning of a huge tar is read; other files come as shards of moderate size.
            if item.ref.offset > INDEX_BYTES:
                portion = min(1.0, (item.ref.offset + item.ref.length) / weight)
                break
        shards_read += portion == 1.0
        covered += portion * weight
        if covered >= INDEX_BYTES:
            break
    if not pairs:
        raise InputError(f"no usable pair in {shards[0].path} or the shards after it; is it the right data?")
    factor = 1.0 if shards_read == len(shards) else sum(weights) / covered
    return SetSize(
        shards=len(shards),
        shards_read=shards_read,
        bytes=round(sum(weights)),
        pairs=round(factor * pairs),
        dimension=dimension,
    )


def embedding_stats(path: str, read: ReadOptions, joined: bool) -> SetSize:
    """The rows that the metadata of imported embeddings counts; raises InputError when there is no usable pair."""
    chunks = list_chunks(path)
    files = {name for chunk in chunks for name in (chunk.metadata, chunk.images, chunk.texts) if name}
    batches = read_imported_embeddings(path, import_options(read, joined=joined))
    batch = next((batch for batch in batches if isinstance(batch, EmbeddingBatch)), None)
    if batch is None:
        raise InputError(f"{path} holds no usable pair")
    pairs = sum(_rows_of(chunk.metadata) for chunk in chunks)
    return SetSize(
        shards=len(chunks),
        shards_read=len(chunks),
        bytes=sum(map(_size, files)),
        pairs=pairs,
        dimension=batch.images.shape[1],
    )


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
