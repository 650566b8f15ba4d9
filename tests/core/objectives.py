"""All objectives, and random outputs of a proxy that move along two directions."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import normalize, one_hot

from influencespace.core.contrastive import (
    Contrastive,
    InfoNce,
    Objective,
    Pointwise,
    Sigmoid,
    cross_entropy,
    squared_error,
)
from influencespace.core.contrastive_influence import Tangents

CONTRASTIVE: dict[str, Contrastive] = {"info_nce": InfoNce(4.0), "sigmoid": Sigmoid(4.0, -1.5)}
POINTWISE = {"cross_entropy": Pointwise(cross_entropy), "squared_error": Pointwise(squared_error)}
OBJECTIVES: dict[str, Objective] = {**CONTRASTIVE, **POINTWISE}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_contrastive = pytest.mark.parametrize("name", CONTRASTIVE)
sizes = st.integers(3, 7)
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)


def outputs(name: str, n: int, seed: int, directions: int = 2, d: int = 4) -> Tangents:
    """Embeddings of pairs, or predictions and labels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, d), (n, d), (directions, n, d), (directions, n, d)
    u, t, du, dt = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if name in CONTRASTIVE:
        return Tangents(u=normalize(u, dim=-1), t=normalize(t, dim=-1), du=du, dt=dt)
    labels = one_hot(t.argmax(1), d).double() if name == "cross_entropy" else t
    return Tangents(u=u, t=labels, du=du, dt=torch.zeros_like(dt))


def along(function: Callable[[Tensor, Tensor], Tensor], a: Tangents) -> Tensor:
    """Derivatives of a function of (u, t) along the directions, by autograd: (V, ...)."""
    return torch.stack([jvp(function, (a.u, a.t), (du, dt))[1] for du, dt in zip(a.du, a.dt)])


def without(a: Tangents, z: int) -> Tangents:
    return a[torch.arange(len(a.u)) != z]


def joined(a: Tangents, b: Tangents) -> Tangents:
    u, t = torch.cat([a.u, b.u]), torch.cat([a.t, b.t])
    return Tangents(u=u, t=t, du=torch.cat([a.du, b.du], 1), dt=torch.cat([a.dt, b.dt], 1))
