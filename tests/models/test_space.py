"""The Space against dense Jacobians and Hessians by autograd, in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nonlinear import towers
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

from influencespace.core.contrastive import InfoNce, info_nce, info_nce_terms
from influencespace.models.heads import initial_heads
from influencespace.models.space import Inputs, Space

SCALE = 5.0
EXACT = {"rtol": 1e-8, "atol": 1e-8}


def heads() -> nn.Module:
    return initial_heads(3, 5, 2, seed=0).double()


PROXYS = {
    "heads": lambda: Space(heads()),
    "one head": lambda: Space(heads(), ["text"]),
    "towers": lambda: Space(towers()),
    "a block": lambda: Space(towers(), ["image.2.weight", "text.bias"]),
}


@pytest.fixture(params=PROXYS)
def space(request: pytest.FixtureRequest) -> Space:
    return PROXYS[request.param]()


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(n: int = 6) -> Inputs:
    return random((n, 3), 1), random((n, 5), 2)


def as_function(space: Space, inputs: Inputs) -> Callable[[Tensor], Inputs]:
    """The proxy's outputs as a function of the flat vector: the slow truth."""
    return lambda vector: functional_call(space.proxy, space.unflatten(vector), inputs)


def position(space: Space) -> Tensor:
    return space.flatten(space.parameters)


def logits(space: Space, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    forward = as_function(space, inputs)

    def function(vector: Tensor) -> Tensor:
        u, t = forward(vector)
        return SCALE * u @ t.T

    return function


def test_size_counts_the_named_parameters(space: Space) -> None:
    assert space.size == len(position(space)) == sum(x.numel() for x in space.parameters.values())


@settings(max_examples=10, deadline=None)
@given(name=st.sampled_from(sorted(PROXYS)), directions=st.integers(1, 4), seed=st.integers(0, 1000))
def test_flatten_and_unflatten_are_inverse(name: str, directions: int, seed: int) -> None:
    space = PROXYS[name]()
    for vector in (random((space.size,), seed), random((directions, space.size), seed)):
        tree = space.unflatten(vector)
        for key, value in space.parameters.items():
            assert tree[key].shape == (*vector.shape[:-1], *value.shape)
        torch.testing.assert_close(space.flatten(tree), vector, rtol=0, atol=0)


def test_tangents_are_the_jacobian_times_the_directions(space: Space) -> None:
    inputs, directions = recorded(), random((3, space.size), 3)
    u, t = as_function(space, inputs)(position(space))
    jacobian_u, jacobian_t = jacrev(as_function(space, inputs))(position(space))
    tangents = space.tangents(inputs, directions)
    torch.testing.assert_close(tangents.u, u, **EXACT)
    torch.testing.assert_close(tangents.t, t, **EXACT)
    torch.testing.assert_close(tangents.du, torch.einsum("ndp,vp->vnd", jacobian_u, directions), **EXACT)
    torch.testing.assert_close(tangents.dt, torch.einsum("ndp,vp->vnd", jacobian_t, directions), **EXACT)


def test_pullback_is_the_transposed_jacobian(space: Space) -> None:
    inputs = recorded()
    jacobian_u, jacobian_t = jacrev(as_function(space, inputs))(position(space))
    c_u, c_t = random((3, 6, 2), 4), random((3, 6, 2), 5)
    dense = torch.einsum("vnd,ndp->vp", c_u, jacobian_u) + torch.einsum("vnd,ndp->vp", c_t, jacobian_t)
    torch.testing.assert_close(space.pullback(inputs, c_u, c_t), dense, **EXACT)


def test_tangents_and_pullback_are_adjoint(space: Space) -> None:
    inputs, direction = recorded(), random((1, space.size), 6)
    c_u, c_t = random((1, 6, 2), 7), random((1, 6, 2), 8)
    tangents = space.tangents(inputs, direction)
    forward = (tangents.du * c_u).sum() + (tangents.dt * c_t).sum()
    torch.testing.assert_close(forward, (space.pullback(inputs, c_u, c_t) * direction).sum(), **EXACT)


def dense_gauss_newton(space: Space, inputs: Inputs) -> Tensor:
    function = logits(space, inputs)
    S = function(position(space))
    jacobian = jacrev(function)(position(space)).reshape(S.numel(), space.size)
    curvature = hessian(lambda flat: info_nce(flat.reshape(S.shape)))(S.reshape(-1))
    return jacobian.T @ curvature @ jacobian


def test_gauss_newton_is_the_dense_product(space: Space) -> None:
    inputs, directions = recorded(), random((3, space.size), 9)
    dense = dense_gauss_newton(space, inputs)
    torch.testing.assert_close(
        space.gauss_newton(inputs, directions, InfoNce(SCALE)), directions @ dense, **EXACT
    )


def test_gauss_newton_is_symmetric_and_positive(space: Space) -> None:
    G = space.gauss_newton(recorded(), torch.eye(space.size, dtype=torch.float64), InfoNce(SCALE)).detach()
    torch.testing.assert_close(G, G.T, **EXACT)
    assert float(torch.linalg.eigvalsh(G)[0]) > -1e-10


def test_loss_gradients_are_autograds(space: Space) -> None:
    inputs, weights = recorded(), random((3, 6), 10)
    terms = logits(space, inputs)
    dense = jacrev(lambda vector: weights @ info_nce_terms(terms(vector)))(position(space))
    torch.testing.assert_close(space.loss_gradients(inputs, weights, InfoNce(SCALE)), dense, **EXACT)


def test_equal_weights_give_the_gradient_of_the_mean_loss(space: Space) -> None:
    inputs = recorded()
    function = logits(space, inputs)
    dense = grad(lambda vector: info_nce(function(vector)))(position(space))
    weights = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(space.loss_gradients(inputs, weights, InfoNce(SCALE))[0], dense, **EXACT)


def test_a_parameter_may_be_a_single_number() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.scale = heads(), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, images: Tensor, texts: Tensor) -> Inputs:
            u, t = self.heads(self.scale * images, texts)
            return u, t

    space = Space(Scaled())
    vectors = random((3, space.size), 0)
    torch.testing.assert_close(space.flatten(space.unflatten(vectors)), vectors)
    assert space.loss_gradients(recorded(), torch.full((1, 6), 1 / 6).double(), InfoNce(SCALE)).shape == (
        1,
        space.size,
    )


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"no parameter \['bias'\]; it has \['image', 'text'\]"):
        Space(heads(), ["image", "bias"])
