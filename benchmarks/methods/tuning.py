"""Tuning the text tower with low-rank adapters on chosen pairs, against stored image embeddings that stay as they are.

The tower's own output is compared with the stored embeddings, without heads or a map between them: a dual encoder
already has both in one space, and nothing else then learns what the tower should.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor, nn

from influencespace.core.contrastive import Contrastive
from influencespace.models.dual_encoder import DualEncoder, unit
from influencespace.models.tower_parameters import adapter_config, import_peft
from influencespace.models.training import cosine_factor

TEXT_TOWER = ("text_model", "text_projection")
"""Parts of a model of transformers that captions go through, in every family."""
PART = 32
"""Captions embedded at once. Padding costs as much as words: a batch of 256 of Flickr8k takes 10 s on a core padded to its
longest caption, and 4 s in parts of like length."""


@options(frozen=True, kw_only=True)
class TuningConfig:
    """How the adapters of a text tower are trained."""

    rank: int = Field(default=8, ge=1)
    steps: int = Field(default=100, ge=1)
    """Optimiser steps, annealed to zero by a cosine."""
    batch_size: int = Field(default=128, ge=4)
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled, as AdamW's."""


@dataclass(frozen=True)
class TunedTower:
    """A text tower with low-rank adapters (LoRA, arXiv 2106.09685): all else of its encoder is frozen."""

    encoder: DualEncoder
    adapted: Any
    """peft's view of the encoder's model, which has the adapters inside."""

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.adapted.named_parameters() if ".lora_" in name}

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings (n, D) on the encoder's device, differentiable in the adapters; bfloat16 inside on CUDA."""
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        parts = np.array_split(order, -(-len(captions) // PART))
        device = self.encoder.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = [self._features([captions[i] for i in part]) for part in parts]
        return unit(torch.cat(features))[torch.from_numpy(np.argsort(order)).to(device)]

    def _features(self, captions: Sequence[str]) -> Tensor:
        return self.encoder.text_features(self.encoder.tokenize(captions)[0])


def adapt_text_tower(encoder: DualEncoder, rank: int, seed: int) -> TunedTower:
    """Put low-rank adapters beside all linear layers of an encoder's text tower, which then still embeds as before.

    The encoder is changed in place. Raises InputError where the text tower has no linear layer, or peft is not installed.
    """
    config = adapter_config(encoder.model, rank, TEXT_TOWER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = import_peft().get_peft_model(encoder.model, config)
    return TunedTower(encoder.eval(), adapted)  # eval: dropout would add noise that no seed here settles


def tune(
    tower: TunedTower,
    inputs: Callable[[NDArray[np.int64]], tuple[Tensor, Sequence[str]]],
    batches: Iterable[NDArray[np.int64]],
    objective: Contrastive,
    config: TuningConfig,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train the adapters on the given batches; gives the loss of each.

    `inputs(rows)` gives a batch's image embeddings (B, D), of unit length, and its captions.
    Raises FloatingPointError when the loss is not finite, naming the step.
    """
    optimizer = torch.optim.AdamW(
        tower.adapters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_factor(step, config.steps))
    losses = []
    for step, rows in enumerate(batches):
        images, captions = inputs(rows)
        t = tower.embed(captions)
        loss = objective.terms(images.to(t), t).mean()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss of tuning is {float(loss.detach())} at step {step}; lower learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        on_step(step, losses[-1])
    return losses
