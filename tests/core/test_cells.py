"""Laws of cells: a partition into small parts in order, that keeps near captions together and holds few rows at once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from influencespace.core import cells as module
from influencespace.core.arrays import IntArray
from influencespace.core.cells import Read, cells
from influencespace.core.kmeans import unit_rows

seeds = st.integers(0, 10_000)


def unit(n: int, seed: int, d: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit_rows(torch.randn(n, d, generator=generator))


def reader(images: Tensor, texts: Tensor) -> Read:
    return lambda rows: (images[torch.from_numpy(rows)], texts[torch.from_numpy(rows)])


def check(parts: list[IntArray], rows: IntArray, max_rows: int) -> None:
    assert sorted(np.concatenate(parts)) == rows.tolist()
    assert all(0 < len(part) <= max_rows and (np.diff(part) > 0).all() for part in parts)


@given(n=st.integers(1, 60), most=st.integers(2, 20), sample=st.integers(2, 50), seed=seeds)
def test_cells_are_a_partition_of_small_parts_in_order(n: int, most: int, sample: int, seed: int) -> None:
    rows = np.arange(5, n + 5)
    read = reader(unit(n + 5, seed), unit(n + 5, seed + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLE", sample)
        check(list(cells(rows, read, most)), rows, most)


@given(n=st.integers(1, 60), most=st.integers(2, 20), captions=st.integers(1, 3), pictures=st.integers(1, 3))
def test_cells_end_where_rows_are_equal(n: int, most: int, captions: int, pictures: int) -> None:
    row = np.arange(n)
    read = reader(unit(pictures, 0)[row % pictures], unit(captions, 1)[row // 2 % captions])
    check(list(cells(row, read, most)), row, most)


def test_small_sets_are_not_read() -> None:
    def read(rows: IntArray) -> tuple[Tensor, Tensor]:
        raise AssertionError("there is nothing to cut")

    assert [part.tolist() for part in cells(np.arange(4), read, 4)] == [[0, 1, 2, 3]]


@given(seed=seeds)
def test_bunches_of_captions_stay_together(seed: int) -> None:
    """Whatever the images: these are looked at only where captions are all equal."""
    bunch = np.random.default_rng(seed).permutation(np.repeat([0, 1], 8))
    texts = unit_rows(torch.eye(2, 5)[bunch] + 0.05 * unit(16, seed, 5))
    for part in cells(np.arange(16), reader(unit(16, seed), texts), 8):
        assert len(set(bunch[part])) == 1


@given(seed=seeds, share=st.floats(0.1, 0.9))
def test_images_of_one_caption_are_parted_only_where_they_are_too_many(seed: int, share: float) -> None:
    """And then between images that differ."""
    same = np.random.default_rng(seed).random(80) < share
    texts = torch.where(torch.from_numpy(same)[:, None], unit(1, seed), unit(80, seed, 3))
    bunch = np.random.default_rng(seed + 1).permutation(np.repeat([0, 1], 40))
    images = unit_rows(torch.eye(2, 3)[bunch] + 0.01 * unit(80, seed + 1))
    parts = [part for part in cells(np.arange(80), reader(images, texts), 48) if same[part].any()]
    assert len(parts) == 1 or same.sum() > 40
    if len(parts) > 1 and max(np.bincount(bunch[same])) < 0.6 * same.sum():
        assert all(len(set(bunch[part[same[part]]])) == 1 for part in parts)


def test_few_near_copies_are_torn_apart_and_few_rows_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies whose captions have a cosine of .991 or so, in a set sixty times as large as a cell."""
    monkeypatch.setattr(module, "SAMPLE", 512)
    n, d = 6000, 64
    half = n // 2
    spectrum = 1 / torch.arange(1, d + 1)  # captions are of some topics
    texts = unit_rows(torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * spectrum)
    texts[half:] = unit_rows(texts[:half] + 0.13 * unit(half, 1, d))
    cosine = (texts[:half] * texts[half:]).sum(1)
    assert 0.985 < cosine.min() < cosine.max() < 0.998
    order = np.random.default_rng(0).permutation(n)
    place = np.argsort(order)
    images, texts = unit(n, 2, d), texts[torch.from_numpy(order)]
    held = []

    def read(rows: IntArray) -> tuple[Tensor, Tensor]:
        held.append(len(rows))
        return reader(images, texts)(rows)

    cell = np.empty(n, np.int64)
    for number, part in enumerate(cells(np.arange(n), read, 100)):
        cell[part] = number
    assert (cell[place[:half]] == cell[place[half:]]).mean() > 0.9
    assert max(held) <= 512
    assert sum(held) <= 4 * n
