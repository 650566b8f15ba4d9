"""The sketch against dense linear algebra, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import spectrum_matrix

from influencespace.core.nystrom import nystrom, probes, woodbury


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_full_rank_sketch_is_the_matrix(seed: int) -> None:
    G = spectrum_matrix(12, seed)
    Omega = probes(12, range(12), seed, torch.float64)
    sketch = nystrom(Omega, G @ Omega)
    torch.testing.assert_close(sketch.U @ torch.diag(sketch.lam) @ sketch.U.T, G, atol=1e-8, rtol=0)


def test_a_low_rank_sketch_is_near_the_best_one() -> None:
    G = spectrum_matrix(60, 0)
    Omega = probes(60, range(25), 1, torch.float64)
    sketch = nystrom(Omega, G @ Omega)
    error = torch.linalg.matrix_norm(sketch.U @ torch.diag(sketch.lam) @ sketch.U.T - G, 2)
    assert float(error) < 50 * 0.7**25


def test_a_singular_matrix_and_zero_are_sketched() -> None:
    Omega = probes(10, range(6), 0, torch.float64)
    g = torch.ones(10, dtype=torch.float64)
    one = torch.outer(g, g)
    assert float(nystrom(Omega, one @ Omega).lam[0]) == pytest.approx(10, rel=1e-6)
    zero = nystrom(Omega, torch.zeros(10, 6, dtype=torch.float64))
    torch.testing.assert_close(woodbury(zero, 0.5, g), g / 0.5, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), damping=st.sampled_from([1e-3, 1e-1, 1.0]))
def test_woodbury_inverts_the_sketched_matrix(seed: int, damping: float) -> None:
    G = spectrum_matrix(30, seed)
    Omega = probes(30, range(30), seed, torch.float64)
    g = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = woodbury(nystrom(Omega, G @ Omega), damping, g)
    dense = torch.linalg.solve(G + damping * torch.eye(30, dtype=torch.float64), g.T).T
    torch.testing.assert_close(x, dense, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_sketch_is_that_of_the_space_of_its_probes(seed: int) -> None:
    """Any basis of it: here an orthonormal one."""
    G = spectrum_matrix(30, seed)
    Omega = probes(30, range(8), seed, torch.float64)
    Q = torch.linalg.qr(Omega)[0]
    one, other = nystrom(Omega, G @ Omega), nystrom(Q, G @ Q)
    torch.testing.assert_close(one.lam, other.lam, rtol=1e-8, atol=1e-10)
    dense = [sketch.U @ torch.diag(sketch.lam) @ sketch.U.T for sketch in (one, other)]
    torch.testing.assert_close(*dense, rtol=0, atol=1e-8)


def test_a_probe_is_the_same_whichever_others_are_drawn() -> None:
    Omega = probes(20, range(9), 3)
    torch.testing.assert_close(torch.cat([probes(20, range(4), 3), probes(20, range(4, 9), 3)], 1), Omega)
    assert not torch.equal(probes(20, range(4), 4), Omega[:, :4])
    assert len({tuple(column.tolist()) for column in Omega.T}) == 9


def test_what_cannot_be_sketched_is_reported() -> None:
    Omega = probes(10, range(4), 0, torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        nystrom(Omega, torch.full((10, 4), float("nan"), dtype=torch.float64))
    with pytest.raises(ValueError, match="not positive semi-definite"):
        nystrom(Omega, -Omega)
    with pytest.raises(ValueError, match="damping is 0"):
        woodbury(nystrom(Omega, Omega), 0, torch.ones(10, dtype=torch.float64))
    with pytest.raises(ValueError, match="rank 11 exceeds"):
        probes(10, range(11), 0)
