"""Self-influence against dense inverses, in float64."""

import laws
import numpy as np
import pytest
import torch

from influencespace.estimators.problem import scores
from influencespace.estimators.self_influence import SelfInfluence
from influencespace.models.projected import reduced_space

PROBLEM = laws.SMALL.problem


@pytest.mark.parametrize("dimension", [6, 256])
def test_it_is_minus_the_inverse_curvature_between_a_gradient_and_itself(dimension: int) -> None:
    eye = torch.eye(PROBLEM.space.size, dtype=torch.float64)
    products = [PROBLEM.space.gauss_newton(c.inputs, eye, PROBLEM.objective) for c in PROBLEM.bank]
    H = torch.stack(products).mean(0) + PROBLEM.damping * torch.diag(PROBLEM.preconditioner)
    matrix = laws.projection_matrix(reduced_space(PROBLEM.space, dimension, PROBLEM.seed))
    g = laws.dense_gradients(PROBLEM, laws.WHOLE[0]) @ matrix
    inverse = torch.linalg.inv(matrix.T @ H @ matrix)
    truth = torch.stack([-row @ inverse @ row for row in g])
    found = scores(SelfInfluence(dimension=dimension), PROBLEM, laws.WHOLE)
    np.testing.assert_allclose(found, truth, rtol=1e-7, atol=1e-9)


def test_it_is_never_positive() -> None:
    assert (scores(SelfInfluence(), PROBLEM, laws.WHOLE) < 0).all()
