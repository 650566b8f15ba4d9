"""A slice of the data, and all stages on it, measured."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from influencespace.config import RunConfig
from influencespace.data.imported import EmbeddingBatch, import_options, read_imported_embeddings
from influencespace.data.readers import read_shard
from influencespace.data.schema import Sample
from influencespace.data.tars import add_sample, new_tar
from influencespace.engine.local import Engine
from influencespace.engine.measured import Work, measured
from influencespace.errors import InputError
from influencespace.pipeline import data_stages
from influencespace.planning.cost_model import Timing
from influencespace.planning.dataset_stats import SetSize
from influencespace.planning.slice_config import Sliced
from influencespace.run import Run, Stage, carry_out
from influencespace.stages.ingest.shards import shards_of
from influencespace.stages.ingest.split import Split, pair_sets

Timings = Mapping[str, Timing]
OTHERS = 2000
"""Pairs of target and test in a slice, at most: what influence takes grows with the target, whatever the pool is."""
TINY = 400
"""Pairs of the slice that is run first and not measured, at most."""


@dataclass(frozen=True, kw_only=True)
class Slicer:
    """Cuts slices that keep as many workers busy as the whole data would: shards and buckets are smaller, not fewer."""

    sliced: Sliced
    sizes: Mapping[str, SetSize]
    """Of what is there."""

    def cut(self, folder: Path, pool: int, others: int) -> RunConfig:
        """The config on about so many pairs of the pool, and of target and test, which are written into `folder`."""
        config, paths = self.sliced.config, {"pool": ""}
        for role in self.sizes:
            limit = min(pool if role == "pool" else others, self.sizes[role].pairs)
            if role == "pool" and config.data.embeddings is not None:
                paths["embeddings"] = self._embeddings(folder / "embeddings.parquet", limit)
            else:
                paths[role] = self._shards(folder / role, role, limit)
        return replace(self.sliced.of(pool), data=replace(config.data, images=None, **paths))

    def _shards(self, folder: Path, role: str, limit: int) -> str:
        """The first images, with `limit` pairs or a little more where there are as many, as WebDataset tars."""
        config = self.sliced.config
        read, shards = config.embed.read, shards_of(config)[role]
        samples = (item for shard in shards for item in read_shard(shard, read) if isinstance(item, Sample))
        tars = min(len(shards), self.sliced.workers)
        folder.mkdir(parents=True)
        pairs = 0
        for number in range(tars):
            with new_tar(folder / f"{number:05d}.tar") as tar:
                while pairs < limit * (number + 1) / tars and (sample := next(samples, None)):
                    record = {"captions": list(sample.captions), "uid": sample.uid, "group": sample.group}
                    known = {name: value for name, value in record.items() if value is not None}
                    files = {"jpg": sample.image, "json": json.dumps(known).encode()}
                    add_sample(tar, f"{pairs:09d}", files)
                    pairs += len(sample.captions)
        return str(folder)

    def _embeddings(self, path: Path, limit: int) -> str:
        """The first imported embeddings as a Parquet file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        options = import_options(self.sliced.config.embed.read, joined=bool(self.sliced.config.data.pool))
        left, tables = limit, []
        for batch in read_imported_embeddings(self.sliced.config.data.embeddings or "", options):
            if isinstance(batch, EmbeddingBatch):
                columns = {
                    "uid": batch.uids,
                    "caption": batch.captions or [""] * len(batch.uids),
                    "image_embedding": pa.array(list(batch.images), pa.list_(pa.float32())),
                    "text_embedding": pa.array(list(batch.texts), pa.list_(pa.float32())),
                }
                tables.append(pa.table(columns).slice(0, left))
                left -= len(tables[-1])
            if left <= 0:
                break
        pq.write_table(pa.concat_tables(tables), path)
        return str(path)


def measure_slices(
    slicer: Slicer, limit: int, home: Path, engine: Engine, stages: Sequence[Stage]
) -> tuple[Timings, Timings]:
    """What all stages took on half of about `limit` pairs of the pool, and on all of these.

    The slices lie in `home` meanwhile, which all machines must see. Raises InputError where they are too small.
    """
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=home if os.access(home, os.W_OK) else None) as name:
        folder = Path(name)
        try:
            whole = slicer.cut(folder / "whole", limit, OTHERS)
            half = slicer.cut(folder / "half", limit // 2, OTHERS)
            tiny = slicer.cut(folder / "tiny", min(limit // 2, TINY), TINY)
            _measure(tiny, folder / "warm-up", engine, stages)  # imports and cold caches
            small = _measure(half, folder / "small", engine, stages)
            return small, _measure(whole, folder / "large", engine, stages)
        except InputError as error:
            raise InputError(f"{error} (in a slice of {limit} pairs: is --limit too small?)") from None


def _measure(config: RunConfig, folder: Path, engine: Engine, stages: Sequence[Stage]) -> Timings:
    works: list[Work] = []
    watched = measured(engine, works.append)
    timings: dict[str, Timing] = {}

    def carried_out(stage: Stage, run: Run, sources: Sequence[str] = ()) -> None:
        works.clear()
        manifest = carry_out(stage, run, watched)
        work = sum(works, Work())
        inputs = {*manifest.inputs, *sources} & set(timings)
        timings[manifest.stage] = Timing(
            stage=manifest.stage,
            pairs=manifest.rows_in,
            read=sum(timings[name].written for name in inputs),
            written=sum(p.stat().st_size for p in run.at(manifest.stage).rglob("*") if p.is_file()),
            memory=work.peak,
            seconds=manifest.seconds,
            working=work.working,
            reading=work.reading,
        )

    run = Run(folder=folder, config=config)
    for stage in data_stages(config):
        carried_out(stage, run)
    sources, split = list(timings), run.manifest(Split.name).content
    run = replace(run, sets=pair_sets(run), inputs={Split.name: split})
    for stage in stages:
        carried_out(stage, run, sources)
    return timings
