"""The sketch and the solves against dense linear algebra, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influencespace.core import linalg


def spectrum_matrix(p: int, seed: int, decay: float = 0.7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))[0]
    return U @ torch.diag(decay ** torch.arange(p, dtype=torch.float64)) @ U.T


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_full_rank_sketch_is_the_matrix(seed: int) -> None:
    G = spectrum_matrix(12, seed)
    Omega = linalg.probes(12, 12, seed, torch.float64)
    sketch = linalg.nystrom(Omega, G @ Omega)
    torch.testing.assert_close(sketch.U @ torch.diag(sketch.lam) @ sketch.U.T, G, atol=1e-8, rtol=0)


def test_a_low_rank_sketch_is_near_the_best_one() -> None:
    G = spectrum_matrix(60, 0)
    Omega = linalg.probes(60, 25, 1, torch.float64)
    sketch = linalg.nystrom(Omega, G @ Omega)
    error = torch.linalg.matrix_norm(sketch.U @ torch.diag(sketch.lam) @ sketch.U.T - G, 2)
    assert float(error) < 50 * 0.7**25


def test_a_singular_matrix_and_zero_are_sketched() -> None:
    Omega = linalg.probes(10, 6, 0, torch.float64)
    g = torch.ones(10, dtype=torch.float64)
    one = torch.outer(g, g)
    assert float(linalg.nystrom(Omega, one @ Omega).lam[0]) == pytest.approx(10, rel=1e-6)
    zero = linalg.nystrom(Omega, torch.zeros(10, 6, dtype=torch.float64))
    torch.testing.assert_close(linalg.woodbury(zero, 0.5, g), g / 0.5, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), damping=st.sampled_from([1e-3, 1e-1, 1.0]))
def test_woodbury_inverts_the_sketched_matrix(seed: int, damping: float) -> None:
    G = spectrum_matrix(30, seed)
    Omega = linalg.probes(30, 30, seed, torch.float64)
    g = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = linalg.woodbury(linalg.nystrom(Omega, G @ Omega), damping, g)
    dense = torch.linalg.solve(G + damping * torch.eye(30, dtype=torch.float64), g.T).T
    torch.testing.assert_close(x, dense, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.sampled_from([2, 10, 20]), damping=st.sampled_from([1e-3, 1e-1]))
def test_conjugate_gradients_solve_whatever_the_sketch(seed: int, rank: int, damping: float) -> None:
    G = spectrum_matrix(40, seed)
    Omega = linalg.probes(40, rank, seed, torch.float64)
    g = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    solution = linalg.conjugate_gradients(
        lambda x: x @ G, linalg.nystrom(Omega, G @ Omega), damping, g, tolerance=1e-10, max_iterations=200
    )
    dense = torch.linalg.solve(G + damping * torch.eye(40, dtype=torch.float64), g.T).T
    assert solution.residual < 1e-10
    torch.testing.assert_close(solution.x, dense, rtol=1e-6, atol=1e-7)


def test_a_good_sketch_needs_few_iterations() -> None:
    G = spectrum_matrix(200, 0, decay=0.9)
    g = torch.randn(1, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    iterations = []
    for rank in (2, 80):
        Omega = linalg.probes(200, rank, 0, torch.float64)
        sketch = linalg.nystrom(Omega, G @ Omega)
        iterations.append(
            linalg.conjugate_gradients(lambda x: x @ G, sketch, 1e-4, g, tolerance=1e-8).iterations
        )
    assert iterations[1] < iterations[0] / 2


def test_what_cannot_be_solved_is_said() -> None:
    Omega = linalg.probes(10, 4, 0, torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        linalg.nystrom(Omega, torch.full((10, 4), float("nan"), dtype=torch.float64))
    with pytest.raises(ValueError, match="not positive semi-definite"):
        linalg.nystrom(Omega, -Omega)
    sketch = linalg.nystrom(Omega, Omega)
    with pytest.raises(ValueError, match="damping is 0"):
        linalg.woodbury(sketch, 0, torch.ones(10, dtype=torch.float64))
    nothing = torch.full((1, 10), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        linalg.conjugate_gradients(lambda x: nothing, sketch, 1.0, torch.ones_like(nothing))
    with pytest.raises(ValueError, match="rank 11 exceeds"):
        linalg.probes(10, 11, 0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), damping=st.floats(1e-3, 10.0))
def test_conjugate_gradients_solve_without_a_sketch(seed: int, damping: float) -> None:
    G = spectrum_matrix(20, seed)
    g = torch.randn(2, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = linalg.conjugate_gradients(
        lambda x: x @ G, linalg.no_sketch(g[0]), damping, g, tolerance=1e-10, max_iterations=200
    )
    truth = torch.linalg.solve(G + damping * torch.eye(20, dtype=torch.float64), g.T).T
    torch.testing.assert_close(found.x, truth, rtol=1e-6, atol=1e-8)
