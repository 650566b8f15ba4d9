"""The randomised Nystrom sketch of a positive semi-definite matrix G that is known only through products.

Symbols: G (p, p), Omega (p, l) random probes, Y = G Omega, U (p, l) and lam (l,) the sketch's eigenvectors and eigenvalues
in falling order, mu the damping.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOT_FINITE = "a product with the curvature is not finite; likely a diverged proxy or an infinite embedding"


def probes(size: int, which: range, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some of the random probes Omega (size, n): probe j is Gaussian, of the same numbers whichever others are drawn.

    Raises ValueError for more probes than parameters.
    """
    if len(which) and max(which) >= size:
        raise ValueError(
            f"rank {max(which) + 1} exceeds the number of parameters {size}; choose a smaller rank"
        )
    columns = [np.random.default_rng([seed, j]).standard_normal(size) / math.sqrt(size) for j in which]
    return torch.from_numpy(np.stack(columns, 1) if columns else np.empty((size, 0))).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """Nystrom approximation G ~ U diag(lam) U^T; of rank 0 where nothing is known of G."""

    U: Tensor  # (p, l)
    lam: Tensor  # (l,) falling, >= 0

    def effective_dimension(self, damping: float) -> float:
        """d_eff = sum lam / (lam + mu); from a sketch a lower bound."""
        return float((self.lam / (self.lam + damping)).sum())

    def tail_ratio(self, damping: float) -> float:
        """Smallest kept eigenvalue over mu; the sketch is large enough where this is near or below one."""
        return float(self.lam[-1] / damping)


def no_sketch(like: Tensor) -> Sketch:
    """The sketch of rank 0 for vectors such as `like` (p,): conjugate gradients are then not preconditioned."""
    return Sketch(U=like.new_zeros(len(like), 0), lam=like.new_zeros(0))


def sketch_bytes(size: int, rank: int) -> int:
    """Memory that `probes` and `nystrom` take at their widest: six float64 matrices of size x rank."""
    return 6 * 8 * size * rank


def nystrom(Omega: Tensor, Y: Tensor) -> Sketch:
    """Randomised Nystrom approximation from any probes of full rank and their products: Omega (p, l), Y = G Omega (p, l).

    Source: Frangella, Tropp, Udell, Randomized Nystrom Preconditioning, algorithm 2.1, with the *lower* Cholesky factor
    that torch returns (the paper's C is the upper one). The probes are made orthonormal here, once, and the products with them:
    Omega = Q R, G Q = Y R^-1. Raises ValueError for a Y that is not finite or not from a
    positive semi-definite matrix.
    """
    if not bool(torch.isfinite(Y).all()):
        raise ValueError(NOT_FINITE)
    Q, R = torch.linalg.qr(Omega.double())
    Y64 = torch.linalg.solve_triangular(R, Y.double(), upper=True, left=False)
    nu = math.sqrt(len(Y)) * torch.finfo(Y.dtype).eps * float(Y64.norm())
    for _ in range(5):
        shifted = Y64 + nu * Q
        M = Q.T @ shifted
        L, failed = torch.linalg.cholesky_ex((M + M.T) / 2)
        if int(failed) == 0:
            B = torch.linalg.solve_triangular(L, shifted.T, upper=False).T
            U, s, _ = torch.linalg.svd(B, full_matrices=False)
            return Sketch(U=U.to(Y.dtype), lam=(s**2 - nu).clamp_min(0).to(Y.dtype))
        nu = 100 * nu if nu > 0 else float(torch.finfo(Y.dtype).tiny)
    raise ValueError("the sketched curvature is not positive semi-definite; check the Gauss-Newton product")


def woodbury(sketch: Sketch, damping: float, g: Tensor) -> Tensor:
    """(U diag(lam) U^T + mu I)^-1 g, the tail treated as mu: g (..., p) -> (..., p)."""
    if damping <= 0:
        raise ValueError(f"damping is {damping}; it must be positive")
    inside = g @ sketch.U
    return (g - (inside * (sketch.lam / (sketch.lam + damping))) @ sketch.U.T) / damping
