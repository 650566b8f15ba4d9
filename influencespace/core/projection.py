"""Seeded random projections that keep inner products in expectation, regenerated from the seed and never stored.

A projection is made in granules of its input's entries, each from a generator of its own, so that any block of it is
the same in any pass, on any machine, whatever the other blocks. Sources: Johnson and Lindenstrauss 1984; Achlioptas
2003 (signs); LoGra, Choe et al. 2024 (two-sided).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

GRANULE = 1024
PROBE = 2**32 - 1  # the granule that no projection reaches: its generator draws the probe
Kind = Literal["gaussian", "rademacher"]


def expected_range(dimension: int, deviations: float = 6.0) -> tuple[float, float]:
    """Where the squared norm of a projected unit vector lies but for a chance of 1e-8 (1e-6 in one dimension; never near zero).

    The norm is a chi-square over its degrees of freedom, whose cube root is nearly normal (Wilson and Hilferty 1931).
    """
    variance = 2 / (9 * dimension)
    low, high = (1 - variance + sign * deviations * math.sqrt(variance) for sign in (-1, 1))
    return max(low, 1e-4) ** 3, high**3


def check_norm(squared: float, shape: tuple[int, int], seed: int) -> None:
    """Raises ValueError where a projected unit probe is (nearly) zero or far too large, or not finite."""
    low, high = expected_range(shape[1])
    if not low <= squared <= high:
        raise ValueError(
            f"the projection of shape {shape} from seed {seed} takes a unit probe to a squared norm of {squared:.3g}, "
            f"not within [{low:.3g}, {high:.3g}]; its random numbers are broken or very unlucky: choose another seed"
        )


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A projection of flat vectors (..., p) to (..., k): independent entries of variance 1/k.

    `stream` tells apart the projections of one seed. Raises ValueError for sizes below one, a negative seed, and where
    its own probe does not come through (see `check_norm`).
    """

    size: int
    """p."""
    dimension: int
    """k."""
    seed: int = 0
    stream: int = 0
    kind: Kind = "gaussian"

    def __post_init__(self) -> None:
        if min(self.size, self.dimension) < 1 or self.seed < 0 or self.stream < 0:
            raise ValueError(
                f"a projection of shape {(self.size, self.dimension)} from seed {self.seed}, stream {self.stream}: "
                "sizes must be positive and seeds not negative"
            )
        probe = torch.from_numpy(self._generator(PROBE).standard_normal(self.size))
        projected = self(probe / probe.norm())
        check_norm(float(projected.square().sum()), (self.size, self.dimension), self.seed)

    def _generator(self, granule: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.stream, granule])

    def _granule(self, index: int) -> Tensor:
        generator = self._generator(index)
        shape = (min(GRANULE, self.size - index * GRANULE), self.dimension)
        if self.kind == "gaussian":
            entries = torch.from_numpy(generator.standard_normal(shape))
        else:
            entries = torch.from_numpy(2.0 * generator.integers(0, 2, shape) - 1)
        return entries / math.sqrt(self.dimension)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the projection's matrix: (stop - start, k), in float64 on the CPU."""
        parts = [
            self._granule(index)[max(start - index * GRANULE, 0) : stop - index * GRANULE]
            for index in range(start // GRANULE, math.ceil(stop / GRANULE))
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.dimension, dtype=torch.float64)

    def __call__(self, x: Tensor, block: int = 16 * GRANULE) -> Tensor:
        """Projected vectors: (..., p) -> (..., k), holding `block` rows of the matrix at a time."""
        total = x.new_zeros(*x.shape[:-1], self.dimension)
        for start in range(0, self.size, block):
            stop = min(start + block, self.size)
            total = total + x[..., start:stop] @ self.rows(start, stop).to(x)
        return total


@dataclass(frozen=True, kw_only=True)
class TwoSided:
    """A projection of matrices: G (..., a, b) -> A^T G B (..., k1, k2) by thin A (a, k1) and B (b, k2).

    Small where a dense one of as many dimensions is not: (a k1 + b k2) numbers for a b k1 k2 (LoGra, equation 7). A side
    that is not made smaller is left as it is. Raises ValueError as `Dense`.
    """

    shape: tuple[int, int]
    sides: tuple[int, int]
    """(k1, k2), each at most the matrix's own."""
    seed: int = 0
    stream: int = 0
    given: tuple[Tensor, Tensor] | None = None
    """A and B with orthonormal columns, in place of random ones."""

    def __post_init__(self) -> None:
        if any(k > size for k, size in zip(self.sides, self.shape)):
            raise ValueError(f"a projection from {self.shape} to {self.sides} would not be smaller")
        _ = self.matrices

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B, in float64."""
        if self.given is not None:
            return self.given
        A, B = (self._side(side) for side in (0, 1))
        return A, B

    def _side(self, side: int) -> Tensor:
        size, dimension = self.shape[side], self.sides[side]
        if size == dimension:
            return torch.eye(size, dtype=torch.float64)
        dense = Dense(size=size, dimension=dimension, seed=self.seed, stream=2 * self.stream + side)
        return dense.rows(0, size)

    @property
    def exact(self) -> bool:
        """Whether nothing is projected away."""
        return self.shape == self.sides

    def __call__(self, G: Tensor) -> Tensor:
        A, B = (side.to(G) for side in self.matrices)
        return A.T @ G @ B

    def transpose(self, Z: Tensor) -> Tensor:
        """Z (..., k1, k2) -> A Z B^T (..., a, b), whose inner product with G is that of Z with the projected G."""
        A, B = (side.to(Z) for side in self.matrices)
        return A @ Z @ B.T

    def diagonal(self, D: Tensor) -> Tensor:
        """The projected diagonal matrix with entries D (a, b): P^T diag(D) P, (k1 k2, k1 k2)."""
        A, B = (side.to(D) for side in self.matrices)
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


def leading_sides(U_A: Tensor, U_B: Tensor, dimension: int) -> TwoSided:
    """Onto the last columns of U_A (a, a) and U_B (b, b), eigenvectors in rising order, as `sides_for` divides `dimension`.

    Keeps the inner products of matrices that lie within those sides, where random sides add noise to all. A side that is
    not made smaller is left as it is.
    """
    shape = len(U_A), len(U_B)
    sides = sides_for(shape, dimension)
    A, B = (torch.eye(k).to(U) if k == len(U) else U[:, -k:].contiguous() for U, k in zip((U_A, U_B), sides))
    return TwoSided(shape=shape, sides=sides, given=(A, B))
