"""The towers themselves as a proxy: pixels and packed tokens to unit embeddings, so that a Space can be taken over them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influencespace.models.dual_encoder import DualEncoder, exact_convolutions, unit
from influencespace.models.space import Inputs


class TowerModel(nn.Module):
    """A dual encoder in eval mode: pixels (n, 3, H, W) and packed tokens (n, k, L) to two (n, d) of unit length.

    The temperature is no part of the output, and so of no Space. Derivatives are taken through a Space alone: the
    encoder's own parameters are frozen.
    """

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.text_inputs = tuple(encoder.tokenize(["a probe"])[0])

    def forward(self, pixels: Tensor, tokens: Tensor) -> Inputs:
        return self.embed_images(pixels), self.embed_texts(tokens)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Preprocessed images (n, 3, H, W) to (n, d)."""
        with exact_convolutions():
            return unit(self.encoder.image_features(pixels))

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Packed tokens (n, k, L) to (n, d)."""
        return unit(self.encoder.text_features(dict(zip(self.text_inputs, tokens.unbind(1)))))

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """The k inputs of the text tower (ids, mask, ...) in one tensor (n, k, L), so that a batch is two tensors."""
        return torch.stack(list(self.encoder.tokenize(captions)[0].values()), 1)
