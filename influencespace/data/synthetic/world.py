"""Writes a synthetic world to disk as WebDataset shards, with the planted truth beside them.

out/world.json                   the config: what is in this folder
out/<split>/00000.tar ...        key.jpg, key.txt (first caption), key.json (uid, captions, group)
out/truth/<split>.parquet        one row a pair: uid, wrong, kind, original
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.data.artifacts import atomic_path
from influencespace.data.synthetic.config import SPLITS, Split, WorldConfig
from influencespace.data.synthetic.pairs import plan_image
from influencespace.data.tars import add_sample, new_tar
from influencespace.errors import InputError

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("wrong", pa.bool_(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("original", pa.string()),
    ]
)
ROW_GROUP = 5_000  # images whose truth is held in memory at once


def write_world(
    out: Path, config: WorldConfig | None = None, advance: Callable[[int], None] = lambda shards: None
) -> Path:
    """Writes all splits under `out` and returns it; finished files of an interrupted run are kept.

    `advance` is called for each finished shard.

    Memory does not grow with the number of pairs, and the same config gives the same bytes.
    Raises InputError where `out` holds a world of another config.
    """
    config = config or WorldConfig()
    _claim(out, config)
    for split in SPLITS:
        for shard in range(count_shards(config, split)):
            write_shard(out, config, split, shard)
            advance(1)
        write_truth(out, config, split)
    return out


def count_shards(config: WorldConfig, split: Split) -> int:
    """Shards of the split."""
    return -(-config.size(split) // config.shard_size)


def write_shard(out: Path, config: WorldConfig, split: Split, shard: int) -> Path:
    """Writes one shard unless it is there already; shards may be written in parallel, in any order."""
    path = out / split / f"{shard:05d}.tar"
    if path.exists():
        return path
    start = shard * config.shard_size
    with atomic_path(path) as aside, new_tar(aside) as tar:
        for index in range(start, min(start + config.shard_size, config.size(split))):
            plan = plan_image(config, split, index)
            described = {"uid": plan.uid, "captions": list(plan.captions), "group": plan.group}
            texts = {"txt": plan.captions[0].encode(), "json": json.dumps(described).encode()}
            add_sample(tar, f"{index:09d}", {"jpg": plan.jpeg(), **texts})
    return path


def write_truth(out: Path, config: WorldConfig, split: Split) -> Path:
    """Writes what was planted in a split, unless it is there already; renders nothing."""
    path = out / "truth" / f"{split}.parquet"
    if path.exists():
        return path
    with atomic_path(path) as aside, pq.ParquetWriter(aside, TRUTH_SCHEMA) as writer:
        for start in range(0, config.size(split), ROW_GROUP):
            stop = min(start + ROW_GROUP, config.size(split))
            plans = (plan_image(config, split, index) for index in range(start, stop))
            rows = [row._asdict() for plan in plans for row in plan.truth]
            writer.write_table(pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA))
    return path


def _claim(out: Path, config: WorldConfig) -> None:
    """Marks the folder as this world, so that shards of two worlds never mix."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "world.json"
    mine = dataclasses.asdict(config)
    if not path.exists():
        with atomic_path(path) as aside:
            aside.write_text(json.dumps(mine, indent=2) + "\n")
        return
    theirs = json.loads(path.read_text())
    differ = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if differ:
        changes = ", ".join(
            f"{name}: {theirs.get(name)} there, {mine.get(name)} asked for" for name in differ
        )
        raise InputError(
            f"{out} holds another synthetic world ({changes}): choose another folder or remove it."
        )
