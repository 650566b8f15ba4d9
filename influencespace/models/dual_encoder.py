"""The dual encoder: unit embeddings of images and texts from one Hugging Face model on one device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from influencespace.core.contrastive import contrastive_loss
from influencespace.models.preprocessing import Family, Preprocessing


class DualEncoder(nn.Module):
    """An image tower and a text tower in eval mode on one device.

    `dimension` is the length D of an embedding, `logit_scale` the factor on cosines (already exponentiated), `objective` the
    loss that it was trained by: InfoNCE, or the sigmoid loss where it has a bias (SigLIP),
    `fingerprint` a digest of weights, precision, tokenizer and image processor as they were loaded.
    `preprocess_images` and `tokenize` may be called from several threads at once.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, processor: Any, *, family: Family, device: torch.device
    ) -> None:
        super().__init__()
        # Channels last: convolutions on the CPU run 1.7 times faster (MobileNetV2); ViTs do not notice.
        self.model: Any = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()
        self.preprocessing = Preprocessing(tokenizer, processor, self.model.config, family)
        self.family = family
        self.pipeline = self.preprocessing.pipeline
        self.max_length = self.preprocessing.max_length
        self.logit_scale = float(self.model.logit_scale.detach().float().exp())
        bias = getattr(self.model, "logit_bias", None)
        self.objective = contrastive_loss(self.logit_scale, None if bias is None else float(bias.detach()))
        tokens, _ = self.tokenize(["a probe"])
        self.dimension = self.encode_text(tokens).shape[1]
        self.fingerprint = _fingerprint(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def input_size(self) -> int:
        """As `Preprocessing.input_size`."""
        return self.preprocessing.input_size

    def preprocess_images(self, images: Sequence[Image.Image]) -> Tensor:
        """As `Preprocessing.preprocess_images`."""
        return self.preprocessing.preprocess_images(images)

    def tokenize(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], list[bool]]:
        """As `Preprocessing.tokenize`."""
        return self.preprocessing.tokenize(texts)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed preprocessed images (B, 3, H, W) as unit rows, float32 (B, D), on the encoder's device."""
        with torch.inference_mode(), exact_convolutions():
            return unit(self.image_features(pixels))

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """Embed tokenized texts, each (B, L), as unit rows, float32 (B, D), on the encoder's device."""
        with torch.inference_mode():
            return unit(self.text_features(tokens))

    def image_features(self, pixels: Tensor) -> Tensor:
        """Image tower's output before normalisation, float32 or wider (B, D), differentiable in the weights."""
        pixels = _to_device(pixels, self.device)
        if self.pipeline is not None and pixels.dtype == torch.uint8:
            pixels = self.pipeline.normalise(pixels)
        return self._pooled(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    def text_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """Text tower's output before normalisation, float32 or wider (B, D), differentiable in the weights."""
        inputs = {name: _to_device(ids, self.device) for name, ids in tokens.items()}
        return self._pooled(self.model.get_text_features(**inputs))

    def _pooled(self, output: Any) -> Tensor:
        features: Tensor = output.pooler_output
        features = features[:, 0] if self.family.projects_every_token else features
        return features.to(torch.promote_types(features.dtype, torch.float32))


def exact_convolutions() -> AbstractContextManager[None]:
    """Without TF32 and without algorithms that differ from run to run: a GPU then agrees with the CPU."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False
    )
    return flags


def unit(rows: Tensor) -> Tensor:
    """Rows (n, D) at unit length."""
    # The usual floor of 1e-12 would leave the tiny features of an untrained deep tower short of unit length.
    return normalize(rows, dim=1, eps=torch.finfo(rows.dtype).tiny)


def _fingerprint(encoder: DualEncoder) -> str:
    digest = blake2b(digest_size=16)
    settings = sorted(encoder.preprocessing.processor.to_dict().items())
    vocabulary = sorted(encoder.preprocessing.tokenizer.get_vocab().items())
    digest.update(repr((type(encoder.model).__name__, encoder.max_length, settings, vocabulary)).encode())
    for name, weights in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        digest.update(weights.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    # From pinned memory the copy runs beside the kernels that are already queued.
    return values.pin_memory().to(device, non_blocking=True)
