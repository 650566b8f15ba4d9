"""Solving (G + mu I) x = g for a positive semi-definite G known only through products: sketch once, solve often.

Symbols: G (p, p) the Gauss-Newton matrix, Omega (p, l) orthonormal probes, Y = G Omega, mu the damping,
U (p, l) and lam (l,) the sketch's eigenvectors and eigenvalues in falling order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_FINITE = "a product with the curvature is not finite; likely a diverged proxy or an infinite embedding"


def probes(size: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthonormal random probes Omega (size, rank), the same for the same seed on every machine's CPU.

    Raises ValueError when rank exceeds size.
    """
    if rank > size:
        raise ValueError(f"rank {rank} exceeds the number of parameters {size}; choose a smaller rank")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(gaussian)[0]
    return orthonormal.to(dtype)


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
    """The sketch of rank 0 for vectors such as `like` (p,): conjugate gradients then go without a preconditioner."""
    return Sketch(U=like.new_zeros(len(like), 0), lam=like.new_zeros(0))


def sketch_bytes(size: int, rank: int) -> int:
    """Memory that `probes` and `nystrom` take at their widest: six float64 matrices of size x rank."""
    return 6 * 8 * size * rank


def nystrom(Omega: Tensor, Y: Tensor) -> Sketch:
    """Randomised Nystrom approximation from probes and products: Omega (p, l), Y = G Omega (p, l).

    Source: Frangella, Tropp, Udell, Randomized Nystrom Preconditioning, algorithm 2.1, with the *lower* Cholesky factor
    that torch returns (the paper's C is the upper one). Raises ValueError for a Y that is not finite or not from a
    positive semi-definite matrix.
    """
    if not bool(torch.isfinite(Y).all()):
        raise ValueError(NOT_FINITE)
    p = Y.shape[0]
    nu = math.sqrt(p) * torch.finfo(Y.dtype).eps * float(Y.norm())
    Omega64, Y64 = Omega.double(), Y.double()
    for _ in range(5):
        shifted = Y64 + nu * Omega64
        M = Omega64.T @ shifted
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


def _precondition(sketch: Sketch, damping: float, r: Tensor) -> Tensor:
    """P^-1 r = (lam_l + mu) U (lam + mu)^-1 U^T r + (I - U U^T) r (Frangella, Tropp, Udell, section 5)."""
    if not len(sketch.lam):
        return r
    inside = r @ sketch.U
    factor = (sketch.lam[-1] + damping) / (sketch.lam + damping) - 1
    return r + (inside * factor) @ sketch.U.T


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solve with the figures that say whether to trust it."""

    x: Tensor  # (V, p)
    iterations: int
    residual: float  # largest relative residual over the right-hand sides


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    sketch: Sketch,
    damping: float,
    g: Tensor,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
) -> Solution:
    """Solve (G + mu I) x = g for rows g (V, p) by preconditioned conjugate gradients; product maps (V, p) to G times it.

    Stops when every row's relative residual is below `tolerance`, or after `max_iterations`; the residual is reported
    either way. Raises ValueError for a damping that is not positive, and for products that are not finite.
    """
    if damping <= 0:
        raise ValueError(f"damping is {damping}; it must be positive")
    size = g.norm(dim=-1).clamp_min(torch.finfo(g.dtype).tiny)
    x = woodbury(sketch, damping, g)
    r = g - product(x) - damping * x
    z = _precondition(sketch, damping, r)
    d = z
    rz = (r * z).sum(-1)
    residual, iteration = float((r.norm(dim=-1) / size).max()), 0
    while residual > tolerance and iteration < max_iterations:
        Ad = product(d) + damping * d
        curvature = (d * Ad).sum(-1)
        alpha = torch.where(curvature > 0, rz / curvature, torch.zeros_like(rz))
        x = x + alpha[:, None] * d
        r = r - alpha[:, None] * Ad
        z = _precondition(sketch, damping, r)
        rz_next = (r * z).sum(-1)
        d = z + torch.where(rz > 0, rz_next / rz, torch.zeros_like(rz))[:, None] * d
        rz = rz_next
        residual, iteration = float((r.norm(dim=-1) / size).max()), iteration + 1
    if not math.isfinite(residual):
        raise ValueError(NOT_FINITE)
    return Solution(x=x, iterations=iteration, residual=residual)
