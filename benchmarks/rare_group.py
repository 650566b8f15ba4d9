"""A rare group: pictures of women, thinned to a twentieth of theirs, and what curation makes of the gap in recall.

The group is a keyword rule over captions. Pool, target and test set name it in their column `group`, as a user's data would.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from curation import Curation

from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, read_manifest, reopen
from influencespace.data.pair_set import PairSet
from influencespace.stages.finish import finish_stage

RARE, OTHERS = "women", "others"
RULE = r"\b(woman|women|lady|ladies|girl|girls)\b"
LEAST = 0.4  # of a picture's captions: two of five
LEFT = 0.05  # of the rare group's pictures


def in_group(pairs: PairSet) -> np.ndarray:
    """Which pairs show the rare group, by all captions of the picture (n,)."""
    says = np.array(
        [re.search(RULE, str(caption).lower()) is not None for caption in pairs.column("caption")]
    )
    share = np.bincount(pairs.image, says) / np.maximum(np.bincount(pairs.image), 1)
    found: np.ndarray = share[pairs.image] >= LEAST
    return found


def with_groups(pairs: PairSet, folder: Path) -> PairSet:
    """The same artifact with the group of every pair in its column."""
    mark = fingerprint(["groups", pairs.table.manifest.fingerprint, RULE, LEAST])
    manifest = read_manifest(folder)
    if manifest is None or manifest.fingerprint != mark:
        reopen(folder)
        for name in ("images.npy", "texts.npy"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to((pairs.folder / name).absolute())
        table = pq.read_table(pairs.folder / "pairs.parquet")
        names = pa.array(np.where(in_group(pairs), RARE, OTHERS).tolist(), pa.string())
        table = table.set_column(table.column_names.index("group"), "group", names)
        with atomic_path(folder / "pairs.parquet") as aside:
            pq.write_table(table, aside)
        finish_stage(
            folder, Manifest(stage="embed", fingerprint=mark, rows_in=len(table), rows_out=len(table)), 0.0
        )
    return PairSet(folder)


@dataclass(frozen=True)
class RareGroup(Curation):
    """The stages up to the decision, on a pool that has few pictures of the group."""

    @cached_property
    def pool(self) -> PairSet:
        whole = with_groups(PairSet(self.world.pool), self.world.cache / "groups" / "pool")
        rare = in_group(whole)
        images = np.unique(whole.image[rare])
        left = np.random.default_rng(0).choice(images, round(LEFT * len(images)), replace=False)
        rows = self.folder / "pool.npy"
        rows.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(rows) as aside, aside.open("wb") as file:
            np.save(file, np.flatnonzero(~rare | np.isin(whole.image, left)))
        return PairSet(whole.folder, rows)

    @cached_property
    def wrong(self) -> np.ndarray:
        return np.zeros(len(self.pool), bool)

    def _dev(self, tar: int) -> PairSet:
        return with_groups(self.world.dev(tar), self.world.cache / "groups" / f"dev{tar}")

    @cached_property
    def target(self) -> PairSet:
        return self._dev(self.setting.target)

    @cached_property
    def test(self) -> PairSet:
        return self._dev(1 - self.setting.target)

    @property
    def folder(self) -> Path:
        return super().folder / "rare group"
