from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from influencespace.errors import InputError
from influencespace.models.fusion import FUSIONS, FusionConfig, FusionName, attention_pooling, fuse

ROWS, DIMENSION = 13, 8
names = st.sampled_from(sorted(FUSIONS))
seeds = st.integers(0, 2**31)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(2, ROWS, DIMENSION, generator=generator, dtype=dtype)
    return pairs[0], pairs[1], pairs.mean(dim=(0, 1))


@settings(max_examples=30, deadline=None)
@given(names, seeds, st.sampled_from([torch.float32, torch.float64]))
def test_rows_have_unit_length_and_keep_their_dtype(name: FusionName, seed: int, dtype: torch.dtype) -> None:
    images, texts, query = draw(seed, dtype)
    fused = fuse(images, texts, FusionConfig(name=name), query=query)
    assert fused.dtype == dtype
    torch.testing.assert_close(fused.norm(dim=1), torch.ones(ROWS, dtype=dtype))


@settings(max_examples=30, deadline=None)
@given(names, seeds, st.integers(1, ROWS - 1))
def test_any_partition_gives_the_same_rows(name: FusionName, seed: int, cut: int) -> None:
    images, texts, query = draw(seed)
    config = FusionConfig(name=name)
    whole = fuse(images, texts, config, query=query)
    parts = [
        fuse(images[part], texts[part], config, query=query) for part in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(names, seeds, st.floats(0.01, 100))
def test_the_length_of_an_embedding_does_not_matter(name: FusionName, seed: int, factor: float) -> None:
    images, texts, query = draw(seed)
    config = FusionConfig(name=name)
    torch.testing.assert_close(
        fuse(factor * images, texts / factor, config, query=query * factor),
        fuse(images, texts, config, query=query),
    )


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["weighted_sum", "product", "attention_pooling"]), seeds)
def test_modalities_may_be_swapped(name: FusionName, seed: int) -> None:
    images, texts, query = draw(seed)
    config = FusionConfig(name=name)
    torch.testing.assert_close(
        fuse(images, texts, config, query=query), fuse(texts, images, config, query=query)
    )


def test_concatenation_averages_the_cosines() -> None:
    images, texts, _ = draw(0)
    u, t = normalize(images, dim=1), normalize(texts, dim=1)
    fused = fuse(images, texts, FusionConfig())
    torch.testing.assert_close(fused @ fused.T, (u @ u.T + t @ t.T) / 2)


def test_concatenation_takes_embeddings_of_two_lengths() -> None:
    images, texts, _ = draw(0)
    assert fuse(images, texts[:, :3], FusionConfig()).shape == (ROWS, DIMENSION + 3)


def test_weight_moves_from_text_to_image() -> None:
    images, texts, _ = draw(0)
    for weight, expected in ((0.0, texts), (1.0, images)):
        fused = fuse(images, texts, FusionConfig(name="weighted_sum", weight=weight))
        torch.testing.assert_close(fused, normalize(expected, dim=1))


def test_product_is_by_coordinate() -> None:
    images, texts, _ = draw(0)
    fused = fuse(images, texts, FusionConfig(name="product"))
    torch.testing.assert_close(fused, normalize(images * texts, dim=1))


def test_attention_goes_from_choice_to_average_with_the_temperature() -> None:
    images, texts, query = draw(0)
    u, t, q = normalize(images, dim=1), normalize(texts, dim=1), query / query.norm()
    chosen = torch.where((u @ q > t @ q)[:, None], u, t)
    torch.testing.assert_close(attention_pooling(images, texts, query=query, temperature=1e-6), chosen)
    average = normalize(u + t, dim=1)
    torch.testing.assert_close(attention_pooling(images, texts, query=query, temperature=1e9), average)


@pytest.mark.parametrize("name", ["weighted_sum", "product", "attention_pooling"])
def test_parts_that_cancel_leave_the_image(name: FusionName) -> None:
    images = torch.eye(4, dtype=torch.float64)
    texts = images.roll(1, 0) if name == "product" else -images  # disjoint, or opposite
    query = torch.ones(4, dtype=torch.float64) if name == "product" else torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(fuse(images, texts, FusionConfig(name=name), query=query), images)


@pytest.mark.parametrize("name", ["weighted_sum", "product", "attention_pooling"])
def test_two_spaces_are_reported(name: FusionName) -> None:
    images, texts, query = draw(0)
    with pytest.raises(InputError, match=f"'{name}' needs .* not 8 and 5"):
        fuse(images, texts[:, :5], FusionConfig(name=name), query=query)


@pytest.mark.parametrize("wrong", [{"weight": 1.5}, {"temperature": 0.0}, {"name": "sum"}])
def test_options_out_of_range_are_reported(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        FusionConfig(**wrong)  # type: ignore[arg-type]
