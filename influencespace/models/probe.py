"""The batch of images with which a device encodes quickest, found by trying: the best one differs between GPUs and encoders."""

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from influencespace.models.encode import EncodePass

MIN_GAIN = 0.05
"""A batch twice as large has to be so much quicker."""
PASSES = 3

Pixels = npt.NDArray[np.generic]


def quickest_batch(rate: Callable[[int], float], first: int, most: int) -> tuple[int, dict[int, float]]:
    """The batch from which on doubling does not pay, at least `first` and at most `most` images, and the rates of those tried.

    `rate` gives images a second, or raises OutOfMemoryError for a batch that does not fit.
    """
    rates: dict[int, float] = {}
    best = size = first
    while size <= most or not rates:
        try:
            rates[size] = rate(size)
        except torch.cuda.OutOfMemoryError:
            break
        if rates[size] < rates[best] * (1 + MIN_GAIN) and size > first:
            break
        best, size = size, 2 * size
    return best, rates


def image_rate(towers: EncodePass, pixels: Pixels, batch: int) -> float:
    """Images a second in batches of so many, made of some pixels (n, 3, H, W); raises OutOfMemoryError where they do not fit."""
    rows = pixels[np.arange(batch) % len(pixels)]
    list(towers.images([rows]))  # a device's first pass is slow
    began = time.perf_counter()
    list(towers.images([rows] * PASSES))
    seconds = time.perf_counter() - began
    if towers.limit is not None:
        raise torch.cuda.OutOfMemoryError(f"{batch} images do not fit")
    return PASSES * batch / max(seconds, 1e-9)


def joined(batches: Iterable[Pixels], rows: int) -> Iterator[Pixels]:
    """Neighbouring batches put together, as long as they have at most `rows` rows."""
    some: list[Pixels] = []
    for batch in batches:
        if some and sum(map(len, some)) + len(batch) > rows:
            yield some[0] if len(some) == 1 else np.concatenate(some)
            some = []
        some.append(batch)
    if some:
        yield some[0] if len(some) == 1 else np.concatenate(some)
