"""Random projections: the same from their seed, linear, and true to inner products."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influencespace.core.projection import (
    GRANULE,
    Dense,
    Kind,
    TwoSided,
    check_norm,
    expected_range,
    leading_sides,
    sides_for,
)

KINDS: tuple[Kind, ...] = ("gaussian", "rademacher")
SIZE = 2 * GRANULE + 300


def vectors(n: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, SIZE), max_size=4), seed=st.integers(0, 2**31))
def test_any_blocks_are_those_of_the_whole(kind: Kind, cuts: list[int], seed: int) -> None:
    projection = Dense(size=SIZE, dimension=3, seed=seed, kind=kind)
    borders = [0, *sorted(cuts), SIZE]
    parts = [projection.rows(a, b) for a, b in itertools.pairwise(borders)]
    torch.testing.assert_close(torch.cat(parts), projection.rows(0, SIZE), rtol=0, atol=0)


@pytest.mark.parametrize("block", [1, 77, GRANULE, 10 * GRANULE])
def test_projecting_in_any_bucket_size_is_the_matrix_product(block: int) -> None:
    projection, x = Dense(size=700, dimension=8, seed=3), vectors(4, 700)
    torch.testing.assert_close(projection(x, block), x @ projection.rows(0, 700), rtol=1e-12, atol=1e-12)


def test_the_seed_and_the_stream_are_all_that_matters() -> None:
    def matrix(**options: int) -> torch.Tensor:
        return Dense(size=50, dimension=4, **options).rows(0, 50)

    torch.testing.assert_close(matrix(seed=1), matrix(seed=1), rtol=0, atol=0)
    assert not torch.allclose(matrix(seed=1), matrix(seed=2))
    assert not torch.allclose(matrix(seed=1), matrix(seed=1, stream=1))


@pytest.mark.parametrize("kind", KINDS)
def test_dense_keeps_inner_products_in_expectation(kind: Kind) -> None:
    """Over many seeds the mean is within four standard errors."""
    x, y = vectors(2, 40)
    draws = [Dense(size=40, dimension=6, seed=seed, kind=kind)(torch.stack([x, y])) for seed in range(600)]
    products = np.array([float(a @ b) for a, b in draws])
    assert abs(products.mean() - float(x @ y)) < 4 * products.std() / np.sqrt(len(products))


def test_two_sided_keeps_inner_products_in_expectation() -> None:
    G, F = vectors(2, 9 * 7).reshape(2, 9, 7)
    draws = [TwoSided(shape=(9, 7), sides=(4, 3), seed=seed)(torch.stack([G, F])) for seed in range(600)]
    products = np.array([float((a * b).sum()) for a, b in draws])
    assert abs(products.mean() - float((G * F).sum())) < 4 * products.std() / np.sqrt(len(products))


def test_projections_are_linear() -> None:
    dense, two_sided = Dense(size=30, dimension=5), TwoSided(shape=(6, 5), sides=(3, 2))
    x, y = vectors(2, 30)
    torch.testing.assert_close(dense(2 * x - 3 * y), 2 * dense(x) - 3 * dense(y))
    G, F = x.reshape(6, 5), y.reshape(6, 5)
    torch.testing.assert_close(two_sided(2 * G - 3 * F), 2 * two_sided(G) - 3 * two_sided(F))


def test_two_sided_is_one_dense_projection_of_the_flat_matrix() -> None:
    projection, G = TwoSided(shape=(6, 5), sides=(3, 2), seed=4), vectors(4, 30).reshape(4, 6, 5)
    kronecker = torch.kron(*projection.matrices)
    torch.testing.assert_close(projection(G).flatten(1), G.flatten(1) @ kronecker)
    D = vectors(1, 30).abs().reshape(6, 5)
    torch.testing.assert_close(projection.diagonal(D), kronecker.T @ torch.diag(D.flatten()) @ kronecker)


def test_the_transpose_moves_an_inner_product_to_the_original() -> None:
    projection = TwoSided(shape=(6, 5), sides=(3, 2), seed=4)
    G, Z = vectors(1, 30).reshape(6, 5), vectors(1, 6, seed=1).reshape(3, 2)
    torch.testing.assert_close((projection.transpose(Z) * G).sum(), (Z * projection(G)).sum())


def test_sides_that_are_not_made_smaller_are_left_alone() -> None:
    G = vectors(1, 30).reshape(6, 5)
    whole = TwoSided(shape=(6, 5), sides=(6, 5))
    assert whole.exact
    torch.testing.assert_close(whole(G), G, rtol=0, atol=0)
    assert not TwoSided(shape=(6, 5), sides=(6, 2)).exact


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), dimension=st.integers(1, 500))
def test_sides_fit_the_dimension_and_the_matrix(rows: int, columns: int, dimension: int) -> None:
    k1, k2 = sides_for((rows, columns), dimension)
    assert 1 <= k1 <= rows
    assert 1 <= k2 <= columns
    assert k1 * k2 <= dimension
    if rows * columns <= dimension:
        assert (k1, k2) == (rows, columns)


def test_a_column_is_projected_on_its_one_side() -> None:
    assert sides_for((300, 1), 256) == (256, 1)
    assert sides_for((512, 256), 256) == (16, 16)


def test_a_projection_that_loses_its_probe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Dense, index: int) -> torch.Tensor:
        return torch.zeros(20, 4, dtype=torch.float64)

    monkeypatch.setattr(Dense, "_granule", nothing)
    with pytest.raises(ValueError, match=r"\(20, 4\) from seed 9"):
        Dense(size=20, dimension=4, seed=9)


@pytest.mark.parametrize("squared", [0.0, 1e-13, 30.0, float("nan"), float("inf")])
def test_norms_out_of_range_are_named(squared: float) -> None:
    with pytest.raises(ValueError, match="seed 3"):
        check_norm(squared, (20, 4), 3)


def test_the_range_narrows_with_the_dimension() -> None:
    ranges = [expected_range(k) for k in (1, 16, 256, 4096)]
    assert all(low < 1 < high for low, high in ranges)
    assert ranges[-1][0] > 0.85
    assert ranges[-1][1] < 1.15


@pytest.mark.parametrize("options", [{"size": 0}, {"dimension": 0}, {"seed": -1}, {"stream": -1}])
def test_impossible_projections_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Dense(**{"size": 4, "dimension": 2, **options})
    with pytest.raises(ValueError, match="not be smaller"):
        TwoSided(shape=(4, 3), sides=(5, 3))
    with pytest.raises(ValueError, match="must be positive"):
        sides_for((4, 3), 0)


@pytest.mark.parametrize(("dimension", "sides"), [(9, (3, 3)), (20, (5, 4)), (100, (7, 4))])
def test_leading_sides_keep_what_lies_within_them(dimension: int, sides: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    U_A, U_B = (
        torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in (7, 4)
    )
    projection = leading_sides(U_A, U_B, dimension)
    assert projection.sides == sides
    assert projection.exact == (sides == (7, 4))
    for side, size in zip(projection.matrices, (7, 4)):
        if side.shape[1] == size:
            torch.testing.assert_close(side, torch.eye(size, dtype=torch.float64))
    X, Y = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    A, B = projection.matrices
    within = A @ A.T @ Y @ B @ B.T
    torch.testing.assert_close((projection(X) * projection(within)).sum(), (X * within).sum())
    torch.testing.assert_close(A.T @ A, torch.eye(sides[0], dtype=torch.float64))
    if sides == (3, 3):
        torch.testing.assert_close(A, U_A[:, 4:])
