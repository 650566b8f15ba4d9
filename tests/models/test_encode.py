"""The pass over batches: order, halving where memory ends, precision that is checked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import CAPTIONS

from influencespace.models import encode
from influencespace.models.encode import EncodePass, matmul_precision
from influencespace.models.encoders import in_bfloat16, load_encoder


class SmallMemory:
    """Embeds numbers by themselves; more than `room` rows do not fit."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return pixels.reshape(len(pixels), -1)

    def encode_text(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.encode_image(tokens["ids"])


def pixels(*sizes: int) -> list[np.ndarray[Any, Any]]:
    drawn = np.random.default_rng(0)
    return [drawn.normal(size=(size, 3, 2, 2)).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("room", [1, 3, 7, 100])
def test_batches_that_do_not_fit_are_halved_and_nothing_else_changes(room: int) -> None:
    batches = pixels(16, 5, 1, 20)
    encoder = SmallMemory(room)
    run = EncodePass(encoder)
    results = list(run.images(batches))
    assert [len(result) for result in results] == [16, 5, 1, 20]
    for batch, result in zip(batches, results, strict=True):
        assert np.array_equal(result, batch.reshape(len(batch), -1))
    failed = [size for size in encoder.sizes if size > room]
    assert failed == [16, 8, 4, 2][: len(failed)], "what fits is found once"
    texts = [{"ids": batch.reshape(len(batch), -1)} for batch in batches]
    for batch, result in zip(texts, run.texts(texts), strict=True):
        assert np.array_equal(result, batch["ids"])


def test_the_time_of_the_device_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(encode, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    run = EncodePass(SmallMemory(100))
    for _ in run.images(pixels(4, 4, 4)):
        next(ticks)  # meanwhile the device does nothing
    assert run.take_busy() == 3
    assert run.take_busy() == 0


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(EncodePass(SmallMemory(0)).images(pixels(4)))


def test_the_next_batch_is_begun_before_a_result_is_given() -> None:
    begun: list[int] = []

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        for number, batch in enumerate(pixels(2, 2, 2)):
            begun.append(number)
            yield batch

    results = EncodePass(SmallMemory(10)).images(batches())
    assert begun == []
    next(results)
    assert begun == [0, 1]
    assert len(list(results)) == 2
    assert list(EncodePass(SmallMemory(10)).images([])) == []


def test_the_pass_gives_the_encoders_embeddings(
    encoder_folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    encoder = load_encoder(encoder_folders["clip"])
    run = EncodePass(encoder, encoder.device)
    prepared, tokens = encoder.preprocess_images(pictures), encoder.tokenize(CAPTIONS)[0]
    images = np.concatenate(list(run.images([prepared[:3].numpy(), prepared[3:].numpy()])))
    np.testing.assert_allclose(images, encoder.encode_image(prepared).numpy(), atol=1e-5)
    (texts,) = run.texts([{name: ids.numpy() for name, ids in tokens.items()}])
    np.testing.assert_allclose(texts, encoder.encode_text(tokens).numpy(), atol=1e-5)


def test_matmul_precision_is_set_back() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_bfloat16_is_used_where_it_agrees(
    encoder_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load_encoder(encoder_folders["clip"])
    rough = in_bfloat16(exact, min_cosine=0.9)
    assert {weights.dtype for weights in rough.parameters()} == {torch.bfloat16}
    assert rough.fingerprint != exact.fingerprint
    assert {weights.dtype for weights in exact.parameters()} == {torch.float32}
    with pytest.warns(UserWarning, match=r"bfloat16 .* float32 is used"):
        assert in_bfloat16(exact, min_cosine=1.1) is exact


def test_auto_is_float32_on_the_cpu(encoder_folders: dict[str, Path]) -> None:
    encoder = load_encoder(encoder_folders["clip"], dtype="auto")
    assert {weights.dtype for weights in encoder.parameters()} == {torch.float32}
