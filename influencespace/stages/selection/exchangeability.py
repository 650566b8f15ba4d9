"""Whether the encoder knows the target better than the pairs of the pool that are kept."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from influencespace.core.arrays import IntArray
from influencespace.core.exchangeable import ENOUGH, Exchangeability, Known
from influencespace.core.hashing import hashed
from influencespace.data.buckets import buckets_of
from influencespace.data.pair_set import PairSet
from influencespace.run import Run
from influencespace.stages.passes import RANGE
from influencespace.stages.selection.pair_evidence import Decision


@dataclass(frozen=True, kw_only=True)
class CompareWithPool:
    """Task: how far the target is above the pairs that a decision keeps, of one pair an image."""

    run: Run
    decision: Decision

    def __call__(self) -> Exchangeability:
        pool, target = self.run.pool, self.run.target
        kept = (
            start + np.flatnonzero(self.decision.read(start, stop) > 0)
            for start, stop in buckets_of(len(pool), RANGE)
        )
        return Exchangeability.of(
            _known(target, iter([np.arange(len(target))]), self.run.seed),
            _known(pool, kept, self.run.seed),
            chosen_by_encoder=target.folder == pool.folder,  # the split has set it apart
        )


def _known(pairs: PairSet, rows: Iterator[IntArray], seed: int) -> Known:
    """Of the first pair of each image among some rows, in the order of a hash, until there are enough."""
    chosen, images = np.empty(0, np.int64), np.empty(0, np.int64)
    for more in rows:
        image = pairs.read(more, "image")["image"].astype(np.int64) if len(more) else images[:0]
        together = np.concatenate([images, image])
        first = np.sort(np.unique(together, return_index=True)[1])
        chosen, images = np.concatenate([chosen, more])[first], together[first]
        if len(images) >= ENOUGH:
            break
    order = np.argsort(hashed(images, seed), kind="stable")[:ENOUGH]
    return Known.of(*pairs.inputs(chosen[order]))


def warning(found: Exchangeability) -> str:
    """What it means for users, where the encoder knows the target better."""
    if found.chosen_by_encoder:
        return (
            "the target was set apart from the pool by the encoder's score: weights that follow the encoder's own opinion are "
            "not tried, since they would look good on this target alone. Give a target (--target) for more"
        )
    return (
        f"the target is not like the pool: the encoder's cosines of its pairs are {found.cosine_gap:.2f} standard deviations "
        f"above those of the pairs that are kept, and it finds {100 * found.found_gap:.0f} in a hundred more of their "
        "partners. Its pictures may be in the encoder's training data, or have been chosen by its score. Weights that follow "
        "the encoder's own opinion are not tried, since they would look good on this target alone; a target drawn from the "
        "pool and held back says more"
    )
