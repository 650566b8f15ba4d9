"""The student over frozen embeddings: one linear head for each modality, unit-length outputs, a fixed temperature."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from influencespace.errors import InputError


class Heads(nn.Module):
    """Linear heads over image and text embeddings: (n, Di), (n, Dt) -> two (n, d) of unit length.

    The temperature is no parameter: it is frozen in training, in scoring and in the retraining that judges, because
    with it in the Space "be less confident" dominates every influence.
    """

    def __init__(self, image_dimension: int, text_dimension: int, dimension: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = nn.Parameter(_initial(image_dimension, dimension, generator))
        self.text = nn.Parameter(_initial(text_dimension, dimension, generator))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(images @ self.image, dim=-1), F.normalize(texts @ self.text, dim=-1)


def _initial(inputs: int, outputs: int, generator: torch.Generator) -> Tensor:
    """The same random projection for both modalities would keep the encoder's own alignment; each column has unit variance."""
    return torch.randn(inputs, outputs, generator=generator) / math.sqrt(inputs)


def save_heads(heads: Heads, path: Path) -> None:
    """Write the parameters as safetensors."""
    save_file({name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}, path)


def load_heads(path: Path) -> Heads:
    """Read what `save_heads` wrote; raises InputError when the file holds something else."""
    state = load_file(path)
    if set(state) != {"image", "text"} or state["image"].shape[1] != state["text"].shape[1]:
        raise InputError(f"{path} holds {sorted(state)}, not the 'image' and 'text' heads of a student")
    heads = Heads(state["image"].shape[0], state["text"].shape[0], state["image"].shape[1], seed=0)
    heads.load_state_dict(state)
    return heads
