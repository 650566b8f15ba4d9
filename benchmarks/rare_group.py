"""A rare group: pictures of women, thinned to a twentieth of theirs, and what curation makes of the gap in recall.

The group is a keyword rule over captions. Pool, target and test set name it in their column `group`, as a user's data would.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Benchmark
from curation import Curation
from retrained import retrained
from world import Setting, World

from influencespace.core.metrics import bootstrap_means, interval
from influencespace.core.select import SelectionConfig, top_fraction
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, read_manifest, reopen
from influencespace.data.pair_set import PairSet
from influencespace.estimators.similarity import random_score
from influencespace.stages.finish import finish_stage
from influencespace.stages.selection.evidence import decide

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
    def whole(self) -> PairSet:
        """With all pictures of the group."""
        return with_groups(PairSet(self.world.pool), self.world.cache / "groups" / "pool")

    @cached_property
    def pool(self) -> PairSet:
        whole = self.whole
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
        return super().folder / "rare group" / fingerprint([RULE, LEAST, LEFT])

    @cached_property
    def rare_images(self) -> np.ndarray:
        """Which images of the test set show the group, in the order of `by_image`."""
        first = np.unique(self.test.image, return_index=True)[1]
        rare: np.ndarray = (np.array(self.test.column("group")) == RARE)[first]
        return rare

    def weights(self) -> dict[str, np.ndarray]:
        """Ours, with the groups and without looking at them, and others of which some know the pool's groups."""
        scores = self.run()
        rare = np.array(self.pool.column("group")) == RARE
        keep = round(0.7 * len(self.pool))
        uids = [str(uid) for uid in self.pool.column("uid")]
        ignoring = self.confirmed(scores, SelectionConfig(fairness="off"))
        return {
            "curated": self.curated(scores),
            "curated, groups ignored": decide(scores, ignoring).weight,
            "everything": np.ones(len(self.pool)),
            "random": top_fraction(random_score(uids), keep).astype(np.float64),
            "clip_score": top_fraction(self.pool.clip_score, keep).astype(np.float64),
            "re-weighted by group": np.where(rare, 0.5 / rare.mean(), 0.5 / (~rare).mean()),
        }

    def by_method(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        """And of proxies of the pool that lacks no picture of the group: what can be won back at all."""
        found = super().by_method(seeds)
        everything = np.ones(len(self.whole))
        found["shares"]["everything, not thinned"] = [
            self.recall_of(everything, seed, pool=self.whole) for seed in seeds
        ]
        found["kept"]["everything, not thinned"] = 1.0
        return found


def rare_group(bench: Benchmark, world: World, quick: bool) -> None:
    """Recall of the group and of all others, dev's two tars swapped and taken together."""
    curations = [
        RareGroup(world, Setting(wrong=0.0, captions=5, steps=50 if quick else 200, target=target))
        for target in ((0,) if quick else (0, 1))
    ]
    found = retrained(curations, bench.seeds)
    of_rare = np.concatenate([curation.rare_images for curation in curations])
    draws: dict[str, dict[str, np.ndarray]] = {}
    means: dict[str, dict[str, float]] = {}
    for method, shares in found.shares.items():
        parts = {"all": shares, "rare": shares[:, of_rare], "others": shares[:, ~of_rare]}
        draws[method] = {name: bootstrap_means(values) for name, values in parts.items()}
        means[method] = {name: float(values.mean()) for name, values in parts.items()}
        draws[method]["gap"] = draws[method]["others"] - draws[method]["rare"]
        means[method]["gap"] = means[method]["others"] - means[method]["rare"]
        bench.row(
            method=method,
            kept=found.kept[method],
            mean_recall=means[method]["all"],
            recall_of_the_group=means[method]["rare"],
            recall_of_others=means[method]["others"],
            gap=means[method]["gap"],
            gap_interval=list(interval(draws[method]["gap"])),
        )

    def compared(name: str) -> dict[str, Any]:
        low, high = interval(draws["curated"][name] - draws["everything"][name])
        return {"measured": means["curated"][name] - means["everything"][name], "interval": (low, high)}

    smaller = 1 - means["curated"]["gap"] / means["everything"]["gap"]
    bench.target(
        name="rare group: gap in recall, how much smaller than everything's",
        target="at least 0.3",
        measured=smaller,
        interval=interval(1 - draws["curated"]["gap"] / draws["everything"]["gap"]),
        reached=smaller >= 0.3,  # as it was measured: the interval says how sure
    )
    for name, what in (("all", "mean recall"), ("rare", "recall of the group")):
        told = compared(name)
        bench.target(
            name=f"rare group: {what} of curated minus everything's",
            target="at least 0",
            reached=told["measured"] >= 0,
            **told,
        )
