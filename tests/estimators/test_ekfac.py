"""EK-FAC against the whole curvature of a small proxy, in float64."""

from dataclasses import replace

import laws
import numpy as np
import pytest
import torch

from influencespace.errors import InputError
from influencespace.estimators.ecif import Ecif
from influencespace.estimators.ekfac import EkFac, kronecker_blocks
from influencespace.estimators.influence import CurvatureConfig
from influencespace.estimators.problem import scores
from influencespace.models.projected import reduced_space

PROBLEM = laws.SMALL.problem
BATCHES = [recorded.inputs for recorded in PROBLEM.bank]


@pytest.fixture(scope="module")
def curvature() -> torch.Tensor:
    """The Gauss-Newton matrix over the bank (p, p)."""
    eye = torch.eye(PROBLEM.space.size, dtype=torch.float64)
    return replace(PROBLEM, preconditioner=torch.ones_like(eye[0])).curvature(eye)


def rotation(draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (p, p) and lam (p,) of both heads together."""
    blocks = kronecker_blocks(PROBLEM.space.parameters, BATCHES, PROBLEM.objective.scale, draws, 0)
    found = [blocks[name] for name in PROBLEM.space.parameters]
    U = torch.block_diag(*(torch.kron(block.U_A, block.U_S) for block in found))
    return U, torch.cat([block.lam.flatten() for block in found])


def test_the_diagonal_is_the_curvatures_in_the_eigenbasis(curvature: torch.Tensor) -> None:
    """Many draws: the mean square of gradients for drawn labels is the Gauss-Newton diagonal."""
    U, lam = rotation(3000)
    torch.testing.assert_close(U.T @ U, torch.eye(len(U), dtype=torch.float64), rtol=0, atol=1e-10)
    truth = (U.T @ curvature @ U).diagonal()
    assert float((lam - truth).norm() / truth.norm()) < 0.05
    assert float(lam.sum() / truth.sum()) == pytest.approx(1, abs=0.03)


def test_the_eigenbasis_is_nearer_to_diagonal_than_the_coordinates(curvature: torch.Tensor) -> None:
    U, _ = rotation(200)

    def off_diagonal(G: torch.Tensor) -> float:
        return float((G - G.diagonal().diag()).norm() / G.norm())

    assert off_diagonal(U.T @ curvature @ U) < 0.8 * off_diagonal(curvature)


def test_the_direction_is_nearer_to_the_exact_one_than_the_gradient_is() -> None:
    """The exact one is by conjugate gradients to the end; at a damping that lets the curvature matter."""
    problem = replace(PROBLEM, damping=PROBLEM.damping / 30)
    estimator = Ecif(curvature=CurvatureConfig(tolerance=1e-8, max_iterations=500))
    exact = estimator.solution(problem, problem.target_gradient[None]).x[0]

    def cosine(x: torch.Tensor) -> float:
        D = problem.preconditioner
        return float((x * D * exact).sum() / ((x * D * x).sum() * (exact * D * exact).sum()).sqrt())

    blocks = kronecker_blocks(problem.space.parameters, BATCHES, problem.objective.scale, 200, 0)
    g, D = (problem.space.unflatten(v) for v in (problem.target_gradient, problem.preconditioner))
    found = problem.space.flatten({k: blocks[k].solve(g[k], D[k], problem.damping) for k in blocks})
    plain = problem.target_gradient / problem.preconditioner
    assert cosine(found) > cosine(plain) + 0.05


def test_heavy_damping_leaves_the_preconditioned_gradient() -> None:
    heavy = replace(PROBLEM, damping=1e9)
    a, b = scores(EkFac(), heavy, laws.WHOLE), scores(Ecif(), heavy, laws.WHOLE)
    assert np.corrcoef(a, b)[0, 1] > 0.9


def test_other_proxies_are_refused() -> None:
    reduced = reduced_space(PROBLEM.space, 4, 0).space
    with pytest.raises(InputError, match="ekfac is for proxies that are linear heads"):
        scores(EkFac(), replace(PROBLEM, space=reduced), laws.WHOLE)
