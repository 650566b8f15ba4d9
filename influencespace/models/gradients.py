"""Per-sample gradients of what a pair adds to a batch's loss, against a recorded bank.

For the few estimators that cannot do with a derivative along given directions. Over a reduced space
(`models.projected`) these are projected gradients, made without the whole ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap

from influencespace.core.bank import (
    anchor_logits,
    anchor_normalisers,
    negative_loss,
    negative_loss_of_logits,
    own_loss_of_logits,
    pair_logits,
)
from influencespace.models.projected import ProjectedHeads
from influencespace.models.space import Inputs, Space

IntArray = NDArray[np.int64]
Normalisers = tuple[Tensor, Tensor]
Value = Callable[[Tensor, Tensor, Tensor, Normalisers, float], Tensor]
"""A pair's logits S_zz (n,), S_zk (n, M), S_kz (n, M), the context's log normalisers and r = (B-1)/M -> (n,), row by row."""


class Recorded(Protocol):
    """A recorded context of the bank."""

    @property
    def inputs(self) -> Inputs:
        """Two (M, D)."""

    @property
    def image(self) -> IntArray:
        """Image of each pair (M,)."""


def added_loss(
    own: Tensor, S_image: Tensor, S_text: Tensor, normalisers: Normalisers, factor: float
) -> Tensor:
    """F_z of `core.bank.bank_loss`, from the logits."""
    own_part = own_loss_of_logits(own, S_image, S_text, factor)
    return own_part + negative_loss_of_logits(S_image, S_text, normalisers, factor)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One context with what the gradients against it need, computed once."""

    inputs: Inputs
    u: Tensor  # (M, d)
    t: Tensor  # (M, d)
    factor: float  # r = (B-1)/M
    normalisers: Normalisers  # two (M,)
    jacobians: tuple[Tensor, Tensor]  # of the normalisers, two (M, p)


@dataclass(frozen=True, kw_only=True)
class PairGradients:
    """Gradient of each pair's value by the space's parameters, the mean over the contexts without the pair's image.

    With `centred`, less the mean gradient of what bank pairs add to others' losses (`offset`): one extra negative lifts
    every loss, whoever it is. Then gradients @ v are the mean influences of InfluenceScorer along v.
    """

    space: Space
    bank: Sequence[Recorded]
    scale: float
    batch_size: int
    value: Value = added_loss
    centred: bool = True
    memory: int = 2**28
    """Bytes that intermediate results may take beside the gradients, where the space is not of projected heads."""

    @torch.no_grad()
    def __call__(self, inputs: Inputs, image: IntArray) -> Tensor:
        """Gradients (n, p) of pairs given by inputs (two (n, D)) and images (n,).

        A row is nan where no context can judge the pair, or where its gradient is not finite: one bad pair neither
        ends a run nor touches another. Takes n p + M_total p numbers; for large p take a reduced space.
        """
        total = torch.zeros(len(image), self.space.size, dtype=torch.float64)
        count = torch.zeros(len(image), dtype=torch.float64)
        for index, context in enumerate(self.bank):
            allowed = torch.from_numpy(~np.isin(image, context.image))
            found = self._against(self._contexts[index], (inputs[0][allowed], inputs[1][allowed]))
            total[allowed] += found.double().cpu()
            count += allowed
        mean = total / count[:, None]  # nan without a context
        if self.centred:
            mean = mean - self.offset
        mean[~torch.isfinite(mean).all(1)] = torch.nan
        return mean

    @cached_property
    def offset(self) -> Tensor:
        """Mean gradient of the negative role of bank pairs in contexts that are not theirs: (p,)."""
        strangers = [[c.inputs for c in self.bank if c is not context] for context in self.bank]
        rows = [self._of_strangers(k, others) for k, others in enumerate(strangers)]
        return torch.stack(rows).mean(0).double().cpu()

    @torch.no_grad()
    def _of_strangers(self, index: int, others: Sequence[Inputs]) -> Tensor:
        """Mean gradient of the others' pairs as negatives in context `index`: (p,)."""
        images, texts = (torch.cat([inputs[side] for inputs in others]) for side in (0, 1))

        def mean(parameters: dict[str, Tensor]) -> Tensor:
            cu, ct = self._embed(parameters, self.bank[index].inputs)
            u, t = self._embed(parameters, (images, texts))
            normalisers = anchor_normalisers(cu, ct, self.scale, self.batch_size)
            return negative_loss(u, t, cu, ct, normalisers, self.scale, self.batch_size).mean()

        return self.space.flatten(grad(mean)(self.space.parameters))

    def _embed(self, parameters: dict[str, Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
        u, t = functional_call(self.space.student, parameters, inputs)
        return u, t

    @cached_property
    def _contexts(self) -> list[Summary]:
        """The bank; the normalisers' Jacobians spare each pair a backward pass through M x M logits."""
        found = []
        for context in self.bank:
            u, t = self._embed(self.space.parameters, context.inputs)
            S = anchor_logits(u, t, self.scale, self.batch_size)
            P, Q = self.scale * S.softmax(1), self.scale * S.softmax(0).T
            none_u, none_P = torch.zeros_like(u), torch.zeros_like(P)
            images = self._through_pair(context.inputs, P @ t, none_u)
            images = images + self._through_context(context.inputs, none_P, t, P, u)
            texts = self._through_pair(context.inputs, none_u, Q @ u)
            texts = texts + self._through_context(context.inputs, Q, t, none_P, u)
            found.append(
                Summary(
                    inputs=context.inputs,
                    u=u,
                    t=t,
                    factor=(self.batch_size - 1) / len(u),
                    normalisers=(S.logsumexp(1), S.logsumexp(0)),
                    jacobians=(images, texts),
                )
            )
        return found

    def _against(self, context: Summary, inputs: Inputs) -> Tensor:
        """Gradients against one context: (n, p)."""
        if not len(inputs[0]):
            return inputs[0].new_zeros(0, self.space.size)
        u, t = self._embed(self.space.parameters, inputs)
        logits = pair_logits(u, t, context.u, context.t, self.scale)
        log_Z, log_Z_text = (row.expand(len(u), -1) for row in context.normalisers)

        def total(own: Tensor, S_image: Tensor, S_text: Tensor, normalisers: Normalisers) -> Tensor:
            return self.value(own, S_image, S_text, normalisers, context.factor).sum()

        # rows do not meet, so the gradient of the sum is each row's own
        by_own, C_image, C_text, by_normalisers = grad(total, argnums=(0, 1, 2, 3))(
            *logits, (log_Z, log_Z_text)
        )
        by_own, C_image, C_text = (self.scale * by for by in (by_own[:, None], C_image, C_text))
        rows = self._through_pair(inputs, by_own * t + C_image @ context.t, by_own * u + C_text @ context.u)
        rows = rows + self._through_context(context.inputs, C_text, t, C_image, u)
        for by, jacobian in zip(by_normalisers, context.jacobians):
            rows = rows + by @ jacobian
        return rows

    def _through_pair(self, inputs: Inputs, by_u: Tensor, by_t: Tensor) -> Tensor:
        """J_z^T (by_u, by_t) for each pair's own embeddings: (n, d) each -> (n, p)."""

        def one(x: Tensor, y: Tensor, by_u: Tensor, by_t: Tensor) -> dict[str, Tensor]:
            pull = vjp(lambda q: self._embed(q, (x[None], y[None])), self.space.parameters)[1]
            tree: dict[str, Tensor] = pull((by_u[None], by_t[None]))[0]
            return tree

        return self.space.flatten(vmap(one)(*inputs, by_u, by_t))

    def _through_context(self, inputs: Inputs, C_u: Tensor, t: Tensor, C_t: Tensor, u: Tensor) -> Tensor:
        """Gradient of sum_k C_u_zk <u_k, t_z> + C_t_zk <u_z, t_k> by a context's embeddings: C (n, M) -> (n, p)."""
        student = self.space.student
        if isinstance(student, ProjectedHeads):
            return self.space.flatten(student.context_gradients(inputs, C_u, t, C_t, u))
        chunk = max(1, self.memory // (12 * u.element_size() * C_u.shape[1] * u.shape[1]))
        rows = [u.new_zeros(0, self.space.size)]
        for start in range(0, len(u), chunk):
            part = slice(start, start + chunk)
            by_u, by_t = C_u[part, :, None] * t[part, None], C_t[part, :, None] * u[part, None]
            rows.append(self.space.pullback(inputs, by_u, by_t))
        return torch.cat(rows)
