"""Seeded random projections that keep inner products in expectation, one-sided for vectors and two-sided for matrices.

Sources: Johnson and Lindenstrauss 1984; Achlioptas 2003 (signs); LoGra, Choe et al. 2024 (two-sided).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRANULE = 1024  # rows from one generator, so that the first rows do not depend on how many follow
Kind = Literal["gaussian", "rademacher"]


def random_projection(
    size: int, dimension: int, *, seed: int = 0, stream: int = 0, kind: Kind = "gaussian"
) -> Tensor:
    """Matrix (size, dimension) of independent entries of variance 1 / dimension, in float64 on the CPU.

    `stream` tells apart the projections of one seed. Raises ValueError for sizes below one and negative seeds.
    """
    if min(size, dimension) < 1 or seed < 0 or stream < 0:
        raise ValueError(
            f"a projection of shape {(size, dimension)} from seed {seed}, stream {stream}: sizes must be positive and seeds "
            "not negative"
        )
    rows: list[NDArray[Any]] = []
    for index, start in enumerate(range(0, size, GRANULE)):
        generator = np.random.default_rng([seed, stream, index])
        shape = min(GRANULE, size - start), dimension
        if kind == "gaussian":
            rows.append(generator.standard_normal(shape))
        else:
            rows.append(2.0 * generator.integers(0, 2, shape) - 1)
    return torch.from_numpy(np.concatenate(rows)) / math.sqrt(dimension)


@dataclass(frozen=True)
class TwoSided:
    """A projection of matrices: G (..., a, b) -> A^T G B (..., k1, k2) by thin A and B.

    Small where a dense one of as many dimensions is not: (a k1 + b k2) numbers for a b k1 k2 (LoGra, equation 7).
    """

    A: Tensor  # (a, k1)
    B: Tensor  # (b, k2)

    @property
    def shape(self) -> tuple[int, int]:
        """(a, b) of the matrices that are projected."""
        return len(self.A), len(self.B)

    @property
    def sides(self) -> tuple[int, int]:
        """(k1, k2) of what they become."""
        return self.A.shape[1], self.B.shape[1]

    @property
    def exact(self) -> bool:
        """Whether nothing is projected away."""
        return self.shape == self.sides

    def __call__(self, G: Tensor) -> Tensor:
        return self.A.to(G).T @ G @ self.B.to(G)

    def transpose(self, Z: Tensor) -> Tensor:
        """Z (..., k1, k2) -> A Z B^T (..., a, b), whose inner product with G is that of Z with the projected G."""
        return self.A.to(Z) @ Z @ self.B.to(Z).T

    def diagonal(self, D: Tensor) -> Tensor:
        """The projected diagonal matrix with entries D (a, b): P^T diag(D) P, (k1 k2, k1 k2)."""
        A, B = self.A.to(D), self.B.to(D)
        squares_A = torch.einsum("ai,aj->ija", A, A)
        squares_B = torch.einsum("bi,bj->ijb", B, B)
        k = A.shape[1] * B.shape[1]
        return torch.einsum("ija,ab,klb->ikjl", squares_A, D, squares_B).reshape(k, k)


def sides_for(shape: tuple[int, int], dimension: int) -> tuple[int, int]:
    """(k1, k2) with k1 k2 at most `dimension`, as square as the matrix's own sides allow.

    Raises ValueError for a dimension below one.
    """
    if dimension < 1:
        raise ValueError(f"dimension is {dimension}; it must be positive")
    k2 = min(shape[1], math.isqrt(dimension))
    k1 = min(shape[0], dimension // k2)
    return k1, min(shape[1], dimension // k1)


def random_sides(shape: tuple[int, int], dimension: int, *, seed: int = 0, stream: int = 0) -> TwoSided:
    """Random sides as `sides_for` divides `dimension`; a side that would not get smaller is left as it is."""
    A, B = (
        torch.eye(size, dtype=torch.float64)
        if size == k
        else random_projection(size, k, seed=seed, stream=2 * stream + side)
        for side, (size, k) in enumerate(zip(shape, sides_for(shape, dimension)))
    )
    return TwoSided(A, B)


def leading_sides(U_A: Tensor, U_B: Tensor, dimension: int) -> TwoSided:
    """Onto the last columns of U_A (a, a) and U_B (b, b), eigenvectors in rising order, as `sides_for` divides `dimension`.

    Keeps the inner products of matrices that lie within those sides, where random sides add noise to all. A side that
    would not get smaller is left as it is.
    """
    sides = sides_for((len(U_A), len(U_B)), dimension)
    A, B = (torch.eye(k).to(U) if k == len(U) else U[:, -k:].contiguous() for U, k in zip((U_A, U_B), sides))
    return TwoSided(A, B)
