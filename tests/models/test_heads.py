"""Heads begin aligned, give unit vectors, and depend on their seed alone."""

import pytest
import torch
import torch.nn.functional as F

from influencespace.models.heads import initial_heads


def embeddings(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator), dim=-1)


def test_outputs_have_unit_length_and_the_asked_width() -> None:
    heads = initial_heads(12, 7, 5, seed=0)
    u, t = heads(embeddings(9, 12), embeddings(9, 7, 1))
    assert u.shape == t.shape == (9, 5)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(t.norm(dim=1), torch.ones(9))


def test_one_space_keeps_its_alignment() -> None:
    """The same vector as image and as text has cosine one, and other cosines are kept up to 1 / sqrt(width)."""
    x, y = embeddings(200, 32), embeddings(200, 32, 1)
    y = F.normalize(x + y, dim=-1)
    heads = initial_heads(32, 32, 256, seed=0)
    with torch.no_grad():
        (u, same), (_, t) = heads(x, x), heads(x, y)
    torch.testing.assert_close((u * same).sum(1), torch.ones(200))
    kept, given = (u * t).sum(1), (x * y).sum(1)
    assert float((kept - given).abs().mean()) < 1 / 256**0.5
    assert float((u @ t.T).diagonal().mean() - (u @ t.T).mean()) > 0.5


def test_different_dimensions_have_projections_of_their_own() -> None:
    heads = initial_heads(6, 8, 4, seed=0)
    assert heads.image.shape == (6, 4)
    assert heads.text.shape == (8, 4)
    assert not torch.equal(heads.image, heads.text[:6])


@pytest.mark.parametrize("text_dimension", [6, 8])
def test_the_seed_decides_and_the_global_generator_does_not(text_dimension: int) -> None:
    torch.manual_seed(0)
    first = initial_heads(6, text_dimension, 4, seed=3)
    torch.manual_seed(1)
    again, other = initial_heads(6, text_dimension, 4, seed=3), initial_heads(6, text_dimension, 4, seed=4)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
        assert not torch.equal(other.state_dict()[name], value)


def test_the_temperature_is_no_parameter() -> None:
    assert {name for name, _ in initial_heads(4, 4, 2, seed=0).named_parameters()} == {"image", "text"}
