"""One vector a pair, for clustering: ways to fuse an image embedding with a text embedding.

All take images u (N, Di) and texts t (N, Dt), rows of any length but zero, and return unit rows in their dtype.
A fused row depends only on its own pair and on explicit options, so any partition gives the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from influencespace.errors import STRICT, InputError

FusionName = Literal["concatenation", "weighted_sum", "product", "attention_pooling"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FusionConfig:
    """How the two embeddings of a pair become one."""

    name: FusionName = "concatenation"
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the image in `weighted_sum`; the rest is the text's."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the softmax of `attention_pooling`, in units of cosine: small ones choose, large ones average."""


def concatenation(images: Tensor, texts: Tensor) -> Tensor:
    """[u; t] of (N, Di + Dt): two pairs are as similar as their images and their texts are on average."""
    return _unit(torch.cat([_unit(images), _unit(texts)], dim=1))


def weighted_sum(images: Tensor, texts: Tensor, *, weight: float = 0.5) -> Tensor:
    """weight u + (1 - weight) t, (N, D): what image and text agree on; needs one space (Di = Dt)."""
    u, t = _unit(images), _unit(texts)
    return _unit(weight * u + (1 - weight) * t, otherwise=u)


def product(images: Tensor, texts: Tensor) -> Tensor:
    """u * t by coordinate, (N, D): how they agree, coordinate by coordinate; needs one space (Di = Dt)."""
    u, t = _unit(images), _unit(texts)
    return _unit(u * t, otherwise=u)


def attention_pooling(images: Tensor, texts: Tensor, *, query: Tensor, temperature: float = 0.1) -> Tensor:
    """a u + (1 - a) t with a = softmax([u.q, t.q] / temperature)[0], (N, D); needs one space (Di = Dt).

    `query` q (D,) is one direction for all pairs, such as the mean of all image and text embeddings: of the
    two tokens the one that is more like the data counts more, so an odd caption changes its pair little.
    """
    u, t, q = _unit(images), _unit(texts), _unit(query.to(images)[None])[0]
    attention = torch.softmax(torch.stack([u @ q, t @ q], dim=1) / temperature, dim=1)  # (N, 2)
    return _unit(attention[:, :1] * u + attention[:, 1:] * t, otherwise=u)


FUSIONS: dict[FusionName, Callable[..., Tensor]] = {
    "concatenation": concatenation,
    "weighted_sum": weighted_sum,
    "product": product,
    "attention_pooling": attention_pooling,
}
assert set(FUSIONS) == set(get_args(FusionName))


def fuse(images: Tensor, texts: Tensor, config: FusionConfig, *, query: Tensor | None = None) -> Tensor:
    """Fuse (N, Di) and (N, Dt) into unit rows by the config; `query` (D,) is for attention pooling.

    Raises InputError where the fusion needs one space and the two embeddings differ in length.
    """
    if config.name != "concatenation" and images.shape[1] != texts.shape[1]:
        raise InputError(
            f"fusion '{config.name}' needs image and text embeddings of one length, not {images.shape[1]} "
            f"and {texts.shape[1]}; use 'concatenation' or an encoder with one space"
        )
    options: dict[str, object] = {}
    if config.name == "weighted_sum":
        options = {"weight": config.weight}
    elif config.name == "attention_pooling":
        assert query is not None, "attention pooling needs the query: compute it once from all embeddings"
        options = {"query": query, "temperature": config.temperature}
    return FUSIONS[config.name](images, texts, **options)


def _unit(rows: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Scale rows to length one; a row that cancelled to zero becomes its row of `otherwise`."""
    length = rows.norm(dim=1, keepdim=True)
    # Below the rounding of a sum of two unit vectors there is only noise.
    zero = length <= 4 * torch.finfo(rows.dtype).eps
    unit = rows / torch.where(zero, torch.ones_like(length), length)
    return unit if otherwise is None else torch.where(zero, otherwise, unit)
