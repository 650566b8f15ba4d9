"""A rare group: pictures of women, thinned to a twentieth of theirs, and what curation makes of the gap in recall.

The group is a keyword rule over captions. Pool, target and test set name it in their column `group`, as a user's data would.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import wanted
from benchmarks.bench import Bench
from benchmarks.curation.curation import Curation, Setting, by_fold, identity, retrained, rotated
from benchmarks.curation.protocol import CURATED
from benchmarks.data.datasets import Content, store_pairs, with_column, with_rows
from benchmarks.data.distinct import Distinct
from benchmarks.data.scenario_pools import SCENARIOS
from influencespace.core.arrays import BoolArray, FloatArray
from influencespace.core.metrics import interval
from influencespace.data.pair_set import PairSet

RARE, OTHERS = "women", "others"
RULE = r"\b(woman|women|lady|ladies|girl|girls)\b"
MIN_SHARE = 0.4  # of a picture's captions: two of five
LEFT = 0.05  # of the rare group's pictures
WHOLE = "everything, not thinned"


def in_group(pairs: PairSet) -> BoolArray:
    """Which pairs show the rare group, by all captions of the picture (n,)."""
    named = np.array(
        [re.search(RULE, str(caption).lower()) is not None for caption in pairs.column("caption")]
    )
    image = Distinct(pairs).image
    shown: BoolArray = (np.bincount(image, named) / np.bincount(image))[image] >= MIN_SHARE
    return shown


def with_groups(pairs: PairSet, folder: Path) -> PairSet:
    """The same artifact with the group of every pair in its column."""

    def make(folder: Path) -> Content:
        names = pa.array(np.where(in_group(pairs), RARE, OTHERS).tolist(), pa.string())
        images, texts = pairs.inputs(slice(None))
        return with_column(pairs.table.pairs(), "group", names), images.numpy(), texts.numpy()

    return store_pairs(folder, ["groups", identity(pairs), RULE, MIN_SHARE], make)


@dataclass(frozen=True)
class RareGroup(Curation):
    """The stages up to the decision, on a pool that has few pictures of the group."""

    @property
    def key(self) -> list[Any]:
        return [*super().key, RULE, MIN_SHARE, LEFT]

    @cached_property
    def given(self) -> PairSet:
        return with_groups(self.dataset.pool, self.dataset.cache / "groups")

    @cached_property
    def whole(self) -> PairSet:
        """With all pictures of the group."""
        return self.of_role(CURATED)

    @cached_property
    def pool(self) -> PairSet:
        whole, rare = self.whole, in_group(self.whole)
        images = np.unique(whole.image[rare])
        left = np.random.default_rng(self.setting.turn.noise).choice(
            images, round(LEFT * len(images)), replace=False
        )
        return with_rows(whole, ~rare | np.isin(whole.image, left), self.folder / "pool.npy")

    @cached_property
    def wrong(self) -> BoolArray:
        return np.zeros(len(self.pool), bool)

    @cached_property
    def rare_images(self) -> BoolArray:
        """Which images of the test set show the group, in the order of `recall_by_image`."""
        first = np.unique(self.test.image, return_index=True)[1]
        rare: BoolArray = (np.array(self.test.column("group")) == RARE)[first]
        return rare

    def weights(self) -> dict[str, FloatArray]:
        """Ours, with the groups and without looking at them, and others of which some know the pool's groups."""
        rare = np.array(self.pool.column("group")) == RARE
        filters = self.filters(round(0.7 * len(self.pool)))
        return {
            "curated": self.decide().weight,
            "curated, groups ignored": self.variant({"selection.fairness": "off"}).decide().weight,
            "everything": np.ones(len(self.pool)),
            **{name: filters[name] for name in ("random", "clip_score")},
            "re-weighted by group": np.where(rare, 0.5 / rare.mean(), 0.5 / (~rare).mean()),
        }

    def by_method(self, seeds: Sequence[int]) -> dict[str, Any]:
        """And of proxies of the pool that lacks no picture of the group: what can be won back at all."""
        result, everything = super().by_method(seeds), np.ones(len(self.whole))
        whole = [self.retrained(everything, seed, pool=self.whole)["shares"] for seed in seeds]
        return {"shares": {**result["shares"], WHOLE: whole}, "kept": {**result["kept"], WHOLE: 1.0}}


def rare_group(bench: Bench) -> None:
    """Recall of the group and of all others, in every turn."""
    setting = Setting(scenario=SCENARIOS["clean"], steps=bench.pick(200, 50))
    curations = rotated(bench, setting, RareGroup, changes={"selection.weighting": "auto"})
    result = retrained(curations, bench.seeds)
    rare = np.concatenate([fold[0].rare_images for fold in by_fold(curations)])
    of = {"all": result, "rare": result.of_images(rare), "others": result.of_images(~rare)}

    def gap(method: str) -> tuple[float, FloatArray]:
        """Of the others' recall over the group's, and its bootstrapped draws."""
        means = of["others"].mean(method) - of["rare"].mean(method)
        return means, of["others"].draws[method] - of["rare"].draws[method]

    for method in result.shares:
        value, draws = gap(method)
        bench.row(
            method=method,
            kept=result.kept[method],
            mean_recall=result.mean(method),
            recall_of_the_group=of["rare"].mean(method),
            recall_of_others=of["others"].mean(method),
            gap=value,
            gap_interval=list(interval(draws)),
        )
    (ours, our_draws), (theirs, their_draws) = gap("curated"), gap("everything")
    name = "rare group: gap in recall, how much smaller than everything's"
    bench.target(name, wanted.at_least(0.3), 1 - ours / theirs, interval(1 - our_draws / their_draws))
    for name, what in (("all", "mean recall"), ("rare", "recall of the group")):
        compared = of[name].compared("everything")
        bench.target(f"rare group: {what} of curated minus everything's", wanted.at_least(0), *compared)
