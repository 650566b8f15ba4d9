"""Every objective against autograd and against losses written out, in float64: one set of laws for all."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jvp

from influencespace.core.contrastive import (
    Contrastive,
    InfoNce,
    Objective,
    Pointwise,
    Sigmoid,
    added_loss,
    contrastive,
    cross_entropy,
    info_nce_only,
    negative_loss,
    own_loss,
    squared_error,
)
from influencespace.core.contrastive_influence import Tangents
from influencespace.errors import InputError

CONTRASTIVE: dict[str, Contrastive] = {"info_nce": InfoNce(4.0), "sigmoid": Sigmoid(4.0, -1.5)}
POINTWISE: dict[str, Pointwise] = {
    "cross_entropy": Pointwise(cross_entropy),
    "squared_error": Pointwise(squared_error),
}
OBJECTIVES: dict[str, Objective] = {**CONTRASTIVE, **POINTWISE}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_contrastive = pytest.mark.parametrize("name", CONTRASTIVE)
sizes = st.integers(3, 7)
few = settings(max_examples=25)
seeds = st.integers(0, 2**31)


def outputs(name: str, n: int, seed: int, directions: int = 2, d: int = 4) -> Tangents:
    """Embeddings of pairs, or predictions and labels, that move along two directions."""
    generator = torch.Generator().manual_seed(seed)

    def free(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u, t, du, dt = free(n, d), free(n, d), free(directions, n, d), free(directions, n, d)
    if name in CONTRASTIVE:
        u, t = (torch.nn.functional.normalize(x, dim=-1) for x in (u, t))
    else:
        dt = torch.zeros_like(dt)
    if name == "cross_entropy":
        t = torch.nn.functional.one_hot(t.argmax(1), d).double()
    return Tangents(u=u, t=t, du=du, dt=dt)


def along(function: Callable[[Tensor, Tensor], Tensor], a: Tangents) -> Tensor:
    """Derivatives of a function of (u, t) along the directions, by autograd: (V, ...)."""
    return torch.stack([jvp(function, (a.u, a.t), (du, dt))[1] for du, dt in zip(a.du, a.dt)])


def written_out(name: str, u: Tensor, t: Tensor) -> Tensor:
    """The batch loss by its textbook form, entry by entry."""
    n = len(u)
    if name == "squared_error":
        return torch.stack([0.5 * (u[i] - t[i]) @ (u[i] - t[i]) for i in range(n)]).mean()
    if name == "cross_entropy":
        chosen = [-(u[i, t[i].argmax()].exp() / u[i].exp().sum()).log() for i in range(n)]
        return torch.stack(chosen).mean()
    S = 4.0 * u @ t.T
    if name == "sigmoid":
        signs = [[1.0 if i == j else -1.0 for j in range(n)] for i in range(n)]
        entries = [torch.log1p(torch.exp(-signs[i][j] * (S[i, j] - 1.5))) for i in range(n) for j in range(n)]
        return torch.stack(entries).sum() / n
    labels = torch.arange(n)
    both = torch.nn.functional.cross_entropy(S, labels) + torch.nn.functional.cross_entropy(S.T, labels)
    return both / 2


def without(a: Tangents, z: int) -> Tangents:
    return a[torch.tensor([i for i in range(len(a.u)) if i != z])]


@every_objective
@few
@given(size=sizes, seed=seeds)
def test_the_mean_term_is_the_batch_loss(name: str, size: int, seed: int) -> None:
    a = outputs(name, size, seed)
    terms = OBJECTIVES[name].terms(a.u, a.t)
    assert terms.shape == (size,)
    torch.testing.assert_close(terms.mean(), written_out(name, a.u, a.t))


@every_objective
@few
@given(size=sizes, seed=seeds)
def test_weights_of_one_are_the_batch_and_a_weight_of_zero_is_the_batch_without(
    name: str, size: int, seed: int
) -> None:
    a, objective = outputs(name, size, seed), OBJECTIVES[name]
    w = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(objective.weighted_loss(a.u, a.t, w), objective.terms(a.u, a.t).mean())
    w[1] = 0
    rest = without(a, 1)
    torch.testing.assert_close(objective.weighted_loss(a.u, a.t, w), objective.terms(rest.u, rest.t).mean())


@every_objective
@few
@given(size=sizes, seed=seeds)
def test_removal_is_the_derivative_of_the_loss_without_less_that_of_the_whole(
    name: str, size: int, seed: int
) -> None:
    a, objective = outputs(name, size, seed), OBJECTIVES[name]
    found = objective.removal(a, "exact")
    whole = along(lambda u, t: objective.terms(u, t).mean(), a)
    for z in range(size):
        less = along(lambda u, t: objective.terms(u, t).mean(), without(a, z))
        torch.testing.assert_close(found[:, z], less - whole)


@every_objective
@few
@given(size=sizes, seed=seeds)
def test_taylor_removal_is_minus_the_derivative_in_the_weight(name: str, size: int, seed: int) -> None:
    a, objective = outputs(name, size, seed), OBJECTIVES[name]
    w = torch.ones(size, dtype=torch.float64)

    def by_weight(u: Tensor, t: Tensor) -> Tensor:
        return grad(lambda weights: objective.weighted_loss(u, t, weights))(w)

    torch.testing.assert_close(objective.removal(a, "taylor"), -along(by_weight, a))


@every_objective
@few
@given(seed=seeds)
def test_curvature_is_the_gauss_newton_matrix_of_the_mean_loss(name: str, seed: int) -> None:
    """J^T (Hessian in logits or predictions) J, with J the Jacobian of the logits by the outputs."""
    a, objective = outputs(name, 4, seed), OBJECTIVES[name]
    by_u, by_t = objective.curvature(a)
    found = (by_u[:, None] * a.du[None]).sum((-1, -2)) + (by_t[:, None] * a.dt[None]).sum((-1, -2))
    if isinstance(objective, Pointwise):
        H = hessian(lambda u: objective.terms(u, a.t).mean())(a.u).reshape(a.u.numel(), -1)
        moved = a.du.flatten(1)
    else:
        S = objective.scale * a.u @ a.t.T
        unit = (
            InfoNce(1.0) if isinstance(objective, InfoNce) else Sigmoid(1.0, CONTRASTIVE["sigmoid"].bias)  # type: ignore[union-attr]
        )
        H = hessian(lambda x: unit.terms(x, torch.eye(4, dtype=x.dtype)).mean())(S).reshape(16, 16)
        moved = (objective.scale * (a.du @ a.t.T + a.u @ a.dt.mT)).flatten(1)
    torch.testing.assert_close(found, moved @ H @ moved.T)
    assert float(torch.linalg.eigvalsh((H + H.T) / 2)[0]) >= -1e-12


@every_contrastive
@few
@given(size=sizes, seed=seeds)
def test_own_plus_negative_is_what_a_pair_adds_to_the_summed_loss(name: str, size: int, seed: int) -> None:
    """Value and derivative, for a context of B - 1 pairs: B l(C + z) - (B - 1) l(C)."""
    objective = CONTRASTIVE[name]
    context, pairs = outputs(name, size, seed), outputs(name, 3, seed + 1)
    own, negative = objective.influence(pairs, objective.context(context, size + 1), "exact")
    value = added_loss(objective, pairs.u, pairs.t, context.u, context.t, size + 1)
    for z in range(3):
        pair = pairs[slice(z, z + 1)]
        joined = Tangents(
            u=torch.cat([context.u, pair.u]),
            t=torch.cat([context.t, pair.t]),
            du=torch.cat([context.du, pair.du], 1),
            dt=torch.cat([context.dt, pair.dt], 1),
        )
        truth = objective.terms(joined.u, joined.t).sum() - objective.terms(context.u, context.t).sum()
        torch.testing.assert_close(value[z], truth)
        moved = along(lambda u, t: objective.terms(u, t).sum(), joined)
        moved = moved - along(lambda u, t: objective.terms(u, t).sum(), context)
        torch.testing.assert_close((own + negative)[:, z], moved)


@every_contrastive
@few
@given(batch_size=st.integers(6, 40), seed=seeds)
def test_both_roles_are_derivatives_of_their_losses_in_a_small_context(
    name: str, batch_size: int, seed: int
) -> None:
    objective = CONTRASTIVE[name]
    context, pairs = outputs(name, 5, seed), outputs(name, 2, seed + 1)
    own, negative = objective.influence(pairs, objective.context(context, batch_size), "exact")
    every = (pairs.u, pairs.t, context.u, context.t)

    def negative_part(*at: Tensor) -> Tensor:
        normalisers = objective.normalisers(*at[2:], batch_size)
        return negative_loss(objective, *at, normalisers, batch_size)

    for v in range(2):
        moves = (pairs.du[v], pairs.dt[v], context.du[v], context.dt[v])
        by_own = jvp(lambda *at: own_loss(objective, *at, batch_size), every, moves)[1]
        torch.testing.assert_close(own[v], by_own)
        torch.testing.assert_close(negative[v], jvp(negative_part, every, moves)[1])


@every_contrastive
@few
@given(seed=seeds)
def test_normaliser_weights_are_the_slopes_of_the_normalisers(name: str, seed: int) -> None:
    objective, a = CONTRASTIVE[name], outputs(name, 5, seed)
    weights = objective.normaliser_weights(a.u, a.t, 9)
    normalisers = objective.normalisers(a.u, a.t, 9)
    assert len(weights) == len(normalisers)
    for side, W in enumerate(weights):
        dS = objective.scale * (a.du @ a.t.T + a.u @ a.dt.mT)
        moved = along(lambda u, t, side=side: objective.normalisers(u, t, 9)[side], a)
        torch.testing.assert_close((W * dS).sum(-1 - side), moved)


@pytest.mark.parametrize("name", POINTWISE)
@few
@given(size=sizes, seed=seeds)
def test_pointwise_influence_is_the_derivative_of_each_loss(name: str, size: int, seed: int) -> None:
    a, objective = outputs(name, size, seed), POINTWISE[name]
    torch.testing.assert_close(objective.influence(a), along(objective.terms, a))


def test_what_needs_negatives_says_so() -> None:
    with pytest.raises(InputError, match="clip_score is for contrastive losses"):
        contrastive(POINTWISE["cross_entropy"], "clip_score")
    with pytest.raises(InputError, match="ekfac is for the InfoNCE loss and the problem's is sigmoid"):
        info_nce_only(CONTRASTIVE["sigmoid"], "ekfac")
