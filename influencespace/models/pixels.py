"""Image preprocessing that keeps bytes as bytes: resize and crop on the CPU, normalise on the device.

A Hugging Face image processor gives float32 arrays, of 4 bytes a value, after several copies an image. All
that the common ones do is resize, crop, and an affine map for each channel. Here Pillow does the first two on
`uint8`: 3 times faster, a quarter of the bytes to move. Whatever a processor does beyond that is noticed by
`pixel_pipeline`, which compares the two on probe images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Half a grey level after normalisation is about 1e-2; float32 rounding about 1e-6.
TOLERANCE = 1e-4
# Length over width from which a strip is cut before it is resized; a square crop sees only its middle.
LONGEST_STRIP = 16


@dataclass(frozen=True, kw_only=True)
class PixelPipeline:
    """Resize, centre crop, then `pixel * scale + shift` a channel."""

    size: tuple[int, int] | int  # (height, width), or the length of the shortest edge
    crop: tuple[int, int]  # (height, width)
    resample: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as uint8 (B, 3, H, W); safe to call from several threads at once."""
        pixels = np.stack([np.asarray(self._cut(image)) for image in images])  # (B, H, W, 3)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    @property
    def input_size(self) -> int:
        """The edge to which pictures are resized before they are cropped, in pixels: the shortest, or the longer of two."""
        return self.size if isinstance(self.size, int) else max(self.size)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to float32 of the same shape, on the device where it lies."""
        scale, shift = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (self.scale, self.shift))
        return torch.addcmul(shift, pixels.float(), scale)

    def _cut(self, image: Image.Image) -> Image.Image:
        image = image if image.mode == "RGB" else image.convert("RGB")
        if isinstance(self.size, int):
            image = _middle(image)
        # A reduced picture is a fraction of a pixel wider than the full one; at 224 pixels the crop would move by one.
        full, scale = image.info.get("full", image.size), image.info.get("scale", 1)
        height, width = self._resized(full[1], full[0])
        box = (0, 0, full[0] / scale, full[1] / scale)
        image = image.resize((width, height), Image.Resampling(self.resample), box)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        # A crop beyond the edges pads with black, as the processors do.
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        short, long = min(height, width), max(height, width)
        longest = int(self.size * long / short)
        return (self.size, longest) if height <= width else (longest, self.size)


def pixel_pipeline(processor: Any) -> PixelPipeline | None:
    """The fast equivalent of a Hugging Face image processor, or None where that does more."""
    pipeline = _from_settings(processor.to_dict())
    if pipeline is None:
        return None
    probes = probe_images()
    reference = processor(images=probes, return_tensors="pt")["pixel_values"]
    pixels = pipeline.normalise(pipeline(probes))
    same = pixels.shape == reference.shape and torch.allclose(pixels, reference, rtol=0, atol=TOLERANCE)
    return pipeline if same else None


def probe_images() -> list[Image.Image]:
    """Draw three images of noise: one wide, one tall, one smaller than any crop."""
    random = np.random.default_rng(0)
    shapes = ((231, 317, 3), (301, 257, 3), (13, 17, 3))
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def _middle(image: Image.Image) -> Image.Image:
    """Cut a strip to its middle: scaled by its short edge, 1 x 10^7 pixels would fill the memory."""
    longest = LONGEST_STRIP * min(image.size)
    left, top = (max(edge - longest, 0) // 2 for edge in image.size)
    if not (left or top):
        return image
    image = image.crop((left, top, image.width - left, image.height - top))
    image.info = {}
    return image


def _from_settings(settings: dict[str, Any]) -> PixelPipeline | None:
    size = _size(settings.get("size"))
    if not settings.get("do_resize") or settings.get("resample") is None or size is None:
        return None
    crop = _size(settings.get("crop_size")) if settings.get("do_center_crop") else size
    if not isinstance(crop, tuple):
        return None
    rescale = float(settings["rescale_factor"]) if settings.get("do_rescale") else 1.0
    normalised = settings.get("do_normalize")
    mean = settings["image_mean"] if normalised else (0.0, 0.0, 0.0)
    deviation = settings["image_std"] if normalised else (1.0, 1.0, 1.0)
    return PixelPipeline(
        size=size,
        crop=crop,
        resample=int(settings["resample"]),
        scale=tuple(rescale / d for d in deviation),
        shift=tuple(-m / d for m, d in zip(mean, deviation)),
    )


def _size(size: Any) -> tuple[int, int] | int | None:
    sizes = {key: value for key, value in dict(size or {}).items() if value is not None}
    if set(sizes) == {"height", "width"}:
        return int(sizes["height"]), int(sizes["width"])
    return int(sizes["shortest_edge"]) if set(sizes) == {"shortest_edge"} else None
