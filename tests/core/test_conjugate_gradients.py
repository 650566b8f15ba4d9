"""Conjugate gradients against dense solves, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import spectrum_matrix

from influencespace.core.conjugate_gradients import conjugate_gradients
from influencespace.core.nystrom import no_sketch, nystrom, probes


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.sampled_from([2, 10, 20]), damping=st.sampled_from([1e-3, 1e-1]))
def test_conjugate_gradients_solve_whatever_the_sketch(seed: int, rank: int, damping: float) -> None:
    G = spectrum_matrix(40, seed)
    Omega = probes(40, range(rank), seed, torch.float64)
    g = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    solution = conjugate_gradients(
        lambda x: x @ G, nystrom(Omega, G @ Omega), damping, g, tolerance=1e-10, max_iterations=200
    )
    dense = torch.linalg.solve(G + damping * torch.eye(40, dtype=torch.float64), g.T).T
    assert solution.residual < 1e-10
    torch.testing.assert_close(solution.x, dense, rtol=1e-6, atol=1e-7)


def test_a_good_sketch_needs_few_iterations() -> None:
    G = spectrum_matrix(200, 0, decay=0.9)
    g = torch.randn(1, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    iterations = []
    for rank in (2, 80):
        Omega = probes(200, range(rank), 0, torch.float64)
        sketch = nystrom(Omega, G @ Omega)
        iterations.append(conjugate_gradients(lambda x: x @ G, sketch, 1e-4, g, tolerance=1e-8).iterations)
    assert iterations[1] < iterations[0] / 2


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), damping=st.floats(1e-3, 10.0))
def test_conjugate_gradients_solve_without_a_sketch(seed: int, damping: float) -> None:
    G = spectrum_matrix(20, seed)
    g = torch.randn(2, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = conjugate_gradients(
        lambda x: x @ G, no_sketch(g[0]), damping, g, tolerance=1e-10, max_iterations=200
    )
    truth = torch.linalg.solve(G + damping * torch.eye(20, dtype=torch.float64), g.T).T
    torch.testing.assert_close(found.x, truth, rtol=1e-6, atol=1e-8)


def test_products_that_are_not_finite_are_reported() -> None:
    nothing = torch.full((1, 10), torch.nan, dtype=torch.float64)
    g = torch.ones_like(nothing)
    with pytest.raises(ValueError, match="not finite"):
        conjugate_gradients(lambda x: nothing, no_sketch(g[0]), 1.0, g)
