"""The losses that a proxy minimises: InfoNCE, the sigmoid loss, and losses of single samples.

A proxy has two outputs: unit embeddings (u, t) of images and texts where the loss is contrastive, predictions and labels (u, y)
where it is pointwise. S (B, B) are the logits of a batch: rows are images, columns are texts, pair n is S[n, n]. The loss of a
batch is the mean of its `terms`. A negative batch of M pairs stands for the other B - 1 pairs of a training batch: each of its
pairs counts for r = (B - 1) / M.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from influencespace.errors import InputError

Normalisers = tuple[Tensor, ...]
PointwiseLoss = Callable[[Tensor, Tensor], Tensor]


class PairLogits(NamedTuple):
    """All that the losses of n pairs see of a negative batch of M, for a sigmoid loss without its bias."""

    own: Tensor  # (n,) S_zz
    image: Tensor  # (n, M) S_zk: image of z with the batch's texts
    text: Tensor  # (n, M) S_kz: text of z with the batch's images


def pair_logits(u: Tensor, t: Tensor, batch_u: Tensor, batch_t: Tensor, scale: float) -> PairLogits:
    """Logits of unit embeddings u, t (n, d) with those of a negative batch (M, d)."""
    return PairLogits(scale * (u * t).sum(-1), scale * u @ batch_t.T, scale * t @ batch_u.T)


def info_nce(S: Tensor) -> Tensor:
    """Symmetric InfoNCE loss of a batch: S (B, B) -> scalar, the mean over both directions (CLIP, Radford et al. 2021)."""
    return info_nce_terms(S).mean()


def info_nce_terms(S: Tensor) -> Tensor:
    """Loss of each pair as an anchor: S (B, B) -> (B,), half image to text, half text to image."""
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    return (S.logsumexp(-1) + S.logsumexp(-2)) / 2 - diagonal


@dataclass(frozen=True)
class InfoNce:
    """Symmetric InfoNCE, its logits `scale` = 1 / temperature times the cosines."""

    scale: float

    def logits(self, u: Tensor, t: Tensor) -> Tensor:
        """S (B, B) of a batch: u, t (B, d)."""
        return self.scale * u @ t.T

    def terms(self, u: Tensor, t: Tensor) -> Tensor:
        """Loss of each pair of a batch as an anchor: u, t (B, d) -> (B,)."""
        return info_nce_terms(self.logits(u, t))

    def curvature_in_logits(self, S: Tensor, dS: Tensor) -> Tensor:
        """Hessian of the batch loss in the logits times dS: (..., B, B) -> (..., B, B), positive semi-definite."""
        P, Q = S.softmax(-1), S.softmax(-2)
        rows = P * (dS - (P * dS).sum(-1, keepdim=True))
        columns = Q * (dS - (Q * dS).sum(-2, keepdim=True))
        return (rows + columns) / (2 * S.shape[-1])

    def weighted_loss(self, u: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """sum_i w_i term_i(w) / sum_i w_i with weights w (B,) >= 0, two or more above zero: scalar.

        w_z multiplies z's term as an anchor and z's exponential in the normalisers of the others: w_z = 1 is the batch,
        w_z = 0 the batch without z.
        """
        S = self.logits(u, t)
        others = torch.eye(len(w), dtype=S.dtype, device=S.device) == 0
        images = torch.where(others, S + w.log(), S).logsumexp(1)
        texts = torch.where(others, S + w.log()[:, None], S).logsumexp(0)
        return (w * ((images + texts) / 2 - S.diagonal())).sum() / w.sum()

    def normalisers(self, u: Tensor, t: Tensor, batch_size: int) -> Normalisers:
        """log Z of each image of a negative batch over its texts, and of each text over its images: u, t (M, d) -> two (M,).

        Raises ValueError below two pairs.
        """
        S = self._anchor_logits(u, t, batch_size)
        return S.logsumexp(1), S.logsumexp(0)

    def normaliser_slopes(self, u: Tensor, t: Tensor, batch_size: int) -> Normalisers:
        """Derivatives of the `normalisers` by the batch's logits, image by text: two (M, M)."""
        S = self._anchor_logits(u, t, batch_size)
        return S.softmax(1), S.softmax(0)

    def _anchor_logits(self, u: Tensor, t: Tensor, batch_size: int) -> Tensor:
        """Logits of a negative batch, those of other pairs weighted to the B - 2 others of a training batch: (M, M)."""
        size = u.shape[0]
        if size < 2:
            raise ValueError(
                f"a negative batch has {size} pair(s); it needs two, or the loss has no negatives"
            )
        S = self.logits(u, t)
        factor = (batch_size - 2) / (size - 1)
        log_factor = math.log(factor) if factor > 0 else -math.inf
        others = torch.eye(size, dtype=S.dtype, device=S.device) == 0
        return torch.where(others, S + log_factor, S)

    def own_loss(self, S: PairLogits, factor: float) -> Tensor:
        """Loss of pairs as anchors among a negative batch, with factor r: (n,)."""
        images = torch.logaddexp(S.own, S.image.logsumexp(1) + math.log(factor))
        texts = torch.logaddexp(S.own, S.text.logsumexp(1) + math.log(factor))
        return (images + texts) / 2 - S.own

    def negative_loss(self, S: PairLogits, normalisers: Normalisers, factor: float) -> Tensor:
        """What pairs add to the losses of a negative batch's anchors: (n,).

        The sum over anchors k of log(Z_k + e^S_kz) - log Z_k, both ways, halved as the loss is.
        """
        log_Z, log_Z_text = normalisers
        return factor * (F.softplus(S.text - log_Z) + F.softplus(S.image - log_Z_text)).sum(1) / 2


@dataclass(frozen=True)
class Sigmoid:
    """SigLIP's sigmoid loss (Zhai et al. 2023, arXiv 2303.15343): every image and text of a batch, match or not, by itself.

    The mean over images of the sum over texts of softplus(-S_ii) for the match and softplus(S_ij) for all others. Logits are
    `scale` times the cosines, plus `bias`. There is no normaliser. The methods are those of InfoNce.
    """

    scale: float
    bias: float

    def logits(self, u: Tensor, t: Tensor) -> Tensor:
        return self.scale * u @ t.T + self.bias

    def _losses(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every image with every text, and which of them match: two (B, B)."""
        S = self.logits(u, t)
        matches = torch.eye(len(S), dtype=S.dtype, device=S.device)
        return F.softplus((1 - 2 * matches) * S), matches

    def terms(self, u: Tensor, t: Tensor) -> Tensor:
        return self._losses(u, t)[0].sum(-1)

    def curvature_in_logits(self, S: Tensor, dS: Tensor) -> Tensor:
        p = S.sigmoid()
        return p * (1 - p) * dS / S.shape[-1]

    def weighted_loss(self, u: Tensor, t: Tensor, w: Tensor) -> Tensor:
        losses, matches = self._losses(u, t)
        # a weight multiplies a pair's image and, for the other images, its text
        return (w * (losses * torch.where(matches > 0, torch.ones_like(losses), w)).sum(-1)).sum() / w.sum()

    def normalisers(self, u: Tensor, t: Tensor, batch_size: int) -> Normalisers:
        return ()

    def normaliser_slopes(self, u: Tensor, t: Tensor, batch_size: int) -> Normalisers:
        return ()

    def own_loss(self, S: PairLogits, factor: float) -> Tensor:
        return F.softplus(-S.own - self.bias)

    def negative_loss(self, S: PairLogits, normalisers: Normalisers, factor: float) -> Tensor:
        return factor * (F.softplus(S.image + self.bias) + F.softplus(S.text + self.bias)).sum(1)


@dataclass(frozen=True)
class Pointwise:
    """A loss of each sample by itself: classification, VQA, regression. It has no negatives.

    Proxies take (inputs, labels) and return the labels as they are: outputs (u, y), u (n, K) predictions, y (n, K) labels.
    """

    loss: PointwiseLoss
    """Predictions (n, K), labels (n, K) -> (n,), convex in the predictions."""

    def terms(self, u: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample: (n,)."""
        return self.loss(u, y)

    def slopes(self, u: Tensor, y: Tensor) -> Tensor:
        """Derivative of each sample's loss by its predictions: (n, K)."""
        slopes: Tensor = grad(lambda x: self.loss(x, y).sum())(u)
        return slopes

    def weighted_loss(self, u: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """Mean loss by weight w (n,): scalar."""
        return (w * self.loss(u, y)).sum() / w.sum()


Contrastive = InfoNce | Sigmoid
Objective = InfoNce | Sigmoid | Pointwise


def contrastive_loss(scale: float, bias: float | None) -> Contrastive:
    """InfoNCE without a bias, the sigmoid loss with one."""
    return InfoNce(scale) if bias is None else Sigmoid(scale, bias)


def contrastive(objective: Objective, user: str) -> Contrastive:
    """The objective, which must have negatives; `user` names what needs them. Raises InputError for a pointwise loss."""
    if isinstance(objective, Pointwise):
        raise InputError(
            f"{user} is for contrastive losses (info_nce, sigmoid) and the problem's is pointwise: its samples never meet"
        )
    return objective


def info_nce_only(objective: Objective, user: str) -> InfoNce:
    """The objective, which must be InfoNCE; `user` names what needs it. Raises InputError for another."""
    if not isinstance(objective, InfoNce):
        raise InputError(
            f"{user} is for the InfoNCE loss and the problem's is {type(objective).__name__.lower()}"
        )
    return objective


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, for `Pointwise`: logits (n, K), labels (n, K) one-hot or soft -> (n,)."""
    return -(labels * logits.log_softmax(-1)).sum(-1)


def squared_error(predictions: Tensor, labels: Tensor) -> Tensor:
    """Half the squared error of each sample, for `Pointwise`: two (n, K) -> (n,)."""
    return (predictions - labels).square().sum(-1) / 2


def role_losses(
    objective: Contrastive, u: Tensor, t: Tensor, batch_u: Tensor, batch_t: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Loss of pairs as anchors among a negative batch, and what they add to the losses of its anchors: two (n,).

    u, t (n, d), batch (M, d).
    """
    S = pair_logits(u, t, batch_u, batch_t, objective.scale)
    factor = (batch_size - 1) / batch_u.shape[0]
    normalisers = objective.normalisers(batch_u, batch_t, batch_size)
    return objective.own_loss(S, factor), objective.negative_loss(S, normalisers, factor)


def added_loss(
    objective: Contrastive, u: Tensor, t: Tensor, batch_u: Tensor, batch_t: Tensor, batch_size: int
) -> Tensor:
    """F_z = B l(batch + z) - (B - 1) l(batch), what a pair adds to a training batch's summed loss: as `role_losses` -> (n,).

    Its derivative along a direction is own + negative `influence` (`exact`), and its gradient is the per-sample gradient of
    every estimator that needs one.
    """
    own, negative = role_losses(objective, u, t, batch_u, batch_t, batch_size)
    return own + negative
