"""From chunks to the embedding artifact: buckets of pairs in one canonical order that no shard, worker or chunk size changes.

A bucket is a range of the digests of uids, merged by one task from the chunks' rows of that range: whatever the size of the
pool, a task holds one bucket's thin columns and some rows of its embeddings.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from influencespace.data.artifacts import atomic_path, write_json
from influencespace.data.bucket_files import (
    BUCKET_PAIRS,
    PAIRS_SCHEMA,
    REJECTED_SCHEMA,
    bucket_folder,
    group_names,
    write_bucket_files,
)
from influencespace.data.chunks import (
    BATCH_ROWS,
    DIGEST,
    VECTORS,
    Digests,
    Halves,
    digests_of,
    numbers_of,
    read_chunk,
    vector_column,
    vectors_of,
    write_sorted,
)
from influencespace.data.mirror import here, is_file

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Rows that are merged into a run while a chunk is opened for one more bucket (8 us a row, .4 ms; on one core, 512 numbers).
ROWS_OF_READ = 50
# Thin columns of a row with captions and paths of ordinary length, in all the forms that a merge makes of them.
ROW_BYTES = 3000
# Chunks merged into one run, and their rows, about: they are in memory.
RUN_CHUNKS, RUN_ROWS = 256, 200_000


@dataclass(frozen=True, kw_only=True)
class BucketReport:
    """What became of the rows of one bucket, or of all together."""

    rows_in: int = 0
    rejected: int = 0
    truncated: int = 0
    copies: int = 0
    unmatched: int = 0
    buckets: list[int] = field(default_factory=list)
    """Pairs of each bucket."""
    groups: list[str] = field(default_factory=list)

    def __add__(self, other: "BucketReport") -> "BucketReport":
        summed = ("rows_in", "rejected", "truncated", "copies", "unmatched")
        return BucketReport(
            **{name: getattr(self, name) + getattr(other, name) for name in summed},
            buckets=self.buckets + other.buckets,
            groups=sorted({*self.groups, *other.groups}),
        )


def merge_bytes(rows: int, dimension: int, provided: bool = False) -> int:
    """Memory that a task takes which merges so many rows, in bytes: thin columns as they are read, sorted and taken apart, and
    embeddings, by memory map or, of a run and where they are provided, in memory."""
    vectors = 4 * dimension
    return (1 + provided) * rows * (ROW_BYTES + vectors) + rows * vectors + 4 * BATCH_ROWS * vectors


def chunks_of_run(rows: int, chunks: int, buckets: int) -> int:
    """How many chunks of so many rows together are first merged into one run; 0 where buckets had better open chunks."""
    if (buckets - 1) * chunks * ROWS_OF_READ <= rows:
        return 0
    return max(2, min(RUN_CHUNKS, RUN_ROWS * chunks // rows))


@dataclass(frozen=True, kw_only=True)
class MergeRun:
    """Task: merge chunks into a larger one, so that buckets have fewer files to open."""

    chunks: Sequence[Path]
    out: Path

    def __call__(self) -> Path:
        if not is_file(self.out):
            gathered = _Gathered.of([read_chunk(path) for path in self.chunks])
            order = np.lexsort((digests_of(gathered.table["tie"]), digests_of(gathered.table["key"])))
            pairs = gathered.table.take(pa.array(order))
            write_sorted(self.out, pairs, [gathered.vectors(kind, order) for kind in (0, 1)])
        return self.out


@dataclass(frozen=True, kw_only=True)
class MergeBucket:
    """Task: write one bucket of the artifact, unless it is there; its number and report.

    Of pairs that share a uid of their own the first (by content) stays and the others are rejected; exact copies without a uid
    of their own get the endings ~1, ~2 and so on. With `provided` chunks, embeddings are those of the same uid there.
    """

    folder: Path
    number: int
    count: int
    """Of buckets."""
    chunks: Sequence[Path]
    provided: Sequence[Path] | None = None

    @property
    def name(self) -> str:
        return f"bucket {self.number}"

    @property
    def _report(self) -> Path:
        return self.folder / f".{bucket_folder(self.folder, self.number).name}.json"

    @property
    def _files(self) -> list[Path]:
        """What it writes, the report last: no report stands for a file that is gone."""
        bucket = bucket_folder(self.folder, self.number)
        rejected = rejected_path(self.folder, self.number)
        return [bucket / "pairs.parquet", bucket / "vectors.arrow", rejected, self._report]

    def __call__(self) -> tuple[int, BucketReport]:
        if not all(map(is_file, self._files)):
            self._write()
        return self.number, BucketReport(**json.loads(here(self._report).read_bytes()))

    def _write(self) -> None:
        gathered = self._gather(self.chunks)
        unmatched, strangers = 0, REJECTED_SCHEMA.empty_table()
        if self.provided is not None:
            gathered, unmatched, strangers = _with_provided(gathered, self._gather(self.provided))
        pairs = gathered.table
        usable = pc.is_null(pairs["reason"]).to_numpy(zero_copy_only=False)
        ordinals = _ordinals(digests_of(pairs["key"]), digests_of(pairs["tie"]), usable)
        kept = usable & ~(pc.fill_null(pairs["own"], False).to_numpy() & (ordinals > 0))
        order = np.flatnonzero(kept)
        key, tie = digests_of(pairs["key"]), digests_of(pairs["tie"])
        order = order[np.lexsort((tie[order], key[order]))]
        thin = _thin(pairs.take(pa.array(order)), ordinals[order])
        rejected = pa.concat_tables([_rejected(pairs, ~kept), strangers])
        vectors = [gathered.rows(kind, order) for kind in (0, 1)]
        write_bucket_files(bucket_folder(self.folder, self.number), thin, vectors, gathered.dimension)
        with atomic_path(rejected_path(self.folder, self.number)) as aside:
            pq.write_table(rejected, aside)
        report = BucketReport(
            rows_in=len(pairs) + len(strangers),
            rejected=len(rejected),
            truncated=int(pc.sum(thin["truncated"]).as_py() or 0),
            copies=int((ordinals[order] > 0).sum()),
            unmatched=unmatched,
            buckets=[len(thin)],
            groups=group_names(thin["group"]),
        )
        write_json(self._report, vars(report))  # last: it says that the bucket is whole

    def _gather(self, chunks: Sequence[Path]) -> "_Gathered":
        lower, upper = (_bound(self.number + step, self.count) for step in (0, 1))
        tables: list[pa.Table] = []
        for path in chunks:
            table = read_chunk(path)
            key = digests_of(table["key"])
            start = int(np.searchsorted(key, lower))
            stop = len(key) if upper is None else int(np.searchsorted(key, upper))
            if stop > start or not tables:
                tables.append(table.slice(start, stop - start))
        return _Gathered.of(tables)


def rejected_path(folder: Path, number: int) -> Path:
    """What was rejected of a bucket, while the stage is at work."""
    return folder / f".{bucket_folder(folder, number).name}-rejected.parquet"


def join_rejected(folder: Path, buckets: int) -> int:
    """Write `rejected.parquet` of the whole artifact, shard by shard where they are few; the rows."""
    paths = [here(rejected_path(folder, number)) for number in range(buckets)]
    rows = sum(int(pq.read_metadata(path).num_rows) for path in paths)
    with atomic_path(folder / "rejected.parquet") as aside:
        if rows <= BUCKET_PAIRS:
            table = pa.concat_tables([pq.read_table(path) for path in paths])
            pq.write_table(table.sort_by([("shard", "ascending"), ("uid", "ascending")]), aside)
        else:
            with pq.ParquetWriter(aside, REJECTED_SCHEMA) as writer:
                for path in paths:
                    writer.write_table(pq.read_table(path))
    return rows


@dataclass(frozen=True, kw_only=True)
class _Gathered:
    """Rows of several chunks: thin columns in memory, embeddings by memory map."""

    table: pa.Table
    views: tuple[list[Halves], list[Halves]]
    starts: Rows
    """Row at which each view begins, and their end."""
    dimension: int

    @classmethod
    def of(cls, tables: Sequence[pa.Table]) -> "_Gathered":
        dimension = max((table[name].type.list_size for table in tables for name in VECTORS), default=0)
        whole = pa.concat_tables([_of_dimension(table, dimension) for table in tables])
        views = tuple(vectors_of(whole[name]) for name in VECTORS)
        starts = np.cumsum([0, *(len(view) for view in views[0])])
        return cls(
            table=whole.drop_columns(list(VECTORS)),
            views=(views[0], views[1]),
            starts=starts,
            dimension=dimension,
        )

    def vectors(self, kind: int, rows: Rows) -> Halves:
        """Embeddings of some rows (m, D)."""
        values = np.empty((len(rows), self.dimension), np.float16)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for view in np.unique(owner):
            mine = owner == view
            values[mine] = self.views[kind][view][rows[mine] - self.starts[view]]
        return values

    def rows(self, kind: int, rows: Rows) -> Iterator[Halves]:
        """The same in batches."""
        for start in range(0, len(rows), BATCH_ROWS):
            yield self.vectors(kind, rows[start : start + BATCH_ROWS])


def _of_dimension(table: pa.Table, dimension: int) -> pa.Table:
    """A chunk of rejections alone may not know the dimension of the others."""
    if table[VECTORS[0]].type.list_size == dimension:
        return table
    zeros = vector_column(np.zeros((len(table), dimension), np.float16))
    for name in VECTORS:
        table = table.set_column(table.schema.get_field_index(name), name, zeros)
    return table


def _bound(number: int, count: int) -> Any:
    """The first digest of a bucket; None for what would lie behind the last one."""
    if number >= count:
        return None
    return np.frombuffer((number * 2**64 // count).to_bytes(8, "big") + bytes(8), DIGEST)[0]


def _ordinals(key: Digests, tie: Digests, usable: Mask) -> Rows:
    """How many usable pairs of the same uid come before each pair."""
    rows = np.flatnonzero(usable)
    rows = rows[np.lexsort((tie[rows], key[rows]))]
    sorted_key = key[rows]
    place = np.arange(len(rows))
    first = np.ones(len(rows), bool)
    first[1:] = sorted_key[1:] != sorted_key[:-1]
    ordinals = np.zeros(len(usable), np.int64)
    ordinals[rows] = place - np.maximum.accumulate(np.where(first, place, 0))
    return ordinals


def _thin(pairs: pa.Table, ordinals: Rows) -> pa.Table:
    """Columns of PAIRS_SCHEMA of kept pairs."""
    uids = pairs["uid"].to_pylist()
    uids = [f"{uid}~{ordinal}" if ordinal else uid for uid, ordinal in zip(uids, ordinals, strict=True)]
    columns = {name: pairs[name] for name in PAIRS_SCHEMA.names} | {
        "uid": pa.array(uids, pa.large_string()),
        **{name: pa.array(numbers_of(digests_of(pairs[name]))) for name in ("image", "text")},
    }
    return pa.table(columns, schema=PAIRS_SCHEMA)


def _rejected(pairs: pa.Table, rows: Mask) -> pa.Table:
    chosen = pairs.filter(pa.array(rows)).select(REJECTED_SCHEMA.names)
    reason = pc.fill_null(chosen["reason"], "duplicate uid")
    return chosen.set_column(2, "reason", reason).cast(REJECTED_SCHEMA)


def _with_provided(pairs: _Gathered, provided: _Gathered) -> tuple[_Gathered, int, pa.Table]:
    """Pairs of shards with the embeddings provided for their uids; how many embeddings are of no pair, and rejected ones."""
    keys = digests_of(provided.table["key"])
    usable = pc.is_null(provided.table["reason"]).to_numpy(zero_copy_only=False)
    order = np.lexsort((~usable, keys))  # of one uid, what is usable comes first
    first = order[np.unique(keys[order], return_index=True)[1]]
    wanted = digests_of(pairs.table["key"])
    place = np.minimum(np.searchsorted(keys[first], wanted), max(0, len(first) - 1))
    found = keys[first][place] == wanted if len(first) else np.zeros(len(wanted), bool)
    row = np.where(found, first[place] if len(first) else 0, -1)
    why = provided.table["reason"].to_pylist()
    reasons = [
        old or ("no embedding given" if at < 0 else why[at])
        for old, at in zip(pairs.table["reason"].to_pylist(), row, strict=True)
    ]
    table = pairs.table.set_column(
        pairs.table.schema.get_field_index("reason"), "reason", pa.array(reasons, pa.large_string())
    )
    score = provided.table["clip_score"].to_numpy()
    cosine = np.where(found, score[np.maximum(row, 0)], np.nan) if len(score) else np.full(len(row), np.nan)
    table = table.set_column(
        table.schema.get_field_index("clip_score"), "clip_score", pa.array(cosine.astype(np.float32))
    )
    known = np.isin(keys, wanted)
    strangers = _rejected(provided.table, ~usable & ~known)
    if len(keys):
        images, texts = (provided.vectors(kind, np.maximum(row, 0)) for kind in (0, 1))
    else:
        images = texts = np.zeros((len(row), provided.dimension), np.float16)
    joined = _Gathered(
        table=table,
        views=([images], [texts]),
        starts=np.array([0, len(row)]),
        dimension=provided.dimension,
    )
    return joined, int((usable & ~known).sum()), strangers
