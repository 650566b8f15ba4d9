"""Parquet files of the kept pairs: uid, image (encoded bytes), caption, weight, score, group."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.exports.folder import KeptPair

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


def write_parquet(path: Path, pairs: Iterator[KeptPair]) -> None:
    """Write a file of SCHEMA, pictures as they came."""
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
