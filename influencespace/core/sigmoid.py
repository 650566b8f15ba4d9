"""SigLIP's sigmoid loss in closed form (Zhai et al. 2023, arXiv 2303.15343): value, roles, derivatives, curvature.

S (B, B) are logits with the bias added, rows images, columns texts. The loss of a batch is the mean over images of the sum
over texts of softplus(-S_ii) for the match and softplus(S_ij) for all others: symmetric in the two, with no normaliser.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from influencespace.core.contrastive_influence import Tangents


def _matches(S: Tensor) -> Tensor:
    return torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)


def sigmoid_terms(S: Tensor) -> Tensor:
    """Loss of each image against all texts: S (B, B) -> (B,)."""
    return F.softplus((1 - 2 * _matches(S)) * S).sum(-1)


def gauss_newton_logits(S: Tensor, dS: Tensor) -> Tensor:
    """Hessian of the mean of `sigmoid_terms` in the logits times dS: (..., B, B), diagonal and positive."""
    p = S.sigmoid()
    return p * (1 - p) * dS / S.shape[-1]


def weighted_sigmoid(S: Tensor, w: Tensor) -> Tensor:
    """Loss of a batch with weights w (B,): a weight multiplies a pair's image and, for the other images, its text."""
    matches = _matches(S)
    losses = F.softplus((1 - 2 * matches) * S) * torch.where(matches > 0, torch.ones_like(S), w)
    return (w * losses.sum(-1)).sum() / w.sum()


def sigmoid_removal(S: Tensor, dS: Tensor, form: str) -> Tensor:
    """Change of the batch loss's derivative when each pair in turn leaves: S (B, B), dS (V, B, B) -> (V, B).

    `exact`: the loss without the pair; `taylor`: minus the derivative in its weight.
    """
    matches = _matches(S)
    moved = (S.sigmoid() - matches) * dS  # d softplus(S), and d softplus(-S) on the diagonal
    rows, columns = moved.sum(-1), moved.sum(-2)
    presence = rows + columns - moved.diagonal(dim1=-2, dim2=-1)
    left = S.shape[-1] - 1 if form == "exact" else S.shape[-1]
    return (rows.mean(-1, keepdim=True) - presence) / left


def sigmoid_influence(
    pairs: Tangents, context: Tangents, factor: float, scale: float, bias: float
) -> tuple[Tensor, Tensor]:
    """Own and negative influence of n pairs in a context of M: two (V, n), in units of target loss as `core.bank`'s.

    factor = (B-1)/M, the negatives that one pair of the context stands for. The negative role is linear in the losses, so
    that its exact and its first-order form are one.
    """
    u, t, du, dt = pairs.u, pairs.t, pairs.du, pairs.dt
    S_own = scale * (u * t).sum(-1) + bias
    dS_own = scale * (du * t + u * dt).sum(-1)
    own = (S_own.sigmoid() - 1) * dS_own
    p_image = (scale * u @ context.t.T + bias).sigmoid()  # (n, M)
    p_text = (scale * t @ context.u.T + bias).sigmoid()
    by_image = (du * (p_image @ context.t)).sum(-1) + (u * (p_image @ context.dt)).sum(-1)
    by_text = (dt * (p_text @ context.u)).sum(-1) + (t * (p_text @ context.du)).sum(-1)
    return own, factor * scale * (by_image + by_text)
