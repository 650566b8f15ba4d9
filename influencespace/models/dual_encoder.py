"""The dual encoder: unit embeddings of images and texts from one Hugging Face model on one device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from influencespace.core.contrastive import contrastive_loss
from influencespace.models.pixels import pixel_pipeline


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of dual encoder is called."""

    model_class: str
    """Name of the model class in transformers."""
    text_inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    """What its text tower reads of a tokenizer's output."""
    pads_to_full_length: bool = False
    """SigLIP learned from captions padded to full length, without a mask, and reads the last position."""
    projects_every_token: bool = False
    """FLAVA projects every token; its contrastive loss uses the first."""


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
        self.tokenizer = tokenizer
        self.processor = processor
        self.family = family
        self.pipeline = pixel_pipeline(processor)
        self.max_length = _max_length(tokenizer, self.model.config)
        self.logit_scale = float(self.model.logit_scale.detach().float().exp())
        bias = getattr(self.model, "logit_bias", None)
        self.objective = contrastive_loss(self.logit_scale, None if bias is None else float(bias.detach()))
        # This first call also fixes the tokenizer's padding and truncation, which no later call then changes:
        # a fast tokenizer whose settings change cannot be shared by threads.
        tokens, _ = self.tokenize(["a probe"])
        self.dimension = self.encode_text(tokens).shape[1]
        self.fingerprint = _fingerprint(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def preprocess_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize and crop images to (B, 3, H, W) on the CPU, as uint8 where no more is needed."""
        if self.pipeline is not None:
            return self.pipeline(images)
        pixels: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels

    def tokenize(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], list[bool]]:
        """The text tower's inputs, each (B, L) on the CPU, and which texts were cut to its maximum length."""
        batch = self.tokenizer(
            list(texts),
            padding="max_length" if self.family.pads_to_full_length else "longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        tokens = {name: batch[name] for name in self.family.text_inputs if name in batch}
        if batch.encodings is not None:
            return tokens, [bool(encoding.overflowing) for encoding in batch.encodings]
        whole = self.tokenizer(list(texts), verbose=False)["input_ids"]
        return tokens, [len(ids) > self.max_length for ids in whole]

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


def _max_length(tokenizer: Any, config: Any) -> int:
    positions = getattr(config.text_config, "max_position_embeddings", None) or tokenizer.model_max_length
    return int(min(tokenizer.model_max_length, positions))


def _fingerprint(encoder: DualEncoder) -> str:
    digest = blake2b(digest_size=16)
    settings = sorted(encoder.processor.to_dict().items())
    vocabulary = sorted(encoder.tokenizer.get_vocab().items())
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
