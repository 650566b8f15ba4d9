"""The probe for the quickest batch: it doubles while that pays and fits."""

import numpy as np
import pytest
import torch

from influencespace.models.encode import EncodePass
from influencespace.models.probe import image_rate, joined, quickest_batch


def fits(room: int, rates: dict[int, float]) -> object:
    def rate(batch: int) -> float:
        if batch > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return rates[batch]

    return rate


@pytest.mark.parametrize(
    ("room", "rates", "most", "expected", "tried"),
    [
        (1000, {64: 100.0, 128: 150.0, 256: 200.0}, 256, 256, 3),
        (1000, {64: 100.0, 128: 150.0, 256: 154.0}, 256, 128, 3),  # a gain too small
        (1000, {64: 100.0, 128: 90.0, 256: 500.0}, 256, 64, 2),
        (200, {64: 100.0, 128: 150.0}, 256, 128, 2),  # out of memory
        (10, {}, 256, 64, 0),  # halved later
        (1000, {64: 100.0, 128: 150.0}, 128, 128, 2),
        (1000, {300: 100.0}, 256, 300, 1),  # as was asked for
    ],
)
def test_a_batch_is_doubled_while_that_pays_and_fits(
    room: int, rates: dict[int, float], most: int, expected: int, tried: int
) -> None:
    batch, measured = quickest_batch(fits(room, rates), next(iter(rates), 64), most)  # type: ignore[arg-type]
    assert batch == expected
    assert len(measured) == tried
    assert all(rates[size] == rate for size, rate in measured.items())


class Roomy:
    """An encoder on a device with room for so many rows."""

    def __init__(self, room: int) -> None:
        self.room, self.sizes = room, list[int]()

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(pixels))
        return pixels.reshape(len(pixels), -1)

    def encode_text(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError


def test_a_rate_is_measured_on_whole_batches() -> None:
    encoder = Roomy(8)
    towers = EncodePass(encoder)
    pixels = np.zeros((3, 3, 2, 2), np.uint8)
    assert image_rate(towers, pixels, 8) > 0
    assert encoder.sizes == [8] * 4
    with pytest.raises(torch.cuda.OutOfMemoryError):
        image_rate(towers, pixels, 16)


def test_batches_are_joined_in_their_order() -> None:
    parts = [np.full((size, 2), size) for size in (4, 4, 4, 3, 9, 1)]
    assert [len(one) for one in joined(parts, 8)] == [8, 7, 9, 1]
    np.testing.assert_array_equal(np.concatenate(list(joined(parts, 8))), np.concatenate(parts))
    assert list(joined([], 8)) == []
