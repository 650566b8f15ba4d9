"""NormSim against a loop over the target, in float64."""

import laws
import numpy as np
import pytest
import torch

from influencespace.estimators.norm_sim import NormSim, Side, largest_cosine
from influencespace.estimators.problem import Batch, scores

PROBLEM = laws.SMALL.problem


def loop(side: int) -> np.ndarray:
    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    targets = laws.SMALL.target[side]
    return np.array([max(cosine(row, target) for target in targets) for row in laws.SMALL.pool[side]])


@pytest.mark.parametrize(("side", "rows"), [("image", [0]), ("text", [1]), ("both", [0, 1])])
def test_it_is_the_largest_cosine_to_the_target(side: Side, rows: list[int]) -> None:
    found = scores(NormSim(side=side), PROBLEM, laws.WHOLE)
    np.testing.assert_allclose(found, np.mean([loop(row) for row in rows], axis=0), rtol=1e-9)


@pytest.mark.parametrize("block", [1, 5, 64, 1000])
def test_the_target_can_be_taken_in_blocks(block: int) -> None:
    targets = laws.SMALL.target[0]
    whole = largest_cosine(laws.SMALL.pool[0], targets)
    torch.testing.assert_close(largest_cosine(laws.SMALL.pool[0], targets, block), whole)


def test_a_pair_of_the_target_scores_one() -> None:
    inputs = (3 * laws.SMALL.target[0][:5], laws.SMALL.target[1][:5])
    rows = np.arange(5)
    batch = Batch(uid=[str(i) for i in rows], inputs=inputs, image=rows, row=rows)
    np.testing.assert_allclose(scores(NormSim(), PROBLEM, [batch]), 1)


def test_a_pair_that_is_not_finite_is_nan() -> None:
    inputs = (torch.full((1, 6), torch.nan, dtype=torch.float64), laws.SMALL.target[1][:1])
    batch = Batch(uid=["a"], inputs=inputs, image=np.array([0]), row=np.array([0]))
    assert np.isnan(scores(NormSim(), PROBLEM, [batch])[0])
