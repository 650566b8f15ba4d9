"""Momentary influence is what the very next step does, and what influence tends to at large damping."""

import numpy as np
import pytest
import torch
from problems import Small
from torch import Tensor

from influencespace.estimators.influence import InfluenceScorer
from influencespace.estimators.online_influence import online_direction, online_scorer
from influencespace.estimators.problem import Problem, mean_of_known
from influencespace.models.gradients import PairGradients
from influencespace.models.heads import Heads

SMALL = Small()
ROWS = np.arange(SMALL.pairs)


def recorded_batches(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    return [recorded.inputs for recorded in problem.target]


def scorer(problem: Problem) -> InfluenceScorer:
    return online_scorer(
        problem.space,
        recorded_batches(problem),
        problem.bank,
        problem.objective,
        problem.batch_size,
        problem.preconditioner,
    )


def pair_gradients(problem: Problem) -> Tensor:
    """Of every pair of the pool, by autograd: (n, p)."""
    gradients = PairGradients(
        space=problem.space, bank=problem.bank, objective=SMALL.config.objective, batch_size=SMALL.batch_size
    )
    return gradients((SMALL.pool[0], SMALL.pool[1]), ROWS)


def loss_at(theta: Tensor) -> float:
    heads = Heads(6, 6, 4).double()
    torch.nn.utils.vector_to_parameters(theta, heads.parameters())
    return SMALL.target_loss(heads)


def test_the_direction_is_the_targets_gradient_over_the_preconditioner() -> None:
    problem = SMALL.problem
    heads = problem.space.proxy
    terms = [problem.objective.terms(*heads(*inputs)) for inputs in recorded_batches(problem)]
    gradient = torch.autograd.grad(torch.cat(terms).mean(), list(heads.parameters()))
    expected = torch.cat([part.flatten() for part in gradient]) / problem.preconditioner
    found = online_direction(
        problem.space, recorded_batches(problem), problem.objective, problem.preconditioner
    )
    torch.testing.assert_close(found, expected[None])


def test_it_is_the_fall_of_the_target_loss_by_a_step_of_the_optimiser_on_the_pair() -> None:
    problem = SMALL.problem
    score = mean_of_known(scorer(problem)(SMALL.pool, ROWS).by_batch[0])
    theta = problem.space.flatten(problem.space.parameters)
    step = 1e-5
    for row in range(0, SMALL.pairs, 8):
        move = step * pair_gradients(problem)[row] / problem.preconditioner
        fall = (loss_at(theta + move) - loss_at(theta - move)) / (2 * step)
        assert fall == pytest.approx(score[row], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("damping", [1e3, 1e5])
def test_influence_tends_to_it_at_large_damping(damping: float) -> None:
    """(G + mu D)^-1 g times mu, by a dense solve."""
    problem = SMALL.problem
    D, root = problem.preconditioner, problem.preconditioner.sqrt()
    identity = torch.eye(problem.space.size, dtype=torch.float64)
    G = problem.curvature(identity)
    g = problem.target_gradient
    solved = damping * torch.linalg.solve(G + damping * identity, g / root) / root
    v = online_direction(problem.space, recorded_batches(problem), problem.objective, D)[0]
    largest = float(torch.linalg.eigvalsh(G)[-1])
    assert float(((solved - v) * root).norm() / (v * root).norm()) <= largest / damping
    assert float(((solved - v) * root).norm()) > 0
