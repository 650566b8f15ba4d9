"""Small images and an empty object store, made in memory."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def encoded_image() -> Callable[..., bytes]:
    """A maker of small pictures of smooth noise, encoded."""

    def encode(seed: int = 0, size: tuple[int, int] = (16, 12), kind: str = "JPEG", **how: Any) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **how)
        return buffer.getvalue()

    return encode


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty object store in memory, reached as memory://."""
    store = fsspec.filesystem("memory")
    _empty(store)
    yield store
    _empty(store)


def _empty(store: Any) -> None:
    store.store.clear()
    store.pseudo_dirs[:] = [""]
