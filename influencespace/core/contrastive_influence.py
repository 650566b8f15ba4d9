"""Influence of single pairs against a recorded bank of contexts (ECIF's closed form, bank form).

A context holds M other pairs, one an image. Adding pair z to it makes a batch of B = M + 1 (or, where the bank is
small, stands for a batch of B: the sums over its pairs are scaled). Symbols: u, t (n, d) unit embeddings of images and
texts; du, dt (V, n, d) their derivatives along V directions; `scale` = 1 / temperature.

All results are derivatives of the batch loss along the directions, so with v = H^-1 grad L_target a positive value is
a predicted fall of the target loss: higher is more worth keeping.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tangents:
    """Embeddings and their derivatives along V directions."""

    u: Tensor  # (n, d)
    t: Tensor  # (n, d)
    du: Tensor  # (V, n, d)
    dt: Tensor  # (V, n, d)

    def __getitem__(self, rows: Tensor | slice) -> "Tangents":
        return Tangents(u=self.u[rows], t=self.t[rows], du=self.du[:, rows], dt=self.dt[:, rows])


def logits_along(a: Tangents, scale: float) -> tuple[Tensor, Tensor]:
    """Logits of a batch, and their derivatives along the directions: S (n, n), dS (V, n, n)."""
    return scale * a.u @ a.t.T, scale * (a.du @ a.t.T + a.u @ a.dt.mT)


@dataclass(frozen=True, kw_only=True)
class Context:
    """One context of M pairs with what every score against it needs, computed once."""

    tangents: Tangents
    scale: float
    own_factor: float  # r = (B-1)/M: how many negatives of a real batch one pair of the context stands for
    log_Z: Tensor  # (M,) log normaliser of image k over the texts of the context
    log_Z_text: Tensor  # (M,) log normaliser of text k over the images of the context
    d_log_Z: Tensor  # (V, M)
    d_log_Z_text: Tensor  # (V, M)


def make_context(tangents: Tangents, scale: float, batch_size: int) -> Context:
    """Summarise a context for batches of `batch_size` pairs.

    With M = B - 1 pairs nothing is scaled. With fewer, own negatives are weighted by r = (B-1)/M and an anchor's
    other negatives by (B-2)/(M-1), so that both see as many negatives as in a real batch.
    Raises ValueError when the context has fewer than two pairs.
    """
    S = anchor_logits(tangents.u, tangents.t, scale, batch_size)
    dS = scale * (tangents.du @ tangents.t.T + tangents.u @ tangents.dt.mT)  # (V, M, M)
    P, Q = S.softmax(1), S.softmax(0)
    return Context(
        tangents=tangents,
        scale=scale,
        own_factor=(batch_size - 1) / len(S),
        log_Z=S.logsumexp(1),
        log_Z_text=S.logsumexp(0),
        d_log_Z=(P * dS).sum(-1),
        d_log_Z_text=(Q * dS).sum(-2),
    )


def bank_influence(pairs: Tangents, context: Context, form: str = "exact") -> tuple[Tensor, Tensor]:
    """Own and negative influence of each pair in one context: -> two (V, n), in units of target loss per unit of batch weight.

    own + negative is the derivative of B l(C + z) - (B - 1) l(C). `form`: 'exact' (default) or 'taylor', the first
    order of the negative role in the probability that an anchor gives to z. The caller leaves out contexts that hold
    z's image. Source: ECIF (arXiv 2411.11667), with the context as recorded data and the loss's factor 1/2.
    """
    c, scale = context.tangents, context.scale
    log_r = torch.tensor(context.own_factor, dtype=pairs.u.dtype, device=pairs.u.device).log()
    S_own = scale * (pairs.u * pairs.t).sum(-1)  # (n,)
    dS_own = scale * (pairs.du * pairs.t + pairs.u * pairs.dt).sum(-1)  # (V, n)
    S_image = scale * pairs.u @ c.t.T  # (n, M): image of z with the context's texts
    S_text = scale * pairs.t @ c.u.T  # (n, M): text of z with the context's images

    def own_side(S: Tensor, z: Tensor, dz: Tensor, w: Tensor, dw: Tensor) -> Tensor:
        log_normaliser = torch.logaddexp(S_own, (S + log_r).logsumexp(1))
        p = (S + log_r - log_normaliser[:, None]).exp()  # (n, M), sums to 1 - p_own
        p_own = (S_own - log_normaliser).exp()
        moved = scale * ((dz * (p @ w)).sum(-1) + (z * (p @ dw)).sum(-1))
        return moved + p_own * dS_own

    own_image = own_side(S_image, pairs.u, pairs.du, c.t, c.dt)
    own_text = own_side(S_text, pairs.t, pairs.dt, c.u, c.du)
    own = (own_image + own_text - 2 * dS_own) / 2

    def negative_side(
        S: Tensor, log_Z: Tensor, d_log_Z: Tensor, z: Tensor, dz: Tensor, w: Tensor, dw: Tensor
    ) -> Tensor:
        probability = (S - log_Z).sigmoid()  # (n, M): what anchor k gives to z
        weight = probability if form == "exact" else probability * (1 - probability)
        moved = scale * ((z * (weight @ dw)).sum(-1) + (dz * (weight @ w)).sum(-1))
        return moved - (weight @ d_log_Z.mT).mT

    if form not in ("exact", "taylor"):
        raise ValueError(f"form is {form!r}; it must be 'exact' or 'taylor'")
    negative_text = negative_side(S_text, context.log_Z, context.d_log_Z, pairs.t, pairs.dt, c.u, c.du)
    negative_image = negative_side(
        S_image, context.log_Z_text, context.d_log_Z_text, pairs.u, pairs.du, c.t, c.dt
    )
    negative = context.own_factor * (negative_text + negative_image) / 2
    return own, negative


def anchor_logits(u: Tensor, t: Tensor, scale: float, batch_size: int) -> Tensor:
    """Logits of a context with its others weighted to a real batch's number of negatives: u, t (M, d) -> (M, M).

    Raises ValueError below two pairs.
    """
    size = u.shape[0]
    if size < 2:
        raise ValueError(f"a context has {size} pair(s); it needs two or more, or the loss has no negatives")
    S = scale * u @ t.T
    factor = (batch_size - 2) / (size - 1)
    log_factor = math.log(factor) if factor > 0 else -math.inf
    others = torch.eye(size, dtype=S.dtype, device=S.device) == 0
    return torch.where(others, S + log_factor, S)


def anchor_normalisers(u: Tensor, t: Tensor, scale: float, batch_size: int) -> tuple[Tensor, Tensor]:
    """log Z of each image over the texts of its context, and of each text over the images: u, t (M, d) -> two (M,).

    Those of `make_context`, as a function that can be differentiated.
    """
    S = anchor_logits(u, t, scale, batch_size)
    return S.logsumexp(1), S.logsumexp(0)


def pair_logits(
    u: Tensor, t: Tensor, context_u: Tensor, context_t: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """All that a pair's loss sees of it: u, t (n, d), context (M, d) -> S_zz (n,), S_zk (n, M), S_kz (n, M)."""
    return scale * (u * t).sum(-1), scale * u @ context_t.T, scale * t @ context_u.T


def own_loss_of_logits(own: Tensor, S_image: Tensor, S_text: Tensor, factor: float) -> Tensor:
    """Loss of each pair as an anchor among a context, from its `pair_logits`: (n,), (n, M), (n, M) -> (n,).

    factor is r = (B-1)/M, the negatives of a real batch that one pair of the context stands for.
    """
    images = torch.logaddexp(own, S_image.logsumexp(1) + math.log(factor))
    texts = torch.logaddexp(own, S_text.logsumexp(1) + math.log(factor))
    return (images + texts) / 2 - own


def negative_loss_of_logits(
    S_image: Tensor, S_text: Tensor, normalisers: tuple[Tensor, Tensor], factor: float
) -> Tensor:
    """What each pair adds to the losses of a context's anchors, from its logits (n, M) and theirs, two (M,): -> (n,).

    The sum over anchors of log(Z_k + e^S_kz) - log Z_k, both ways, halved as the loss is.
    """
    log_Z, log_Z_text = normalisers
    softplus = torch.nn.functional.softplus
    return factor * (softplus(S_text - log_Z) + softplus(S_image - log_Z_text)).sum(1) / 2
