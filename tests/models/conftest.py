"""Tiny random dual encoders of every family, saved as Hugging Face folders, and pictures to embed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import FAMILY_MAKERS, TEXT, make_tokenizer


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each family, as `save_pretrained` writes it."""
    folders = {}
    for family, make in FAMILY_MAKERS.items():
        torch.manual_seed(0)
        model, processor = make()
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        make_tokenizer(TEXT["max_position_embeddings"]).save_pretrained(folder)
        folders[family] = folder
    return folders


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Noise of four shapes and sizes."""
    random = np.random.default_rng(0)
    shapes = [(40, 60, 3), (50, 33, 3), (32, 32, 3), (9, 21, 3)]
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
