"""Solving (G + mu I) x = g by conjugate gradients, preconditioned by a Nystrom sketch of G.

Symbols: G (p, p) positive semi-definite, known only through products; mu the damping; U, lam the sketch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influencespace.core.nystrom import NOT_FINITE, Sketch, woodbury


def _precondition(sketch: Sketch, damping: float, r: Tensor) -> Tensor:
    """P^-1 r = (lam_l + mu) U (lam + mu)^-1 U^T r + (I - U U^T) r (Frangella, Tropp, Udell, section 5)."""
    if not len(sketch.lam):
        return r
    inside = r @ sketch.U
    factor = (sketch.lam[-1] + damping) / (sketch.lam + damping) - 1
    return r + (inside * factor) @ sketch.U.T


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solve, and how well it converged."""

    x: Tensor  # (V, p)
    iterations: int
    residual: float  # the largest relative residual of all right-hand sides


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
