"""Slices of the data, written into a folder of their own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from influencespace.config import RunConfig
from influencespace.data.imported import EmbeddingBatch, import_options, read_imported_embeddings
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import read_shard
from influencespace.data.schema import Sample
from influencespace.data.tars import add_sample, new_tar
from influencespace.planning.slice_config import Sliced
from influencespace.planning.stretched import parts, stretched, table, write
from influencespace.stages.ingest.shards import roles_of, shards_of


@dataclass(frozen=True, kw_only=True)
class Slicer:
    """Cuts slices that keep as many workers busy as the whole data would: shards and buckets are smaller, not fewer."""

    sliced: Sliced

    @property
    def config(self) -> RunConfig:
        """Of the whole data."""
        return self.sliced.config

    @property
    def imported(self) -> bool:
        """Whether the embeddings of the pool are provided."""
        return self.config.data.embeddings is not None

    @property
    def roles(self) -> list[str]:
        """The roles whose pictures are embedded."""
        return [role for role in roles_of(self.config) if role != "pool" or not self.imported]

    def pictures(self, folder: Path, limits: Mapping[str, int]) -> RunConfig:
        """The config on the first pictures of each role, about so many pairs of it."""
        paths = {role: self._shards(folder / role, role, limit) for role, limit in limits.items()}
        of_pool = limits.get("pool", self.sliced.limit)
        data = replace(self.config.data, images=None, embeddings=None, **{"pool": "", **paths})
        return replace(self.sliced.of(of_pool), data=data)

    def stored(self, folder: Path, pictures: RunConfig, pool: PairSet | None, pairs: int) -> RunConfig:
        """The config on stored embeddings of so many pairs: the first of the data, or made of an embedded pool; with the target
        and the test set of a slice of pictures."""
        files = self.sliced.workers
        tables = (
            self._first(pairs, files) if pool is None else stretched(pool, pairs, files, self.config.seed)
        )
        data = replace(pictures.data, pool="", embeddings=write(folder, tables))
        return replace(self.sliced.of(pairs), data=data)

    def _shards(self, folder: Path, role: str, limit: int) -> str:
        """The first images, with `limit` pairs or a little more where there are as many, as WebDataset tars."""
        read, shards = self.config.embed.read, shards_of(self.config)[role]
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

    def _first(self, count: int, files: int) -> list[pa.Table]:
        """The first imported embeddings, `count` of them where there are as many, in equal parts."""
        data, left = self.config.data, count
        options = import_options(self.config.embed.read, joined=bool(data.pool))
        found: list[Any] = []
        for batch in read_imported_embeddings(data.embeddings or "", options):
            if isinstance(batch, EmbeddingBatch):
                captions = batch.captions or [""] * len(batch.uids)
                one = table(batch.uids, captions, batch.images, batch.texts, batch.groups)
                found.append(one.slice(0, left))
                left -= len(found[-1])
            if left <= 0:
                break
        whole = pa.concat_tables(found, promote_options="default")
        ends = np.cumsum(parts(len(whole), files)).tolist()
        return [whole.slice(start, end - start) for start, end in zip([0, *ends], ends)]
