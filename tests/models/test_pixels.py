"""The fast pipeline of pixels against the image processors of transformers."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_encoders import CROP, SQUARE

from influencespace.data.images import decode_image
from influencespace.models.encoders import load_encoder
from influencespace.models.pixels import pixel_pipeline

PROCESSORS = {
    "clip": transformers.CLIPImageProcessorPil(**CROP),
    "crop larger than the image": transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 31, "width": 33}
    ),
    "siglip": transformers.SiglipImageProcessorPil(**SQUARE),
    "flava": transformers.FlavaImageProcessorPil(),
    "mobilenet": transformers.MobileNetV2ImageProcessorPil(),
    "vit": transformers.ViTImageProcessorPil(size={"height": 30, "width": 50}),
    "nearest, not normalised": transformers.SiglipImageProcessorPil(
        **SQUARE, resample=Image.Resampling.NEAREST, do_normalize=False
    ),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_pipeline_equals_the_processor(processor: Any, pictures: list[Image.Image]) -> None:
    pipeline = pixel_pipeline(processor)
    assert pipeline is not None
    pixels = pipeline(pictures)
    expected = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(pipeline.normalise(pixels), expected, rtol=0, atol=1e-5)


def test_a_long_strip_costs_no_more_than_a_picture() -> None:
    pipeline = pixel_pipeline(PROCESSORS["clip"])
    assert pipeline is not None
    strip = Image.new("RGB", (1_000_000, 1), (255, 0, 0))  # resized whole it would fill 100 GB
    pixels = pipeline([strip, strip.rotate(90, expand=True)])
    assert pixels.shape == (2, 3, 32, 32)
    assert (pixels[:, 0] == 255).all()


def test_gray_and_transparent_pictures_become_rgb() -> None:
    pipeline = pixel_pipeline(PROCESSORS["clip"])
    assert pipeline is not None
    pictures = [Image.new(mode, (40, 40)) for mode in ("L", "RGBA", "P")]
    assert pipeline(pictures).shape == (3, 3, 32, 32)


@pytest.mark.parametrize("size", [(901, 703), (640, 1111), (2003, 1500), (333, 5000)])
@pytest.mark.parametrize("name", ["clip", "siglip", "mobilenet"])
def test_a_reduced_picture_gives_the_pixels_of_the_full_one(name: str, size: tuple[int, int]) -> None:
    """A half pixel lost by rounding moves the crop by one: cosines of embeddings fell to .989."""
    pipeline = pixel_pipeline(PROCESSORS[name])
    assert pipeline is not None
    cells = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    full = decode_image(buffer.getvalue())
    near = decode_image(buffer.getvalue(), near=pipeline.input_size)
    assert min(near.size) >= pipeline.input_size
    expected, pixels = (pipeline([picture]).float() for picture in (full, near))
    assert (expected - pixels).abs().mean() < 2
    shifted = pipeline([full.crop((full.width // pipeline.input_size, 0, *full.size))]).float()
    assert (expected - pixels).abs().mean() < (expected - shifted).abs().mean()


@pytest.mark.real_data
def test_decoding_near_the_encoders_size_changes_no_more_than_noise(real_data: Path) -> None:
    """Photographs, enlarged and with grain: their embeddings in full and reduced, as the comment of DRAFT has it."""
    folder = real_data.parent / "models" / "mobilenetv2-minilm"
    files = sorted((real_data / "coco2017-mini").glob("*2017/*.jpg"))[:8]
    if not folder.is_dir() or not files:
        pytest.skip("no encoder or no photographs")
    encoder, drawn = load_encoder(folder), np.random.default_rng(0)
    for file in files:
        photograph = Image.open(file).convert("RGB")
        large = photograph.resize((7 * photograph.width, 7 * photograph.height), Image.Resampling.BICUBIC)
        grain = np.asarray(large) + drawn.normal(0, 4, (large.height, large.width, 1))
        buffer = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        full, near = (decode_image(buffer.getvalue(), near=size) for size in (None, encoder.input_size))
        assert near.width < full.width
        one, other = (encoder.encode_image(encoder.preprocess_images([image])) for image in (full, near))
        assert float((one * other).sum()) > 0.999
