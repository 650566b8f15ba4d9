"""Dynamic curation: a proxy whose sampler is re-weighted, while it trains, by what pairs are worth to it by then."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import reweighted_batches
from influencespace.core.select import SelectionConfig, weights_along
from influencespace.core.strata import pairs_stood_for
from influencespace.data.buckets import buckets_of
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
from influencespace.stages.proxies.train_many import BlockInputs, Given, WeightedPool, Weights, first_heads
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

    def weights(self, kept: IntArray, heads: Heads, preconditioner: Tensor) -> FloatArray:
        """Weights of the pool's `kept` pairs (m,), of mean 1, by heads and AdamW's preconditioner as they are now."""
        sample, influence = self._influence(kept, heads, preconditioner)
        axes = [self.evidence.strata[name][kept] for name in VALUE_AXES]
        axes[VALUE_AXES.index("in_sample")] = self._in_sample(kept, heads)
        rows = np.searchsorted(kept, sample)
        return weights_along(
            np.stack(axes, 1),
            rows,
            influence,
            stands_for=pairs_stood_for(self.evidence.strata["quantile"][kept], rows),
            knots=KNOTS,
            config=self.rule,
            clip_score=self.evidence.strata["pretrained"][kept],
        )

    def _influence(self, kept: IntArray, heads: Heads, preconditioner: Tensor) -> tuple[IntArray, FloatArray]:
        """Some pairs of the pool that are kept, and the influence of each."""
        scored = self.evidence.influence["pair"]
        # the first of the sample, which is in canonical order: a random one
        sample = scored[np.isin(scored, kept)][:MAX_SCORED]
        train = self.inputs.proxy.train
        scorer = online_scorer(
            Space(heads), self._target, self._bank, train.objective, train.batch_size, preconditioner
        )
        influences = scorer(self.inputs.pool.inputs(sample), self.inputs.pool.image[sample])
        influence = mean_of_known(influences.by_batch[0])
        known = np.isfinite(influence)
        return sample[known], influence[known]

    @torch.no_grad()
    def _in_sample(self, kept: IntArray, heads: Heads) -> FloatArray:
        """negCLIPLoss of the kept pairs by these heads."""
        bank = [(*heads(*batch.inputs), batch.image) for batch in self._bank]
        scale = 1 / self.inputs.proxy.train.temperature
        scores = []
        for start, stop in buckets_of(len(kept), self.inputs.proxy.bucket_size):
            rows = kept[start:stop]
            u, t = heads(*self.inputs.pool.inputs(rows))
            scores.append(neg_clip_loss(u, t, self.inputs.pool.image[rows], bank, scale))
        return np.concatenate(scores)


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
        kept_of_pool = np.flatnonzero(weights.read(0, len(pool)) > 0)
        # the rows of the pool that have weight, among the pairs that were scored
        kept = np.searchsorted(self.reweighting.inputs.pool.rows, pool.rows[kept_of_pool])

        def reweigh() -> WeightedPool:
            values = self.reweighting.weights(kept, heads, adam_preconditioner(optimizer))
            # workers that differ in a last bit would part their batches, so all take the first one's
            first = exchange.gather(torch.from_numpy(values)[:, None])[0]
            anew = np.zeros(len(pool))
            anew[kept_of_pool] = first[:, 0].numpy()
            return WeightedPool(pool, Given(anew))

        size, pairs = config.batch_size, WeightedPool(pool, weights)
        batches = reweighted_batches(pairs, size, config.steps, seed, every=self.refresh, reweigh=reweigh)
        inputs = BlockInputs(pool, device)
        return train_heads(inputs, batches, heads, config, exchange=exchange, optimizer=optimizer).cpu()
