"""Training a proxy's heads over stored embeddings: the Ray-free loop that every distributed run must equal."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.core.contrastive import Contrastive, contrastive_loss
from influencespace.errors import STRICT
from influencespace.models.heads import Heads


@options(frozen=True, kw_only=True, config=STRICT)
class HeadsConfig:
    """How a proxy is trained; the retraining that judges uses the same."""

    dimension: int = Field(default=256, ge=2)
    """Width of the heads' output."""
    steps: int = Field(default=100, ge=1)
    """Optimiser steps, annealed to zero by a cosine."""
    batch_size: int = Field(default=512, ge=4)
    """Global batch B, whatever the number of workers: it decides how many negatives a pair meets."""
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled, as AdamW's."""
    temperature: float = Field(default=0.07, gt=0)
    """Frozen; the logits are cosines divided by it."""
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    """CLIP's or SigLIP's."""
    bias: float = Field(default=-10.0, allow_inf_nan=False)
    """Of `sigmoid`, added to its logits; frozen. SigLIP begins with -10 and a temperature of 0.1. The loss adds negatives up,
    so a bias is right for one batch size: keep the target's batches as large as the training batch, or its gradient
    means no more than "be less confident"."""

    @property
    def objective(self) -> Contrastive:
        """The loss over unit embeddings."""
        return contrastive_loss(1 / self.temperature, self.bias if self.loss == "sigmoid" else None)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained proxy with the trainer's response that enters the curvature."""

    heads: Heads
    preconditioner: Tensor  # (p,) D = sqrt(v_hat) + eps of AdamW, flat in the order of the parameters
    sum_of_learning_rates: float
    losses: list[float]

    def cpu(self) -> "Trained":
        """With all tensors on the CPU."""
        return replace(self, heads=self.heads.cpu(), preconditioner=self.preconditioner.cpu())


def cosine_factor(step: int, steps: int) -> float:
    """Learning-rate factor of a step: from 1 down to 0 along half a cosine."""
    return 0.5 * (1 + float(np.cos(np.pi * step / steps)))


class Exchange(Protocol):
    """What the workers of one training run exchange at every step."""

    rank: int
    size: int

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The rows (m_r, d) of all workers, in the order of their ranks, without gradients."""

    def add_up(self, gradient: Tensor) -> None:
        """Replace a gradient by its sum over all workers."""


class Alone:
    """A run with one worker."""

    rank, size = 0, 1

    def gather(self, rows: Tensor) -> list[Tensor]:
        return [rows.detach()]

    def add_up(self, gradient: Tensor) -> None:
        return None


def _whole_batch(rows: Tensor, exchange: Exchange) -> Tensor:
    """The batch's embeddings (B, d) with gradients through this worker's own rows only.

    The loss is over the whole batch on every worker, so own gradients are complete, and summing parameter gradients
    over workers gives the gradient of one worker with the whole batch.
    """
    shares = exchange.gather(rows)
    shares[exchange.rank] = rows
    return torch.cat(shares)


def adamw_of(heads: Heads, config: HeadsConfig) -> torch.optim.Optimizer:
    """The optimiser of heads before its first step."""
    return torch.optim.AdamW(
        heads.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, eps=1e-8
    )


def train_heads(
    inputs: Callable[[IntArray], tuple[Tensor, Tensor]],
    batches: Iterable[IntArray],
    heads: Heads,
    config: HeadsConfig,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    exchange: Exchange | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Trained:
    """Fit heads by the configured loss on these batches; `inputs(rows)` returns a batch's embeddings.

    All workers of an `exchange` have the same batches, and each embeds its share of every one. Batches that depend on the state
    of the training are drawn from heads and `optimizer`, `adamw_of` these heads, as they are between two steps.
    Raises FloatingPointError when the loss is not finite, naming the step.
    """
    exchange = exchange or Alone()
    optimizer = optimizer or adamw_of(heads, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_factor(step, config.steps))
    losses, rates = [], 0.0
    for step, rows in enumerate(batches):
        u, t = heads(*inputs(np.array_split(rows, exchange.size)[exchange.rank]))
        loss = config.objective.terms(_whole_batch(u, exchange), _whole_batch(t, exchange)).mean()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the proxy's loss is {float(loss.detach())} at step {step}; lower learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in heads.parameters():
            assert parameter.grad is not None
            exchange.add_up(parameter.grad)
        rates += float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        on_step(step, losses[-1])
    return Trained(
        heads=heads,
        preconditioner=adam_preconditioner(optimizer),
        sum_of_learning_rates=rates,
        losses=losses,
    )


def adam_preconditioner(optimizer: torch.optim.Optimizer) -> Tensor:
    """D = sqrt(v_hat) + eps over all parameters, flat (p,), from AdamW's second moments after its last step."""
    D = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            D.append((corrected.sqrt() + group["eps"]).flatten())
    return torch.cat(D).detach()
