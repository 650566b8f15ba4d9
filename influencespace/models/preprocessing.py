"""What happens to images and texts before the towers see them: on CPU workers, without any weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from influencespace.models.pixels import pixel_pipeline, probe_images


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


# Characters of a text that a tokenizer sees, for each token that it may give: words have 5, and 16 are in hardly any token. Not
# fewer than MIN_CHARACTERS, for encoders of few tokens.
CHARACTERS_PER_TOKEN = 16
MIN_CHARACTERS = 4096
# Fewer than the 65,536 that readers keep of a caption, so that what they cut is reported here.
MAX_CHARACTERS = 2**16 - 1


class Preprocessing:
    """Image processor and tokenizer of a dual encoder; both may be called from several threads at once.

    `pipeline` is the fast equivalent of the image processor, where there is one; `max_length` the tokens that a text is cut to.
    """

    def __init__(self, tokenizer: Any, processor: Any, config: Any, family: Family) -> None:
        self.tokenizer = tokenizer
        self.processor = processor
        self.family = family
        self.pipeline = pixel_pipeline(processor)
        self.max_length = _max_length(tokenizer, config)
        characters = max(CHARACTERS_PER_TOKEN * self.max_length, MIN_CHARACTERS)
        self.max_characters = min(characters, MAX_CHARACTERS)
        # This first call also fixes the tokenizer's padding and truncation, which no later call then changes:
        # a fast tokenizer whose settings change cannot be shared by threads.
        self.tokenize(["a probe"])

    @cached_property
    def input_size(self) -> int:
        """The edge in pixels to which pictures are resized: what `decode_image` wants as `near`."""
        if self.pipeline is not None:
            return self.pipeline.input_size
        return max(self.preprocess_images(probe_images()[:1]).shape[-2:])

    def preprocess_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize and crop images to (B, 3, H, W) on the CPU, as uint8 where no more is needed."""
        if self.pipeline is not None:
            return self.pipeline(images)
        pixels: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels

    def tokenize(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], list[bool]]:
        """The text tower's inputs, each (B, L) on the CPU, and which texts were cut to its maximum length.

        Very long texts are cut to `max_characters` before: a tokenizer takes 300 bytes for each character.
        """
        long = [len(text) > self.max_characters for text in texts]
        texts = [text[: self.max_characters] for text in texts]
        batch = self.tokenizer(
            texts,
            padding="max_length" if self.family.pads_to_full_length else "longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        tokens = {name: batch[name] for name in self.family.text_inputs if name in batch}
        if batch.encodings is not None:
            return tokens, [cut or bool(one.overflowing) for cut, one in zip(long, batch.encodings)]
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        return tokens, [cut or len(ids) > self.max_length for cut, ids in zip(long, whole)]


def _max_length(tokenizer: Any, config: Any) -> int:
    positions = getattr(config.text_config, "max_position_embeddings", None) or tokenizer.model_max_length
    return int(min(tokenizer.model_max_length, positions))
