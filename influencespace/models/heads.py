"""The proxy over frozen embeddings: one linear head for each modality, unit-length outputs, a fixed temperature."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Heads(nn.Module):
    """Linear heads over image and text embeddings: (n, Di), (n, Dt) -> two (n, d) of unit length.

    The temperature is no parameter: it is frozen in training, in scoring and in the retraining that judges, because
    with it in the Space "be less confident" dominates every influence.
    """

    def __init__(self, image_dimension: int, text_dimension: int, dimension: int):
        super().__init__()
        self.image = nn.Parameter(torch.empty(image_dimension, dimension))
        self.text = nn.Parameter(torch.empty(text_dimension, dimension))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(images @ self.image, dim=-1), F.normalize(texts @ self.text, dim=-1)


def initial_heads(image_dimension: int, text_dimension: int, dimension: int, seed: int) -> Heads:
    """Heads that begin as one random projection: embeddings of one space keep their alignment, as far as `dimension` allows.

    Where the modalities differ in dimension there is no alignment to keep, and each has its own projection.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = Heads(image_dimension, text_dimension, dimension)
    with torch.no_grad():
        heads.image.copy_(
            torch.randn(image_dimension, dimension, generator=generator) / math.sqrt(image_dimension)
        )
        if text_dimension == image_dimension:
            heads.text.copy_(heads.image)
        else:
            heads.text.copy_(
                torch.randn(text_dimension, dimension, generator=generator) / math.sqrt(text_dimension)
            )
    return heads
