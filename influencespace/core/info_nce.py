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


def own_role_derivative(S: Tensor, dS: Tensor) -> Tensor:
    """Derivative of `info_nce_terms` along a direction: S, dS (B, B) -> (B,) (ECIF, arXiv 2411.11667, positive part, halved)."""
    P, Q = S.softmax(-1), S.softmax(-2)
    return ((P * dS).sum(-1) + (Q * dS).sum(-2)) / 2 - dS.diagonal(dim1=-2, dim2=-1)


def negative_role_derivative(S: Tensor, dS: Tensor, form: str = "exact") -> Tensor:
    """Derivative of what pair n does to the others as their negative: S (B, B), dS (..., B, B) -> (..., B).

    `exact` differentiates -1/2 sum_{k != n} [log(1 - P_kn) + log(1 - Q_nk)], so that own + negative is the derivative
    of B L_B - (B-1) L_{B without n}; `taylor` takes its first order in P and Q. Some digests print a sum of inverse
    probabilities here; the derivative is of the sum of probabilities (ECIF, arXiv 2411.11667, corrected).
    """
    if form not in ("exact", "taylor"):
        raise ValueError(f"form is {form!r}; it must be 'exact' or 'taylor'")
    moved = _log_odds_moved if form == "exact" else _probability_moved
    others = torch.eye(S.shape[-1], device=S.device) == 0
    images, texts = (torch.where(others, moved(S, dS, dim), 0.0) for dim in (-1, -2))
    return (images.sum(-2) + texts.sum(-1)) / 2


def _probability_moved(S: Tensor, dS: Tensor, dim: int) -> Tensor:
    """dP = P (dS - E_P dS), with P the softmax along `dim`."""
    P = S.softmax(dim)
    return P * (dS - (P * dS).sum(dim, keepdim=True))


def _log_odds_moved(S: Tensor, dS: Tensor, dim: int) -> Tensor:
    """-d log(1 - P) = P (dS - E_P dS) / (1 - P), for the largest P from the others alone: of its 1 - P no digits are left."""
    P, top = S.softmax(dim), S.argmax(dim, keepdim=True)
    others = S.scatter(dim, top, -torch.inf).softmax(dim)
    top = top.expand(*dS.shape[:-2], *top.shape)
    best = P.max(dim, keepdim=True).values * (dS.gather(dim, top) - (others * dS).sum(dim, keepdim=True))
    return (_probability_moved(S, dS, dim) / (1 - P)).scatter(dim, top, best)


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
    own = own_role_derivative(S, dS)
    presence = own + negative_role_derivative(S, dS, form)  # of B l(batch) - (B-1) l(batch without z)
    left = S.shape[-1] - 1 if form == "exact" else S.shape[-1]
    return (own.mean(-1, keepdim=True) - presence) / left
