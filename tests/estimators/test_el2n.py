"""EL2N against softmaxes written out, in float64."""

from dataclasses import replace

import laws
import numpy as np
import pytest
import torch
from torch import Tensor

from influencespace.estimators.el2n import El2n, errors
from influencespace.estimators.problem import scores
from influencespace.models.space import Space
from influencespace.models.trajectory import space_at

PROBLEM = laws.SMALL.problem


@torch.no_grad()
def loop(space: Space) -> list[float]:
    """Mean error of each pair: the vectors P - e and Q - e over its own and each of the batch's other B - 1 matches."""
    images, texts = laws.SMALL.pool
    found = []
    for z in range(laws.SMALL.pairs):
        lengths = []
        for recorded in PROBLEM.bank:
            if z in recorded.image:
                continue
            assert len(recorded.image) == PROBLEM.batch_size - 1
            u, t = space.proxy(images[z : z + 1], texts[z : z + 1])
            cu, ct = space.proxy(*recorded.inputs)
            rows = (
                PROBLEM.objective.scale * u @ torch.cat([t, ct]).T,
                PROBLEM.objective.scale * t @ torch.cat([u, cu]).T,
            )
            right = torch.eye(len(cu) + 1, dtype=torch.float64)[0]
            squares = [float((row[0].softmax(0) - right).square().sum()) for row in rows]
            lengths.append(np.sqrt(sum(squares)))
        found.append(float(np.mean(lengths)))
    return found


def test_it_is_minus_the_length_of_the_errors() -> None:
    np.testing.assert_allclose(scores(El2n(), PROBLEM, laws.WHOLE), -np.array(loop(PROBLEM.space)), rtol=1e-9)


def test_early_is_at_the_first_checkpoint_where_there_is_one() -> None:
    early = El2n(when="early")
    truth = loop(PROBLEM.checkpoints[0].load())
    np.testing.assert_allclose(scores(early, PROBLEM, laws.WHOLE), -np.array(truth), rtol=1e-9)
    without = scores(early, replace(PROBLEM, checkpoints=()), laws.WHOLE)
    np.testing.assert_array_equal(without, scores(El2n(), PROBLEM, laws.WHOLE))


def test_early_reads_a_checkpoint_that_shares_its_module_with_the_trained_proxy() -> None:
    """As in a replayed training: the module holds the final parameters, the space those of the checkpoint."""
    own = PROBLEM.checkpoints[0].load()
    theta = own.flatten(own.parameters)
    shared = replace(PROBLEM.checkpoints[0], load=lambda: space_at(PROBLEM.space, theta))
    found = scores(El2n(when="early"), replace(PROBLEM, checkpoints=[shared]), laws.WHOLE)
    np.testing.assert_allclose(found, scores(El2n(when="early"), PROBLEM, laws.WHOLE), rtol=1e-9)
    assert np.abs(found - scores(El2n(), PROBLEM, laws.WHOLE)).max() > 0.01


def test_hard_is_the_papers_order() -> None:
    hard = scores(El2n(keep="hard"), PROBLEM, laws.WHOLE)
    np.testing.assert_array_equal(hard, -scores(El2n(), PROBLEM, laws.WHOLE))


def unit(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, 3, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_small_negative_batch_stands_for_copies_of_its_pairs(times: int) -> None:
    u, t, cu, ct = (unit(n, seed) for seed, n in enumerate((4, 4, 6, 6)))
    copies = errors(u, t, cu.repeat(times, 1), ct.repeat(times, 1), 3.0, 6 * times + 1)
    torch.testing.assert_close(errors(u, t, cu, ct, 3.0, 6 * times + 1), copies)


def test_errors_are_within_their_bounds() -> None:
    u, t, cu, ct = (unit(n, seed) for seed, n in enumerate((50, 50, 6, 6)))
    found = errors(u, t, cu, ct, 100.0, 7)
    assert (found >= 0).all()
    assert (found <= 2).all()
    assert float(found.max()) > 1.9
