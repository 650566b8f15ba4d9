"""The InfoNCE loss of one batch, in closed form: value, roles of a pair, derivatives along a direction, curvature.

Symbols: S (B, B) logits, rows are images, columns are texts; dS its derivative along a direction of the parameters;
P row softmax, Q column softmax of S. Pair n is S[n, n]. Losses are means over the batch.
"""

import torch
from torch import Tensor


def info_nce(S: Tensor) -> Tensor:
    """Symmetric InfoNCE loss of a batch: S (B, B) -> scalar, the mean over both directions (CLIP, Radford et al. 2021)."""
    return info_nce_terms(S).mean()


def info_nce_terms(S: Tensor) -> Tensor:
    """Loss of each pair as an anchor: S (B, B) -> (B,), half image to text, half text to image."""
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    return (S.logsumexp(-1) + S.logsumexp(-2)) / 2 - diagonal


def own_role(S: Tensor) -> Tensor:
    """Twice the loss terms of each pair as an anchor, Pos_n = -log P_nn - log Q_nn: S (B, B) -> (B,)."""
    return 2 * info_nce_terms(S)


def own_role_derivative(S: Tensor, dS: Tensor) -> Tensor:
    """Derivative of `own_role` along a direction: S, dS (B, B) -> (B,) (ECIF, arXiv 2411.11667, positive part)."""
    P, Q = S.softmax(-1), S.softmax(-2)
    return (P * dS).sum(-1) + (Q * dS).sum(-2) - 2 * dS.diagonal(dim1=-2, dim2=-1)


def negative_role_derivative(S: Tensor, dS: Tensor, form: str = "exact") -> Tensor:
    """Derivative of what pair n does to the others as their negative: S, dS (B, B) -> (B,).

    `exact` differentiates -sum_{k != n} [log(1 - P_kn) + log(1 - Q_nk)], so that own + negative is the derivative
    of B L_B - (B-1) L_{B without n} times two; `taylor` takes its first order in P and Q. Some digests print a sum
    of inverse probabilities here; the derivative is of the sum of probabilities (ECIF, arXiv 2411.11667, corrected).
    """
    P, Q = S.softmax(-1), S.softmax(-2)
    dP = P * (dS - (P * dS).sum(-1, keepdim=True))
    dQ = Q * (dS - (Q * dS).sum(-2, keepdim=True))
    if form == "exact":
        dP, dQ = dP / (1 - P), dQ / (1 - Q)
    elif form != "taylor":
        raise ValueError(f"form is {form!r}; it must be 'exact' or 'taylor'")
    off_diagonal = 1 - torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return (dP * off_diagonal).sum(-2) + (dQ * off_diagonal).sum(-1)


def gauss_newton_logits(S: Tensor, dS: Tensor) -> Tensor:
    """Hessian of `info_nce` in the logits times dS: S, dS (..., B, B) -> (..., B, B), positive semi-definite."""
    P, Q = S.softmax(-1), S.softmax(-2)
    rows = P * (dS - (P * dS).sum(-1, keepdim=True))
    columns = Q * (dS - (Q * dS).sum(-2, keepdim=True))
    return (rows + columns) / (2 * S.shape[-1])


def weighted_info_nce(S: Tensor, w: Tensor) -> Tensor:
    """l(w) = sum_i w_i term_i(w) / sum_i w_i: S (B, B), w (B,) >= 0 with two or more above zero -> scalar.

    w_z multiplies z's term as an anchor and z's exponential in the normalisers of the others: w_z = 1 is the batch, w_z = 0
    the batch without z.
    """
    others = torch.eye(len(w), dtype=S.dtype, device=S.device) == 0
    images = torch.where(others, S + w.log(), S).logsumexp(1)
    texts = torch.where(others, S + w.log()[:, None], S).logsumexp(0)
    return (w * ((images + texts) / 2 - S.diagonal())).sum() / w.sum()


def info_nce_removal(S: Tensor, dS: Tensor, form: str) -> Tensor:
    """Change of the batch loss's derivative when each pair in turn leaves: S (B, B), dS (..., B, B) -> (..., B).

    `exact`: d [l(w_z = 0) - l(w_z = 1)], the whole removal. `taylor`: -d/dw_z dl at w_z = 1.
    """
    own = own_role_derivative(S, dS) / 2
    presence = own + negative_role_derivative(S, dS, form) / 2  # of B l(batch) - (B-1) l(batch without z)
    left = S.shape[-1] - 1 if form == "exact" else S.shape[-1]
    return (own.mean(-1, keepdim=True) - presence) / left
