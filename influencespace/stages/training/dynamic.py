"""Dynamic curation: a proxy whose sampler is re-weighted, while it trains, by what pairs are worth to it by then."""

import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import BLOCK, reweighted_batches
from influencespace.core.select import SelectionConfig, WeightsAlong, weights_along
from influencespace.core.strata import pairs_stood_for
from influencespace.data.buckets import Columns, buckets_of, read_rows
from influencespace.data.pair_set import PairSet
from influencespace.estimators.filters import neg_clip_loss
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.online_influence import online_scorer
from influencespace.estimators.problem import mean_of_known
from influencespace.models.heads import Heads
from influencespace.models.space import Inputs, Space
from influencespace.models.training import (
    Exchange,
    HeadsConfig,
    Trained,
    adam_preconditioner,
    adamw_of,
    train_heads,
)
from influencespace.run import Run
from influencespace.stages.proxies.train_many import BlockInputs, WeightedPool, Weights, first_heads
from influencespace.stages.scoring.scoring import ScoringInputs
from influencespace.stages.selection.evidence import KNOTS, VALUE_AXES, Evidence
from influencespace.stages.selection.weighting import with_chosen

MAX_SCORED = 4096  # pairs at each refresh, so that its time grows with the axes of the pool alone


@dataclass(frozen=True, kw_only=True)
class Reweighting:
    """What pairs are re-weighted by; opened where a proxy trains."""

    inputs: ScoringInputs
    """Its pool are the pairs that the influence stage has scored: of a later round those that the one before kept."""
    evidence: Evidence
    decided: SelectionConfig
    """With the weighting that was chosen."""

    @property
    def rule(self) -> SelectionConfig:
        """How weights follow influence: as was chosen, or at one standard deviation where kept pairs count alike."""
        return (
            self.decided if self.decided.weighting == "influence" else replace(self.decided, temperature=1.0)
        )

    @cached_property
    def _target(self) -> list[Inputs]:
        return [self.inputs.target.inputs(rows) for rows in self.inputs.target_batches]

    @cached_property
    def _bank(self) -> list[NegativeBatch]:
        return self.inputs.trained().reference_bank(self.inputs.pool)

    def scored(self, pool: PairSet, rows: IntArray) -> IntArray:
        """Rows of the scored pool that are these rows (m,), in order, of a pool that holds it."""
        own = self.inputs.pool
        if own.rows_file == pool.rows_file:
            return rows
        return np.searchsorted(own.rows, np.asarray(pool.place(rows)))

    def at(self, pool: PairSet, before: Weights, heads: Heads, preconditioner: Tensor) -> "Reweighted":
        """Weights of the pairs of a pool that had some, by heads and AdamW's preconditioner as they are now.

        They have mean 1 over the first block of the pool, whose pairs are a random sample: the sampler reads no more until it is
        asked again.
        """
        stop = min(BLOCK, len(pool))
        kept = self.scored(pool, np.flatnonzero(before.read(0, stop) > 0))
        axes, strata = self.axes(kept, heads)
        sample, influence = self._influence(kept, heads, preconditioner)
        rows = np.searchsorted(kept, sample)
        along = weights_along(
            axes,
            rows,
            influence,
            stands_for=pairs_stood_for(strata["quantile"], rows),
            knots=KNOTS,
            config=self.rule,
            clip_score=strata["pretrained"],
        )
        return Reweighted(by=self, pool=pool, before=before, heads=heads, along=along)

    def axes(self, rows: IntArray, heads: Heads) -> tuple[FloatArray, Columns]:
        """What weights follow of some scored pairs (m, A), the match in sample by these heads; and their strata."""
        if not len(rows):
            return np.zeros((0, len(VALUE_AXES))), {"quantile": rows, "pretrained": np.zeros(0)}
        first, names = int(rows[0]), (*VALUE_AXES, "quantile")
        read = read_rows(self.evidence.folder / "strata.parquet", slice(first, int(rows[-1]) + 1), *names)
        strata = {name: values[rows - first] for name, values in read.items()}
        strata["in_sample"] = self._in_sample(rows, heads)
        return np.stack([strata[name] for name in VALUE_AXES], 1), strata

    def _influence(self, kept: IntArray, heads: Heads, preconditioner: Tensor) -> tuple[IntArray, FloatArray]:
        """Some of the `kept` pairs of the scored pool (m,), and the influence of each."""
        scored = self.evidence.influence["pair"]
        # the first of the sample, which is in canonical order: a random one
        sample = scored[np.isin(scored, kept)][:MAX_SCORED]
        train = self.inputs.proxy.train
        scorer = online_scorer(
            Space(heads), self._target, self._bank, train.objective, train.batch_size, preconditioner
        )
        influences = scorer(self.inputs.pool.inputs(sample), self._images(sample))
        influence = mean_of_known(influences.by_batch[0])
        known = np.isfinite(influence)
        return sample[known], influence[known]

    def _images(self, rows: IntArray) -> IntArray:
        return self.inputs.pool.read(rows, "image")["image"]

    @torch.no_grad()
    def _in_sample(self, rows: IntArray, heads: Heads) -> FloatArray:
        """negCLIPLoss of scored pairs by these heads."""
        bank = [(*heads(*batch.inputs), batch.image) for batch in self._bank]
        scale = 1 / self.inputs.proxy.train.temperature
        scores = []
        for start, stop in buckets_of(len(rows), self.inputs.proxy.bucket_size):
            some = rows[start:stop]
            u, t = heads(*self.inputs.pool.inputs(some))
            scores.append(neg_clip_loss(u, t, self._images(some), bank, scale))
        return np.concatenate(scores)


@dataclass(frozen=True, kw_only=True)
class Reweighted:
    """Weights by what pairs are worth to a proxy in the midst of its training, computed for the ranges that are read."""

    by: Reweighting
    pool: PairSet
    before: Weights
    heads: Heads
    """A copy: training goes on."""
    along: WeightsAlong

    def read(self, start: int, stop: int) -> FloatArray:
        weights = np.zeros(stop - start)
        kept = np.flatnonzero(self.before.read(start, stop) > 0)
        axes, strata = self.by.axes(self.by.scored(self.pool, start + kept), self.heads)
        weights[kept] = self.along(axes, strata["pretrained"])
        return weights


@dataclass(frozen=True)
class Agreed:
    """The same weights on all workers, which read the same ranges: where last bits differ, batches would part."""

    weights: Weights
    exchange: Exchange

    def read(self, start: int, stop: int) -> FloatArray:
        own = torch.from_numpy(self.weights.read(start, stop))
        first: FloatArray = self.exchange.gather(own[:, None])[0][:, 0].numpy()
        return first


@dataclass(frozen=True, kw_only=True)
class DynamicTrainer:
    """Trains as `train_many.train` does, but every `refresh` steps the pairs that have weight are weighed anew."""

    reweighting: Reweighting
    refresh: int

    @classmethod
    def of(cls, run: Run) -> "DynamicTrainer":
        """By the weighting that the run's selection chose."""
        decided = with_chosen(run.config.selection, run.manifest("selection").details)
        reweighting = Reweighting(inputs=ScoringInputs.of(run), evidence=Evidence.of(run), decided=decided)
        return cls(reweighting=reweighting, refresh=run.config.train.refresh)

    def __call__(
        self, pool: PairSet, weights: Weights, config: HeadsConfig, seed: int, exchange: Exchange, device: str
    ) -> Trained:
        heads = first_heads(pool, config, seed).to(device)
        optimizer = adamw_of(heads, config)

        def reweigh() -> WeightedPool:
            D = adam_preconditioner(optimizer).cpu()
            now = self.reweighting.at(pool, weights, copy.deepcopy(heads).cpu(), D)
            return WeightedPool(pool, Agreed(now, exchange))

        size, pairs = config.batch_size, WeightedPool(pool, weights)
        batches = reweighted_batches(pairs, size, config.steps, seed, every=self.refresh, reweigh=reweigh)
        inputs = BlockInputs(pool, device)
        return train_heads(inputs, batches, heads, config, exchange=exchange, optimizer=optimizer).cpu()
