"""Dynamic curation: a student whose sampler is re-weighted, while it trains, by what pairs are worth to it by then."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influencespace.core.batches import reweighted_batches
from influencespace.core.select import SelectConfig, weights_along
from influencespace.core.strata import pairs_stood_for
from influencespace.data.blocks import blocks_of
from influencespace.data.pair_set import PairSet
from influencespace.estimators.momentary import momentary_scorer
from influencespace.estimators.nystrom import RecordedContext
from influencespace.estimators.problem import mean_of_known
from influencespace.estimators.similarity import neg_clip_loss
from influencespace.models.heads import Heads
from influencespace.models.space import Inputs, Space
from influencespace.models.training import (
    Alone,
    Exchange,
    Trained,
    adam_preconditioner,
    adamw_of,
    train_heads,
)
from influencespace.stages.decide import KNOTS, VALUE_AXES, Scores
from influencespace.stages.student import Student, StudentsConfig, TargetHalves, beginning

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
MOST_SCORED = 4096  # pairs at each refresh, so that its time grows with the axes of the pool alone


@dataclass(frozen=True, kw_only=True)
class Reweighting:
    """What pairs are re-weighted by; opened where a student trains."""

    pool: PairSet
    """The pairs that the attribute stage has scored: of a later round those that the one before kept."""
    target: PairSet
    students: StudentsConfig
    student: Student
    """Of all pairs, for its bank."""
    scores: Scores
    decided: SelectConfig
    """With the weights that were confirmed."""

    @property
    def rule(self) -> SelectConfig:
        """How weights follow influence: as was confirmed, at one standard deviation where that is not at all."""
        return self.decided if self.decided.weights == "influence" else replace(self.decided, tau_high=1.0)

    @cached_property
    def _target(self) -> list[Inputs]:
        halves = TargetHalves(self.target, self.students.seed)
        contexts = halves.contexts(halves.gradient, self.students.train.batch_size)
        return [self.target.inputs(rows) for rows in contexts]

    @cached_property
    def _bank(self) -> list[RecordedContext]:
        return self.student.recorded_bank(self.pool)

    def weights(self, kept: IntArray, heads: Heads, preconditioner: Tensor) -> FloatArray:
        """Weights of the pool's `kept` pairs (m,), of mean 1, by heads and AdamW's preconditioner as they are now."""
        sample, influence = self._influence(kept, heads, preconditioner)
        axes = [self.scores.strata[name][kept] for name in VALUE_AXES]
        axes[VALUE_AXES.index("seen")] = self._seen(kept, heads)
        rows = np.searchsorted(kept, sample)
        return weights_along(
            np.stack(axes, 1),
            rows,
            influence,
            pairs_stood_for(self.scores.stratum[kept], rows),
            KNOTS,
            self.rule,
            self.scores.strata["given"][kept],
        )

    def _influence(self, kept: IntArray, heads: Heads, preconditioner: Tensor) -> tuple[IntArray, FloatArray]:
        """Some pairs of the pool that are kept, and the influence of each."""
        scored = self.scores.influence["pair"]
        # the first of the first look: it has some of every stratum, in canonical order, which is random
        sample = scored[np.isin(scored, kept)][:MOST_SCORED]
        train = self.students.train
        scorer = momentary_scorer(
            Space(heads), self._target, self._bank, train.objective, train.batch_size, preconditioner
        )
        found = scorer(self.pool.inputs(sample), self.pool.image[sample])
        influence = mean_of_known(found.by_context[0])
        known = np.isfinite(influence)
        return sample[known], influence[known]

    @torch.no_grad()
    def _seen(self, kept: IntArray, heads: Heads) -> FloatArray:
        """negCLIPLoss of the kept pairs by these heads."""
        contexts = [(*heads(*context.inputs), context.image) for context in self._bank]
        scale = 1 / self.students.train.temperature
        found = []
        for start, stop in blocks_of(len(kept), self.students.block_size):
            rows = kept[start:stop]
            u, t = heads(*self.pool.inputs(rows))
            found.append(neg_clip_loss(u, t, self.pool.image[rows], contexts, scale))
        return np.concatenate(found)


def train_dynamically(
    pool: PairSet,
    weights: FloatArray,
    reweighting: Reweighting,
    refresh: int,
    steps: int,
    seed: int,
    exchange: Exchange | None = None,
) -> Trained:
    """As `train_subset`, but every `refresh` steps the pairs that have weight (n,) are weighed anew, the others never."""
    config = replace(reweighting.students.train, steps=steps)
    exchange = exchange or Alone()
    heads, _ = beginning(pool, weights, config, seed)
    optimizer = adamw_of(heads, config)
    # the rows of the pool that have weight, among the pairs that were scored
    kept = np.searchsorted(reweighting.pool.rows, pool.rows[weights > 0])

    def reweigh() -> FloatArray:
        found = reweighting.weights(kept, heads, adam_preconditioner(optimizer))
        # workers that differ in a last bit would part their batches, so all take the first one's
        first = exchange.gather(torch.from_numpy(found)[:, None])[0]
        anew = np.zeros(len(weights))
        anew[weights > 0] = first[:, 0].numpy()
        return anew

    batches = reweighted_batches(weights, pool.image, config.batch_size, steps, seed, refresh, reweigh)
    return train_heads(pool.inputs, batches, heads, config, exchange=exchange, optimizer=optimizer)
