"""What methods train on that choose no pairs: everything, the target alone, and pool and target together."""

from dataclasses import dataclass

import numpy as np

from influencespace.core.arrays import FloatArray
from influencespace.data.joined import Joined, TrainingPairs
from influencespace.run import Run
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.proxies.train_many import Given, Uniform, Weights
from influencespace.stages.rivals.names import EVERYTHING, TARGET_ALONE


@dataclass(frozen=True)
class WithoutChoosing:
    """1, but 0 for the pairs of the target that make choices."""

    pairs: Joined
    halves: TargetHalves

    def read(self, start: int, stop: int) -> FloatArray:
        of_target, own = self.pairs.places(slice(start, stop))
        weights = np.ones(stop - start)
        weights[of_target] = gradient_half(self.halves)[own[of_target]]
        return weights


def gradient_half(halves: TargetHalves) -> FloatArray:
    """1 for each pair of the half that gives gradients, else 0 (n,)."""
    weights = np.zeros(len(halves.target))
    weights[halves.gradient] = 1
    return weights


def training_set(run: Run, method: str, *, whole: bool) -> tuple[TrainingPairs, Weights]:
    """The pairs that a method trains on and their weights: with the whole target, or with the half that makes no choices."""
    if method == EVERYTHING:
        return run.everything, Uniform()
    halves = TargetHalves(run.target, run.seed)
    if method == TARGET_ALONE:
        return run.target, Uniform() if whole else Given(gradient_half(halves))
    pairs = Joined(run.everything, run.target)
    return pairs, Uniform() if whole else WithoutChoosing(pairs, halves)
