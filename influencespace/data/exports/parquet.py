"""Parquet files of the kept pairs: uid, image (encoded bytes), caption, weight, score, group."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import Manifest
from influencespace.data.exports.folder import (
    DEFAULT_SHARD_SIZE,
    Advance,
    KeptPair,
    ShardFormat,
    ignore,
    write_shards,
)

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("weight", pa.float32()),
        ("score", pa.float32()),
        ("group", pa.string()),
    ]
)

# A row group ends at the first of these: it is what readers hold in memory, or skip.
GROUP_BYTES = 32 * 2**20
GROUP_ROWS = 1_000


def export_parquet(
    run: Path | str,
    out: Path | str,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    advance: Advance = ignore,
) -> Manifest:
    """Write the kept pairs as files `00000000.parquet ...`, pictures as they came. Raises InputError as `export`."""
    form = ShardFormat(name="parquet", suffix="parquet", write=_write)
    return write_shards(Path(run), Path(out), form, shard_size, advance)


def _write(path: Path, pairs: Iterator[KeptPair]) -> None:
    # Pictures are compressed already, and no two are alike.
    compression = {name: "none" if name == "image" else "zstd" for name in SCHEMA.names}
    with pq.ParquetWriter(path, SCHEMA, compression=compression, use_dictionary=["group"]) as writer:
        for group in _row_groups(pairs):
            columns = [[getattr(pair, name) for pair in group] for name in SCHEMA.names]
            writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=len(group))


def _row_groups(pairs: Iterator[KeptPair]) -> Iterator[list[KeptPair]]:
    group: list[KeptPair] = []
    size = 0
    for pair in pairs:
        group.append(pair)
        size += len(pair.image)
        if size >= GROUP_BYTES or len(group) >= GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group
