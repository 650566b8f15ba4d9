"""Derivatives of the losses along directions of the parameters, in closed form: influence, removal, curvature.

Symbols: u, t (n, d) the outputs of a proxy; du, dt (V, n, d) their derivatives along V directions (`Tangents`); S logits, dS
their derivatives; P row softmax, Q column softmax of S. With v = H^-1 grad L_target as the direction a positive influence is a
predicted fall of the target loss: higher is more worth keeping.

Source: ECIF (arXiv 2411.11667), against recorded negative batches, with the loss's factor 1/2. Some digests print a sum of
inverse probabilities for the negative role; the derivative is of the sum of probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from influencespace.core.contrastive import (
    Contrastive,
    InfoNce,
    Normalisers,
    Objective,
    Pointwise,
    Sigmoid,
    pair_logits,
)


@dataclass(frozen=True, kw_only=True)
class Tangents:
    """Embeddings and their derivatives along V directions."""

    u: Tensor  # (n, d)
    t: Tensor  # (n, d)
    du: Tensor  # (V, n, d)
    dt: Tensor  # (V, n, d)

    def __getitem__(self, rows: Tensor | slice) -> "Tangents":
        return Tangents(u=self.u[rows], t=self.t[rows], du=self.du[:, rows], dt=self.dt[:, rows])


def logits_along(objective: Contrastive, a: Tangents) -> tuple[Tensor, Tensor]:
    """Logits of a batch, and their derivatives along the directions: S (n, n), dS (V, n, n)."""
    return objective.logits(a.u, a.t), objective.scale * (a.du @ a.t.T + a.u @ a.dt.mT)


def curvature(objective: Objective, outputs: Tangents) -> tuple[Tensor, Tensor]:
    """Cotangents of u and t whose pullback is the Gauss-Newton matrix of the batch loss times the directions: two (V, n, d)."""
    if isinstance(objective, Pointwise):
        slopes = lambda u: objective.slopes(u, outputs.t)  # noqa: E731
        cotangent = torch.stack([jvp(slopes, (outputs.u,), (du,))[1] for du in outputs.du]) / len(outputs.u)
        return cotangent, torch.zeros_like(cotangent)
    R = objective.scale * objective.curvature_in_logits(*logits_along(objective, outputs))
    return R @ outputs.t, R.mT @ outputs.u


def pointwise_influence(objective: Pointwise, samples: Tangents) -> Tensor:
    """Derivative of each sample's loss along V directions: (V, n)."""
    return (objective.slopes(samples.u, samples.t) * samples.du).sum(-1)


def removal(objective: Objective, outputs: Tangents, form: str) -> Tensor:
    """Change of the batch loss's derivative when each pair in turn leaves the batch: (V, n).

    `exact`: d [l(w_z = 0) - l(w_z = 1)], the whole removal. `taylor`: -d/dw_z dl at w_z = 1 (`weighted_loss`). Raises
    ValueError for another form.
    """
    _check(form)
    if isinstance(objective, Pointwise):
        own = presence = pointwise_influence(objective, outputs)
    elif isinstance(objective, InfoNce):
        S, dS = logits_along(objective, outputs)
        own = own_role_derivative(S, dS)
        presence = own + negative_role_derivative(S, dS, form)
    else:
        own, presence = _sigmoid_roles(*logits_along(objective, outputs))
    # `presence` is the derivative of B l(batch) - (B - 1) l(batch without the pair)
    remaining = own.shape[-1] - 1 if form == "exact" else own.shape[-1]
    return (own.mean(-1, keepdim=True) - presence) / remaining


def own_role_derivative(S: Tensor, dS: Tensor) -> Tensor:
    """Derivative of `info_nce_terms` along a direction: S (B, B), dS (..., B, B) -> (..., B)."""
    P, Q = S.softmax(-1), S.softmax(-2)
    return ((P * dS).sum(-1) + (Q * dS).sum(-2)) / 2 - dS.diagonal(dim1=-2, dim2=-1)


def negative_role_derivative(S: Tensor, dS: Tensor, form: str = "exact") -> Tensor:
    """Derivative of what pair n does to the others as their negative: S (B, B), dS (..., B, B) -> (..., B).

    `exact` differentiates -1/2 sum_{k != n} [log(1 - P_kn) + log(1 - Q_nk)], so that own + negative is the derivative
    of B L_B - (B-1) L_{B without n}; `taylor` is its first order in P and Q.
    """
    derivative = _log_odds_derivative if form == "exact" else _probability_derivative
    others = torch.eye(S.shape[-1], device=S.device) == 0
    images, texts = (torch.where(others, derivative(S, dS, dim), 0.0) for dim in (-1, -2))
    return (images.sum(-2) + texts.sum(-1)) / 2


def _probability_derivative(S: Tensor, dS: Tensor, dim: int) -> Tensor:
    """dP = P (dS - E_P dS), with P the softmax along `dim`."""
    P = S.softmax(dim)
    return P * (dS - (P * dS).sum(dim, keepdim=True))


def _log_odds_derivative(S: Tensor, dS: Tensor, dim: int) -> Tensor:
    """-d log(1 - P) = P (dS - E_P dS) / (1 - P); for the largest P from the others alone, because 1 - P loses its digits."""
    P, top = S.softmax(dim), S.argmax(dim, keepdim=True)
    others = S.scatter(dim, top, -torch.inf).softmax(dim)
    top = top.expand(*dS.shape[:-2], *top.shape)
    best = P.max(dim, keepdim=True).values * (dS.gather(dim, top) - (others * dS).sum(dim, keepdim=True))
    return (_probability_derivative(S, dS, dim) / (1 - P)).scatter(dim, top, best)


def _sigmoid_roles(S: Tensor, dS: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the sigmoid loss's terms, and of what each pair adds to the summed loss: two (V, B)."""
    # d softplus(S), and d softplus(-S) on the diagonal
    derivative = (S.sigmoid() - torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)) * dS
    rows, columns = derivative.sum(-1), derivative.sum(-2)
    return rows, rows + columns - derivative.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """A negative batch of M pairs with what every score against it needs, computed once."""

    tangents: Tangents
    factor: float  # r = (B-1)/M: how many negatives of a training batch one pair stands for
    normalisers: Normalisers  # (M,) each
    d_normalisers: Normalisers  # (V, M) each


def summarise(objective: Contrastive, a: Tangents, batch_size: int) -> BatchSummary:
    """Summarise a negative batch for training batches of `batch_size` pairs.

    With M = B - 1 pairs nothing is scaled. With fewer, a pair's negatives are weighted by r = (B-1)/M and an anchor's
    other negatives by (B-2)/(M-1), so that both see as many negatives as in a training batch. Raises ValueError for InfoNCE
    and fewer than two pairs.
    """
    _, dS = logits_along(objective, a)
    slopes = objective.normaliser_slopes(a.u, a.t, batch_size)
    return BatchSummary(
        tangents=a,
        factor=(batch_size - 1) / len(a.u),
        normalisers=objective.normalisers(a.u, a.t, batch_size),
        d_normalisers=tuple((W * dS).sum(-1 - side) for side, W in enumerate(slopes)),
    )


def influence(
    objective: Contrastive, pairs: Tangents, batch: BatchSummary, form: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Own and negative influence of each pair against one negative batch: two (V, n), in units of the loss per unit of weight.

    own + negative is the derivative of B l(batch + z) - (B - 1) l(batch). `form`: `exact`, or `taylor`, the first
    order of the negative role in the probability that an anchor gives to z. The caller leaves out batches that hold z's image.
    Raises ValueError for another form.
    """
    _check(form)
    c, scale = batch.tangents, objective.scale
    S = pair_logits(pairs.u, pairs.t, c.u, c.t, scale)
    dS_own = scale * (pairs.du * pairs.t + pairs.u * pairs.dt).sum(-1)  # (V, n)

    def image_side(weight: Tensor) -> Tensor:
        """sum_k weight_zk dS_zk of the image of z with the batch's texts: (n, M) -> (V, n)."""
        return scale * ((pairs.du * (weight @ c.t)).sum(-1) + (pairs.u * (weight @ c.dt)).sum(-1))

    def text_side(weight: Tensor) -> Tensor:
        """sum_k weight_kz dS_kz of the text of z with the batch's images: (n, M) -> (V, n)."""
        return scale * ((pairs.dt * (weight @ c.u)).sum(-1) + (pairs.t * (weight @ c.du)).sum(-1))

    if isinstance(objective, Sigmoid):
        # the negative role is linear in the losses, so that both forms are one
        p_own, p_image, p_text = ((logits + objective.bias).sigmoid() for logits in S)
        return (p_own - 1) * dS_own, batch.factor * (image_side(p_image) + text_side(p_text))

    log_r = torch.tensor(batch.factor, dtype=S.own.dtype, device=S.own.device).log()

    def as_anchor(others: Tensor, side: Callable[[Tensor], Tensor]) -> Tensor:
        log_normaliser = torch.logaddexp(S.own, (others + log_r).logsumexp(1))
        p = (others + log_r - log_normaliser[:, None]).exp()  # (n, M), sums to 1 - p_own
        return side(p) + (S.own - log_normaliser).exp() * dS_own

    def as_negative(
        others: Tensor, side: Callable[[Tensor], Tensor], log_Z: Tensor, d_log_Z: Tensor
    ) -> Tensor:
        p = (others - log_Z).sigmoid()  # (n, M): what anchor k gives to z
        weight = p if form == "exact" else p * (1 - p)
        return side(weight) - (weight @ d_log_Z.mT).mT

    own = (as_anchor(S.image, image_side) + as_anchor(S.text, text_side) - 2 * dS_own) / 2
    (log_Z, log_Z_text), (d_log_Z, d_log_Z_text) = batch.normalisers, batch.d_normalisers
    by_text = as_negative(S.text, text_side, log_Z, d_log_Z)
    by_image = as_negative(S.image, image_side, log_Z_text, d_log_Z_text)
    return own, batch.factor * (by_text + by_image) / 2


def _check(form: str) -> None:
    if form not in ("exact", "taylor"):
        raise ValueError(f"form is {form!r}; it must be 'exact' or 'taylor'")
