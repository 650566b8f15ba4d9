from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from influencespace.errors import InputError
from influencespace.models.encoders import load_encoder
from influencespace.models.tiny_clip import SIDE, train_tiny_clip

COLOURS = ("red", "green", "blue", "yellow", "white", "purple", "orange", "cyan")
GROUNDS = ("black", "gray", "navy", "brown")


def draw_squares(seed: int, rows: int) -> tuple[list[Image.Image], list[str]]:
    """Coloured squares somewhere on coloured grounds, and what to say of them."""
    random = np.random.default_rng(seed)
    images, captions = [], []
    for _ in range(rows):
        colour, ground = str(random.choice(COLOURS)), str(random.choice(GROUNDS))
        image = Image.new("RGB", (SIDE, SIDE), ground)
        x, y = (int(value) for value in random.integers(0, SIDE - 24, 2))
        ImageDraw.Draw(image).rectangle((x, y, x + 24, y + 24), fill=colour)
        images.append(image)
        captions.append(f"a {colour} square on a {ground} ground")
    return images, captions


def as_array(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_it_learns_and_loads_as_any_encoder(tmp_path: Path) -> None:
    images, captions = draw_squares(0, 256)
    losses: list[float] = []
    train_tiny_clip(
        images,
        captions,
        seed=0,
        out=tmp_path,
        steps=30,
        batch_size=32,
        on_step=lambda step, steps, loss: losses.append(loss),
    )
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])

    encoder = load_encoder(tmp_path)
    assert encoder.pipeline is not None
    unseen, said = draw_squares(1, 64)
    texts = encoder.encode_text(encoder.tokenize(said)[0])
    similarity = encoder.encode_image(encoder.preprocess_images(unseen)) @ texts.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    assert (rank < 10).float().mean() > 0.4  # 10 of 64 at random: 0.16


def test_the_folder_is_a_plain_clip(tmp_path: Path) -> None:
    images, captions = draw_squares(0, 16)
    train_tiny_clip(images, captions, seed=0, out=tmp_path, steps=1, batch_size=8)
    model = transformers.CLIPModel.from_pretrained(tmp_path, use_safetensors=True)
    assert model.config.text_config.eos_token_id == 3
    assert sum(weights.numel() for weights in model.parameters()) < 1_000_000
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("A RED square")["input_ids"]
    assert (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.unk_token_id not in ids


def test_the_seed_settles_the_weights(tmp_path: Path) -> None:
    images, captions = draw_squares(0, 48)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        before = torch.random.get_rng_state()
        train_tiny_clip(images, captions, seed=seed, out=tmp_path / name, steps=3, batch_size=16)
        assert torch.equal(torch.random.get_rng_state(), before)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (
        tmp_path / "b" / "tokenizer.json"
    ).read_bytes()


def test_an_array_is_as_good_as_pictures(tmp_path: Path) -> None:
    images, captions = draw_squares(0, 32)
    train_tiny_clip(images, captions, seed=0, out=tmp_path / "pictures", steps=2, batch_size=16)
    train_tiny_clip(as_array(images), captions, seed=0, out=tmp_path / "array", steps=2, batch_size=16)
    pictures, array = (tmp_path / name / "model.safetensors" for name in ("pictures", "array"))
    assert pictures.read_bytes() == array.read_bytes()


def test_what_cannot_be_learned_from_is_reported(tmp_path: Path) -> None:
    images, captions = draw_squares(0, 8)
    with pytest.raises(InputError, match="8 images but 7 captions"):
        train_tiny_clip(images, captions[:7], seed=0, out=tmp_path, batch_size=4)
    with pytest.raises(InputError, match="a batch of 64 cannot be drawn from 8 pairs"):
        train_tiny_clip(images, captions, seed=0, out=tmp_path)
    with pytest.raises(InputError, match=r"float64 \(8, 64, 64, 3\)"):
        train_tiny_clip(as_array(images) / 255, captions, seed=0, out=tmp_path, batch_size=4)
    with pytest.raises(InputError, match=r"uint8 \(8, 32, 64, 3\)"):
        train_tiny_clip(as_array(images)[:, :32], captions, seed=0, out=tmp_path, batch_size=4)
