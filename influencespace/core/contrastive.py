"""What a proxy is trained to minimise, in every form that influence asks of it.

A proxy's outputs are two: embeddings (u, t) of images and texts where the loss is contrastive, predictions and labels
(u, y) where it is pointwise. Losses of a batch are means of `terms`. All derivatives are along given directions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp

from influencespace.core import contrastive_influence as bank
from influencespace.core import info_nce, sigmoid
from influencespace.core.contrastive_influence import Tangents
from influencespace.errors import InputError

Normalisers = tuple[Tensor, ...]
PointwiseLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class InfoNce:
    """Symmetric InfoNCE (CLIP, Radford et al. 2021), its logits `scale` = 1 / temperature times the cosines."""

    scale: float

    def terms(self, u: Tensor, t: Tensor) -> Tensor:
        """Loss of each pair of a batch as an anchor: u, t (B, d) -> (B,)."""
        return info_nce.info_nce_terms(self.scale * u @ t.T)

    def curvature(self, outputs: Tangents) -> tuple[Tensor, Tensor]:
        """Cotangents of u and t whose pullback is the Gauss-Newton matrix times the directions: two (V, B, d)."""
        S, dS = bank.logits_along(outputs, self.scale)
        R = self.scale * info_nce.gauss_newton_logits(S, dS)
        return R @ outputs.t, R.mT @ outputs.u

    def weighted_loss(self, u: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """Loss of a batch with weights w (B,), two or more of them above zero: scalar; w_z = 0 is the batch without z."""
        return info_nce.weighted_info_nce(self.scale * u @ t.T, w)

    def removal(self, outputs: Tangents, form: str) -> Tensor:
        """Change of the batch loss's derivative when each pair in turn leaves: (V, B, d) along V directions -> (V, B)."""
        return info_nce.info_nce_removal(*bank.logits_along(outputs, self.scale), form)

    def context(self, outputs: Tangents, batch_size: int) -> bank.Context:
        """A recorded context of batches of `batch_size`, summarised for `influence`."""
        return bank.make_context(outputs, self.scale, batch_size)

    def influence(self, pairs: Tangents, context: bank.Context, form: str) -> tuple[Tensor, Tensor]:
        """Own and negative influence of pairs in one context: two (V, n) (`core.bank.bank_influence`)."""
        return bank.bank_influence(pairs, context, form)

    def normalisers(self, u: Tensor, t: Tensor, batch_size: int) -> Normalisers:
        """log Z of a context's anchors, which `negative_loss` needs: u, t (M, d) -> two (M,)."""
        return bank.anchor_normalisers(u, t, self.scale, batch_size)

    def normaliser_weights(self, u: Tensor, t: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """Derivatives of the `normalisers` by the context's logits, image by text: two (M, M)."""
        S = bank.anchor_logits(u, t, self.scale, batch_size)
        return S.softmax(1), S.softmax(0)

    def own_loss(self, own: Tensor, S_image: Tensor, S_text: Tensor, factor: float) -> Tensor:
        """Loss of pairs as anchors among a context, from their logits (`core.bank.pair_logits`): (n,)."""
        return bank.own_loss_of_logits(own, S_image, S_text, factor)

    def negative_loss(
        self, S_image: Tensor, S_text: Tensor, normalisers: Normalisers, factor: float
    ) -> Tensor:
        """What pairs add to the losses of a context's anchors, from their logits: (n,)."""
        log_Z, log_Z_text = normalisers
        return bank.negative_loss_of_logits(S_image, S_text, (log_Z, log_Z_text), factor)


@dataclass(frozen=True)
class Sigmoid:
    """SigLIP's sigmoid loss (Zhai et al. 2023): every image and text of a batch, match or not, by itself.

    Logits are `scale` times the cosines, plus `bias`. The methods are those of InfoNce.
    """

    scale: float
    bias: float

    def _logits_along(self, outputs: Tangents) -> tuple[Tensor, Tensor]:
        S, dS = bank.logits_along(outputs, self.scale)
        return S + self.bias, dS

    def terms(self, u: Tensor, t: Tensor) -> Tensor:
        return sigmoid.sigmoid_terms(self.scale * u @ t.T + self.bias)

    def curvature(self, outputs: Tangents) -> tuple[Tensor, Tensor]:
        R = self.scale * sigmoid.gauss_newton_logits(*self._logits_along(outputs))
        return R @ outputs.t, R.mT @ outputs.u

    def weighted_loss(self, u: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return sigmoid.weighted_sigmoid(self.scale * u @ t.T + self.bias, w)

    def removal(self, outputs: Tangents, form: str) -> Tensor:
        return sigmoid.sigmoid_removal(*self._logits_along(outputs), form)

    def context(self, outputs: Tangents, batch_size: int) -> tuple[Tangents, float]:
        return outputs, (batch_size - 1) / outputs.u.shape[0]

    def influence(self, pairs: Tangents, context: tuple[Tangents, float], form: str) -> tuple[Tensor, Tensor]:
        return sigmoid.sigmoid_influence(pairs, *context, self.scale, self.bias)

    def normalisers(self, u: Tensor, t: Tensor, batch_size: int) -> Normalisers:
        return ()

    def normaliser_weights(self, u: Tensor, t: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        return ()

    def own_loss(self, own: Tensor, S_image: Tensor, S_text: Tensor, factor: float) -> Tensor:
        return F.softplus(-own - self.bias)

    def negative_loss(
        self, S_image: Tensor, S_text: Tensor, normalisers: Normalisers, factor: float
    ) -> Tensor:
        return factor * (F.softplus(S_image + self.bias) + F.softplus(S_text + self.bias)).sum(1)


@dataclass(frozen=True)
class Pointwise:
    """A loss of each sample by itself: classification, VQA, regression. There are no negatives, so no bank is asked.

    Proxies take (inputs, labels) and hand the labels through: outputs (u, y), u (n, K) predictions, y (n, K) labels.
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

    def curvature(self, outputs: Tangents) -> tuple[Tensor, Tensor]:
        """Cotangents whose pullback is the Gauss-Newton matrix of the mean loss times the directions: two (V, n, K)."""
        along = [jvp(lambda x: self.slopes(x, outputs.t), (outputs.u,), (du,))[1] for du in outputs.du]
        cotangent = torch.stack(along) / len(outputs.u)
        return cotangent, torch.zeros_like(cotangent)

    def influence(self, samples: Tangents) -> Tensor:
        """Derivative of each sample's loss along V directions: (V, n)."""
        return (self.slopes(samples.u, samples.t) * samples.du).sum(-1)

    def weighted_loss(self, u: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """Mean loss by weight w (n,): scalar."""
        return (w * self.loss(u, y)).sum() / w.sum()

    def removal(self, outputs: Tangents, form: str) -> Tensor:
        """Change of the mean loss's derivative when each sample in turn leaves: (V, n)."""
        own = self.influence(outputs)
        left = own.shape[-1] - 1 if form == "exact" else own.shape[-1]
        return (own.mean(-1, keepdim=True) - own) / left


Contrastive = InfoNce | Sigmoid
Objective = InfoNce | Sigmoid | Pointwise


def contrastive_loss(scale: float, bias: float | None) -> Contrastive:
    """InfoNCE without a bias, the sigmoid loss with one."""
    return InfoNce(scale) if bias is None else Sigmoid(scale, bias)


def contrastive(objective: Objective, asking: str) -> Contrastive:
    """The objective, which must have negatives; `asking` names what needs them. Raises InputError for a pointwise loss."""
    if isinstance(objective, Pointwise):
        raise InputError(
            f"{asking} is for contrastive losses (info_nce, sigmoid) and the problem's is pointwise: its samples never meet"
        )
    return objective


def info_nce_only(objective: Objective, asking: str) -> InfoNce:
    """The objective, which must be InfoNCE. Raises InputError for another."""
    if not isinstance(objective, InfoNce):
        raise InputError(
            f"{asking} is for the InfoNCE loss and the problem's is {type(objective).__name__.lower()}"
        )
    return objective


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, for `Pointwise`: logits (n, K), labels (n, K) one-hot or soft -> (n,)."""
    return -(labels * logits.log_softmax(-1)).sum(-1)


def squared_error(predictions: Tensor, labels: Tensor) -> Tensor:
    """Half the squared error of each sample, for `Pointwise`: two (n, K) -> (n,)."""
    return (predictions - labels).square().sum(-1) / 2


def own_loss(
    objective: Contrastive, u: Tensor, t: Tensor, context_u: Tensor, context_t: Tensor, batch_size: int
) -> Tensor:
    """Loss of pairs as anchors among a context: u, t (n, d), context (M, d) -> (n,)."""
    factor = (batch_size - 1) / context_u.shape[0]
    return objective.own_loss(*bank.pair_logits(u, t, context_u, context_t, objective.scale), factor)


def negative_loss(
    objective: Contrastive,
    u: Tensor,
    t: Tensor,
    context_u: Tensor,
    context_t: Tensor,
    normalisers: Normalisers,
    batch_size: int,
) -> Tensor:
    """What pairs add to the losses of a context's anchors: u, t (n, d), context (M, d), its normalisers -> (n,)."""
    _, S_image, S_text = bank.pair_logits(u, t, context_u, context_t, objective.scale)
    factor = (batch_size - 1) / context_u.shape[0]
    return objective.negative_loss(S_image, S_text, normalisers, factor)


def added_loss(
    objective: Contrastive, u: Tensor, t: Tensor, context_u: Tensor, context_t: Tensor, batch_size: int
) -> Tensor:
    """F_z = B l(C + z) - (B - 1) l(C): what a pair adds to a batch's summed loss. u, t (n, d), context (M, d) -> (n,).

    Its derivative along a direction is own + negative of `influence` (`exact`), and its gradient the per-sample gradient
    of every estimator that needs one. A smaller context stands for B - 1 pairs.
    """
    normalisers = objective.normalisers(context_u, context_t, batch_size)
    own = own_loss(objective, u, t, context_u, context_t, batch_size)
    return own + negative_loss(objective, u, t, context_u, context_t, normalisers, batch_size)
