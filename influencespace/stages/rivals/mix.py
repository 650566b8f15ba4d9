"""The mix of given scores that M-FLYT learns."""

from dataclasses import dataclass, field

import numpy as np

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import BLOCK
from influencespace.models.mixing import learn_mix
from influencespace.run import Run, Workers
from influencespace.stages.proxies.train_many import training_memory
from influencespace.stages.rivals.names import GIVEN
from influencespace.stages.rivals.ranking import Rankings
from influencespace.stages.scoring.scoring import ScoringInputs

MIX = "m_flyt"


@dataclass
class ScoresOfRows:
    """Standardised scores of some rows (m, K): a block is read at once, as batches are of few of them."""

    rankings: Rankings
    names: tuple[str, ...]
    rows: int
    _held: dict[int, FloatArray] = field(default_factory=dict)

    def __call__(self, rows: IntArray) -> FloatArray:
        scores = np.empty((len(rows), len(self.names)))
        block = rows // BLOCK
        for number in np.unique(block):
            mine = block == number
            scores[mine] = self._block(int(number))[rows[mine] - number * BLOCK]
        return scores

    def _block(self, number: int) -> FloatArray:
        if number not in self._held:
            if len(self._held) > 1:  # what waits of the block before, and the one that is read now
                self._held.clear()
            span = number * BLOCK, min((number + 1) * BLOCK, self.rows)
            self._held[number] = np.stack([self.rankings.standard(name, *span) for name in self.names], 1)
        return self._held[number]


@dataclass(frozen=True, kw_only=True)
class LearnMix:
    """Task: what each score counts, learned along the training of the proxy of all pairs."""

    inputs: ScoringInputs
    rankings: Rankings

    @property
    def name(self) -> str:
        return f"the mix of {MIX}"

    def __call__(self) -> dict[str, float]:
        problem = self.inputs.problem()
        assert problem.trajectory is not None
        scores = ScoresOfRows(self.rankings, GIVEN, len(self.inputs.pool))
        target = [batch.inputs for batch in problem.target]
        return dict(zip(GIVEN, learn_mix(problem.trajectory, scores, target).tolist(), strict=True))


def learn_mix_of(run: Run, rankings: Rankings, workers: Workers) -> dict[str, float]:
    """What `m_flyt` counts each standardised score, on the first round's pool."""
    task = LearnMix(inputs=ScoringInputs.of(run.first, workers.device), rankings=rankings)
    needs = workers.heavy(memory=training_memory(run.everything))
    (mix,) = workers.map([task], unit="mixes", label=MIX, resources=needs)
    found: dict[str, float] = mix
    return found
