"""Per-sample gradients: of what a pair adds to a batch's loss, against recorded negative batches, or of a loss of its own.

For the few estimators that need more than a derivative along given directions. Over a reduced space (`models.projected`) these
are projected gradients, computed without the whole ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap

from influencespace.core.arrays import IntArray
from influencespace.core.contrastive import Contrastive, Normalisers, PairLogits, pair_logits, role_losses
from influencespace.models.projected import ProjectedHeads
from influencespace.models.space import Inputs, Space

Value = Callable[[PairLogits, Normalisers, float], Tensor]
"""Logits of n pairs, the log normalisers of the negative batch, each (n, M), and r = (B-1)/M -> (n,), row by row."""


class Recorded(Protocol):
    """A recorded negative batch."""

    @property
    def inputs(self) -> Inputs:
        """Two (M, D)."""

    @property
    def image(self) -> IntArray:
        """Image of each pair (M,)."""


def through_sample(space: Space, inputs: Inputs, by_u: Tensor, by_t: Tensor) -> Tensor:
    """J_z^T (by_u, by_t) for each sample's own outputs: (n, d) each -> (n, p)."""

    def one(x: Tensor, y: Tensor, by_u: Tensor, by_t: Tensor) -> dict[str, Tensor]:
        outputs = lambda q: functional_call(space.proxy, q, (x[None], y[None]))  # noqa: E731
        tree: dict[str, Tensor] = vjp(outputs, space.parameters)[1]((by_u[None], by_t[None]))[0]
        return tree

    return space.flatten(vmap(one)(*inputs, by_u, by_t))


@dataclass(frozen=True, kw_only=True)
class SampleGradients:
    """Gradient of each sample's value by the space's parameters, for losses of each sample by itself."""

    space: Space
    value: Callable[[Tensor, Tensor], Tensor]
    """Predictions (n, K), labels (n, K) -> (n,), row by row."""

    @torch.no_grad()
    def __call__(self, inputs: Inputs, image: IntArray) -> Tensor:
        """Gradients (n, p) of samples by their inputs and labels; a row that is not finite is nan."""
        if not len(image):
            return torch.zeros(0, self.space.size, dtype=torch.float64)
        u, y = self.space.embed(inputs)
        by_u = grad(lambda x: self.value(x, y).sum())(u)
        rows = through_sample(self.space, inputs, by_u, torch.zeros_like(y)).double().cpu()
        rows[~torch.isfinite(rows).all(1)] = torch.nan
        return rows


@dataclass(frozen=True)
class Summary:
    """A negative batch with what the gradients against it need, computed once."""

    inputs: Inputs
    u: Tensor  # (M, d)
    t: Tensor  # (M, d)
    factor: float  # r = (B-1)/M
    normalisers: Normalisers  # each (M,)
    jacobians: Normalisers  # of the normalisers, each (M, p)


@dataclass(frozen=True, kw_only=True)
class PairGradients:
    """Gradient of each pair's value by the space's parameters, the mean over the negative batches without the pair's image.

    With `centred`, less the mean gradient of what recorded pairs add to others' losses (`offset`): one extra negative lifts
    every loss, whoever it is. Then gradients @ v are the mean influences of InfluenceScorer along v.
    """

    space: Space
    bank: Sequence[Recorded]
    objective: Contrastive
    batch_size: int
    value: Value | None = None
    """None: F_z, what the pair adds to its batch's summed loss in both roles (`core.contrastive.added_loss`)."""
    centred: bool = True
    memory: int = 2**28
    """Bytes that intermediate results may take beside the gradients, where the space is not of projected heads."""

    @torch.no_grad()
    def __call__(self, inputs: Inputs, image: IntArray) -> Tensor:
        """Gradients (n, p) of pairs by their inputs (two (n, D)) and images (n,).

        A row is nan where no negative batch can judge the pair, or where its gradient is not finite: one bad pair neither
        ends a run nor touches another. Takes n p + M_total p numbers; for large p use a reduced space.
        """
        total = torch.zeros(len(image), self.space.size, dtype=torch.float64)
        count = torch.zeros(len(image), dtype=torch.float64)
        for batch, summary in zip(self.bank, self._summaries):
            allowed = torch.from_numpy(~np.isin(image, batch.image))
            rows = self._against(summary, (inputs[0][allowed], inputs[1][allowed]))
            total[allowed] += rows.double().cpu()
            count += allowed
        mean = total / count[:, None]  # nan without a batch
        if self.centred:
            mean = mean - self.offset
        mean[~torch.isfinite(mean).all(1)] = torch.nan
        return mean

    @cached_property
    def offset(self) -> Tensor:
        """Mean gradient of the negative role of recorded pairs in the batches that are not theirs: (p,)."""
        rows = []
        for batch in self.bank:
            others = [other.inputs for other in self.bank if other is not batch]
            rows.append(self._as_negatives(batch.inputs, others))
        return torch.stack(rows).mean(0).double().cpu()

    @torch.no_grad()
    def _as_negatives(self, batch: Inputs, others: Sequence[Inputs]) -> Tensor:
        """Mean gradient of what the pairs of other batches add to the losses of a batch: (p,)."""
        images, texts = (torch.cat(side) for side in zip(*others))

        def mean(parameters: dict[str, Tensor]) -> Tensor:
            pairs = self.space.embed_at(parameters, (images, texts))
            negatives = self.space.embed_at(parameters, batch)
            return role_losses(self.objective, *pairs, *negatives, self.batch_size)[1].mean()

        return self.space.flatten(grad(mean)(self.space.parameters))

    @cached_property
    def _summaries(self) -> list[Summary]:
        """The bank; the normalisers' Jacobians spare each pair a backward pass through M x M logits."""
        objective, size = self.objective, self.batch_size
        summaries = []
        for batch in self.bank:
            u, t = self.space.embed(batch.inputs)
            slopes = enumerate(objective.normaliser_slopes(u, t, size))
            jacobians = [
                self._of_normalisers(batch.inputs, u, t, objective.scale * W, side) for side, W in slopes
            ]
            normalisers = objective.normalisers(u, t, size)
            summaries.append(Summary(batch.inputs, u, t, (size - 1) / len(u), normalisers, tuple(jacobians)))
        return summaries

    def _of_normalisers(self, inputs: Inputs, u: Tensor, t: Tensor, W: Tensor, side: int) -> Tensor:
        """Jacobian of log Z of the images (side 0) or texts (side 1), W (M, M) its slope by S, image by text: (M, p)."""
        zero = torch.zeros_like(W)
        W_u, W_t = (W, zero) if side == 0 else (zero, W.T)
        rows = through_sample(self.space, inputs, W_u @ t, W_t @ u)
        return rows + self._through_batch(inputs, W_t, t, W_u, u)

    def _against(self, batch: Summary, inputs: Inputs) -> Tensor:
        """Gradients against one negative batch: (n, p)."""
        if not len(inputs[0]):
            return inputs[0].new_zeros(0, self.space.size)
        u, t = self.space.embed(inputs)
        scale = self.objective.scale
        logits = pair_logits(u, t, batch.u, batch.t, scale)
        normalisers = tuple(row.expand(len(u), -1) for row in batch.normalisers)
        value = self.value or self._added_loss

        # rows do not meet, so the gradient of the sum is each row's own
        def total(S: PairLogits, normalisers: Normalisers) -> Tensor:
            return value(S, normalisers, batch.factor).sum()

        by_logits, by_normalisers = grad(total, argnums=(0, 1))(logits, normalisers)
        by_own, C_image, C_text = (scale * by for by in (by_logits.own[:, None], *by_logits[1:]))
        by_u, by_t = by_own * t + C_image @ batch.t, by_own * u + C_text @ batch.u
        rows = through_sample(self.space, inputs, by_u, by_t)
        rows = rows + self._through_batch(batch.inputs, C_text, t, C_image, u)
        for by, jacobian in zip(by_normalisers, batch.jacobians):
            rows = rows + by @ jacobian
        return rows

    def _added_loss(self, S: PairLogits, normalisers: Normalisers, factor: float) -> Tensor:
        return self.objective.own_loss(S, factor) + self.objective.negative_loss(S, normalisers, factor)

    def _through_batch(self, inputs: Inputs, C_u: Tensor, t: Tensor, C_t: Tensor, u: Tensor) -> Tensor:
        """Gradient of sum_k C_u_zk <u_k, t_z> + C_t_zk <u_z, t_k> by a batch's embeddings: C (n, M) -> (n, p)."""
        proxy = self.space.proxy
        if isinstance(proxy, ProjectedHeads):
            return self.space.flatten(proxy.batch_gradients(inputs, C_u, t, C_t, u))
        size = max(1, self.memory // (12 * u.element_size() * C_u.shape[1] * u.shape[1]))
        rows = [u.new_zeros(0, self.space.size)]
        for start in range(0, len(u), size):
            some = slice(start, start + size)
            by_u, by_t = C_u[some, :, None] * t[some, None], C_t[some, :, None] * u[some, None]
            rows.append(self.space.pullback(inputs, by_u, by_t))
        return torch.cat(rows)


Gradients = PairGradients | SampleGradients
