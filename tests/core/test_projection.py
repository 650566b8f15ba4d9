"""Random projections: the same from their seed, linear, and true to inner products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influencespace.core.projection import (
    GRANULE,
    Kind,
    TwoSided,
    leading_sides,
    random_projection,
    random_sides,
    sides_for,
)

KINDS: tuple[Kind, ...] = ("gaussian", "rademacher")


def vectors(n: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_rows_do_not_depend_on_how_many_follow(kind: Kind) -> None:
    whole = random_projection(2 * GRANULE + 300, 3, seed=5, kind=kind)
    for size in (1, 300, GRANULE, GRANULE + 7):
        torch.testing.assert_close(
            random_projection(size, 3, seed=5, kind=kind), whole[:size], rtol=0, atol=0
        )


def test_the_seed_and_the_stream_are_all_that_matters() -> None:
    one = random_projection(50, 4, seed=1)
    torch.testing.assert_close(random_projection(50, 4, seed=1), one, rtol=0, atol=0)
    assert not torch.allclose(random_projection(50, 4, seed=2), one)
    assert not torch.allclose(random_projection(50, 4, seed=1, stream=1), one)


@pytest.mark.parametrize("kind", [*KINDS, "two-sided"])
def test_inner_products_are_kept_in_expectation(kind: str) -> None:
    """Over many seeds the mean is within four standard errors."""
    x, y = vectors(2, 9 * 7)

    def product(seed: int) -> float:
        if kind == "two-sided":
            P = random_sides((9, 7), 12, seed=seed)
            return float((P(x.reshape(9, 7)) * P(y.reshape(9, 7))).sum())
        Q = random_projection(63, 6, seed=seed, kind=kind)  # type: ignore[arg-type]
        return float((x @ Q) @ (y @ Q))

    products = np.array([product(seed) for seed in range(600)])
    assert abs(products.mean() - float(x @ y)) < 4 * products.std() / np.sqrt(len(products))


def test_two_sided_is_one_dense_projection_of_the_flat_matrix() -> None:
    projection, G = random_sides((6, 5), 6, seed=4), vectors(4, 30).reshape(4, 6, 5)
    assert (projection.shape, projection.sides) == ((6, 5), (3, 2))
    kronecker = torch.kron(projection.A, projection.B)
    torch.testing.assert_close(projection(G).flatten(1), G.flatten(1) @ kronecker)
    D = vectors(1, 30).abs().reshape(6, 5)
    torch.testing.assert_close(projection.diagonal(D), kronecker.T @ torch.diag(D.flatten()) @ kronecker)
    Z = vectors(1, 6, seed=1).reshape(3, 2)
    torch.testing.assert_close((projection.transpose(Z) * G[0]).sum(), (Z * projection(G[0])).sum())


def test_sides_that_would_not_get_smaller_are_left_alone() -> None:
    G = vectors(1, 30).reshape(6, 5)
    whole = random_sides((6, 5), 100)
    assert whole.exact
    torch.testing.assert_close(whole(G), G, rtol=0, atol=0)
    assert not TwoSided(whole.A, whole.B[:, :2]).exact


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


@pytest.mark.parametrize("options", [{"size": 0}, {"dimension": 0}, {"seed": -1}, {"stream": -1}])
def test_impossible_projections_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        random_projection(**{"size": 4, "dimension": 2, **options})
    with pytest.raises(ValueError, match="must be positive"):
        sides_for((4, 3), 0)


@pytest.mark.parametrize(("dimension", "sides"), [(9, (3, 3)), (20, (5, 4)), (100, (7, 4))])
def test_leading_sides_keep_what_lies_within_them(dimension: int, sides: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    U_A, U_B = (
        torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in (7, 4)
    )
    projection = leading_sides(U_A, U_B, dimension)
    A, B = projection.A, projection.B
    assert projection.sides == sides
    assert projection.exact == (sides == (7, 4))
    for side, size in zip((A, B), (7, 4)):
        if side.shape[1] == size:
            torch.testing.assert_close(side, torch.eye(size, dtype=torch.float64))
    X, Y = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    within = A @ A.T @ Y @ B @ B.T
    torch.testing.assert_close((projection(X) * projection(within)).sum(), (X * within).sum())
    torch.testing.assert_close(A.T @ A, torch.eye(sides[0], dtype=torch.float64))
    if sides == (3, 3):
        torch.testing.assert_close(A, U_A[:, 4:])
