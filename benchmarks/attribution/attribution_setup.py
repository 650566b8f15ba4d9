"""What the estimators are measured on: a small pool of real pairs, and really trained proxies."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from benchmarks.attribution.scoring import Setup, tuned
from benchmarks.data.datasets import Dataset
from influencespace.core.arrays import BoolArray, IntArray
from influencespace.core.batches import folds_by_image
from influencespace.data.artifacts import fingerprint
from influencespace.data.pair_set import PairSet
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.problem import Problem
from influencespace.estimators.proxy_problem import proxy_problem, rows_of
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import Rule

RATES: dict[Rule, tuple[float, ...]] = {"sgd": (1e-3, 3e-3, 1e-2, 3e-2), "adamw": (3e-5, 1e-4, 3e-4, 1e-3)}
NEGATIVE_BATCHES = 8  # of the reference bank, where the pool has pairs for so many


@dataclass(frozen=True, kw_only=True)
class Study(Setup):
    """Some real pairs of which a share is wrong, a clean target, and how a proxy is trained."""

    dataset: Dataset
    pairs: int | None
    wrong: float
    config: HeadsConfig
    rule: Rule = "adamw"
    noise_seed: int = 1
    dtype: torch.dtype = torch.float32

    @cached_property
    def _chosen(self) -> tuple[PairSet, IntArray, BoolArray]:
        pool, wrong = self.dataset.corrupted(self.wrong, captions=1, seed=self.noise_seed)
        count = len(pool) if self.pairs is None else self.pairs
        return pool, np.sort(np.random.default_rng(self.noise_seed).permutation(len(pool))[:count]), wrong

    def batch(self, pairs: PairSet, rows: IntArray, texts: IntArray | None = None) -> NegativeBatch:
        """Pairs of distinct images, numbered as they come, some with the captions of other rows."""
        u, t = pairs.inputs(rows)[0], pairs.inputs(rows if texts is None else texts)[1]
        return NegativeBatch(inputs=(u.to(self.dtype), t.to(self.dtype)), image=np.arange(len(rows)))

    def one_caption(self, pairs: PairSet) -> NegativeBatch:
        """The first pair of each image."""
        return self.batch(pairs, np.unique(pairs.image, return_index=True)[1])

    @cached_property
    def pool(self) -> NegativeBatch:
        pool, rows, _ = self._chosen
        return self.batch(pool, rows)

    @cached_property
    def is_wrong(self) -> BoolArray:
        _, rows, wrong = self._chosen
        return wrong[rows]

    @cached_property
    def target(self) -> NegativeBatch:
        return self.one_caption(self.dataset.dev(0))

    @cached_property
    def validation(self) -> NegativeBatch:
        return self.one_caption(self.dataset.dev(1))

    @property
    def size(self) -> int:
        return len(self.pool.image)

    @property
    def key(self) -> str:
        parts = [self.pairs, self.wrong, self.config, self.rule, self.noise_seed, str(self.dtype)]
        return fingerprint([type(self).__name__, *parts])

    def tuned(self) -> "Study":
        return tuned(self, RATES[self.rule], self.dataset.cache)

    def problem(self, seed: int, target: NegativeBatch | None = None) -> Problem:
        return proxy_problem(
            self.pool,
            target or self.target,
            self.config,
            rule=self.rule,
            negative_batches=NEGATIVE_BATCHES,
            seed=seed,
        )

    def target_group(self, group: int, groups: int) -> NegativeBatch:
        rows = np.flatnonzero(folds_by_image(self.target.image, groups, 0) == group)
        return NegativeBatch(inputs=rows_of(self.target.inputs, rows), image=self.target.image[rows])


@dataclass(frozen=True, kw_only=True)
class SyntheticStudy(Study):
    """The same with synthetic scenes, embedded by the same encoder, which has never seen any."""

    @cached_property
    def _rows(self) -> tuple[PairSet, list[IntArray]]:
        """Pairs of distinct scenes: the pool's, 500 for the target, the others."""
        scenes = self.dataset.other_domain
        rows = np.unique(scenes.image, return_index=True)[1]
        rows = np.random.default_rng(self.noise_seed).permutation(rows)
        assert self.pairs is not None
        return scenes, np.split(rows, [self.pairs, self.pairs + 500])

    @cached_property
    def is_wrong(self) -> BoolArray:
        wrong: BoolArray = np.arange(self.pairs or 0) < round(self.wrong * (self.pairs or 0))
        return wrong

    @cached_property
    def pool(self) -> NegativeBatch:
        scenes, (rows, *_) = self._rows
        texts = rows.copy()
        texts[self.is_wrong] = np.roll(rows[self.is_wrong], 1)  # each has the caption of another
        return self.batch(scenes, rows, texts)

    @cached_property
    def target(self) -> NegativeBatch:
        return self.batch(self._rows[0], self._rows[1][1])

    @cached_property
    def validation(self) -> NegativeBatch:
        return self.batch(self._rows[0], self._rows[1][2])
