"""Influence, removal and curvature in closed form against autograd on the losses, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives import (
    CONTRASTIVE,
    OBJECTIVES,
    POINTWISE,
    along,
    every_contrastive,
    every_objective,
    few,
    joined,
    outputs,
    seeds,
    sizes,
    without,
)
from torch import Tensor
from torch.func import grad, hessian, jvp

from influencespace.core.contrastive import Objective, Pointwise, info_nce_terms, role_losses
from influencespace.core.contrastive_influence import (
    Tangents,
    curvature,
    influence,
    negative_role_derivative,
    own_role_derivative,
    pointwise_influence,
    removal,
    summarise,
)


def loss_along(objective: Objective, a: Tangents) -> Tensor:
    """Derivatives of the batch's mean loss along the directions: (V,)."""
    return along(lambda u, t: objective.terms(u, t).mean(), a)


@every_objective
@few
@given(size=sizes, seed=seeds)
def test_removal_is_the_derivative_of_the_loss_without_less_that_of_the_whole(
    name: str, size: int, seed: int
) -> None:
    a, objective = outputs(name, size, seed), OBJECTIVES[name]
    changes = removal(objective, a, "exact")
    for z in range(size):
        expected = loss_along(objective, without(a, z)) - loss_along(objective, a)
        torch.testing.assert_close(changes[:, z], expected)


@every_objective
@few
@given(size=sizes, seed=seeds)
def test_taylor_removal_is_minus_the_derivative_in_the_weight(name: str, size: int, seed: int) -> None:
    a, objective = outputs(name, size, seed), OBJECTIVES[name]
    w = torch.ones(size, dtype=torch.float64)

    def by_weight(u: Tensor, t: Tensor) -> Tensor:
        return grad(lambda weights: objective.weighted_loss(u, t, weights))(w)

    torch.testing.assert_close(removal(objective, a, "taylor"), -along(by_weight, a))


@every_objective
@few
@given(seed=seeds)
def test_curvature_is_the_gauss_newton_matrix_of_the_mean_loss(name: str, seed: int) -> None:
    """J^T (Hessian in logits or predictions) J, with J the Jacobian of the logits by the outputs."""
    a, objective = outputs(name, 4, seed), OBJECTIVES[name]
    by_u, by_t = curvature(objective, a)
    products = (by_u[:, None] * a.du[None]).sum((-1, -2)) + (by_t[:, None] * a.dt[None]).sum((-1, -2))
    if isinstance(objective, Pointwise):
        H = hessian(lambda u: objective.terms(u, a.t).mean())(a.u).reshape(a.u.numel(), -1)
        derivative = a.du.flatten(1)
        expected = derivative @ H @ derivative.T
        assert float(torch.linalg.eigvalsh((H + H.T) / 2)[0]) >= -1e-12
    else:
        S = objective.logits(a.u, a.t)
        dS = objective.scale * (a.du @ a.t.T + a.u @ a.dt.mT)
        expected = dS.flatten(1) @ objective.curvature_in_logits(S, dS).flatten(1).T
    torch.testing.assert_close(products, expected)


@every_contrastive
@few
@given(size=st.integers(2, 8), batch_size=st.integers(2, 40), seed=seeds)
def test_both_roles_are_the_derivatives_of_their_losses(
    name: str, size: int, batch_size: int, seed: int
) -> None:
    """Whatever the training batch that the negative batch stands for."""
    objective, batch, pairs = CONTRASTIVE[name], outputs(name, size, seed), outputs(name, 3, seed + 1)
    own, negative = influence(objective, pairs, summarise(objective, batch, batch_size))
    position = (pairs.u, pairs.t, batch.u, batch.t)
    for v in range(2):
        direction = (pairs.du[v], pairs.dt[v], batch.du[v], batch.dt[v])
        by_own, by_negative = jvp(lambda *at: role_losses(objective, *at, batch_size), position, direction)[1]
        torch.testing.assert_close(own[v], by_own, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(negative[v], by_negative, rtol=1e-10, atol=1e-10)


@every_contrastive
@few
@given(size=st.integers(2, 8), seed=seeds)
def test_own_plus_negative_is_the_change_of_the_summed_loss(name: str, size: int, seed: int) -> None:
    """D_v [B l(batch + z) - (B - 1) l(batch)] for a negative batch of B - 1 pairs."""
    objective, batch, pairs = CONTRASTIVE[name], outputs(name, size, seed), outputs(name, 3, seed + 1)
    own, negative = influence(objective, pairs, summarise(objective, batch, size + 1))
    alone = size * loss_along(objective, batch)
    for z in range(3):
        together = (size + 1) * loss_along(objective, joined(batch, pairs[slice(z, z + 1)]))
        torch.testing.assert_close((own + negative)[:, z], together - alone)


@every_contrastive
def test_mean_own_over_a_batch_is_the_loss_derivative(name: str) -> None:
    """Each pair of a batch against the rest of it; of the sigmoid loss the negatives are the other role."""
    objective, batch = CONTRASTIVE[name], outputs(name, 6, 3)
    roles = [
        influence(objective, batch[slice(z, z + 1)], summarise(objective, without(batch, z), 6))
        for z in range(6)
    ]
    own, negative = (torch.cat(role, 1).mean(1) for role in zip(*roles))
    whole = own if name == "info_nce" else own + negative / 2
    torch.testing.assert_close(whole, loss_along(objective, batch))


@every_contrastive
def test_directions_are_linear(name: str) -> None:
    objective, batch, pairs = CONTRASTIVE[name], outputs(name, 5, 0), outputs(name, 4, 1)

    def summed(a: Tangents) -> Tangents:
        return Tangents(u=a.u, t=a.t, du=a.du.sum(0, keepdim=True), dt=a.dt.sum(0, keepdim=True))

    separate = influence(objective, pairs, summarise(objective, batch, 20))
    together = influence(objective, summed(pairs), summarise(objective, summed(batch), 20))
    for one, both in zip(separate, together):
        torch.testing.assert_close(one.sum(0, keepdim=True), both)


@every_contrastive
def test_a_small_batch_stands_for_a_large_one(name: str) -> None:
    """Repeating a batch k times is the same as weighting its pairs by k, where no anchor meets a copy of itself."""
    objective, batch, pairs = CONTRASTIVE[name], outputs(name, 4, 0), outputs(name, 3, 1)
    small, _ = influence(objective, pairs, summarise(objective, batch, 17))
    large, _ = influence(objective, pairs, summarise(objective, batch[torch.arange(4).repeat(4)], 17))
    torch.testing.assert_close(small, large)


@every_contrastive
def test_any_partition_of_the_pairs_gives_the_same_scores(name: str) -> None:
    objective, pairs = CONTRASTIVE[name], outputs(name, 11, 1)
    batch = summarise(objective, outputs(name, 6, 0), 30)
    whole = sum(influence(objective, pairs, batch))
    chunks = [sum(influence(objective, pairs[slice(i, i + 3)], batch)) for i in range(0, 11, 3)]
    torch.testing.assert_close(whole, torch.cat(chunks, 1), rtol=0, atol=1e-12)


def test_taylor_is_the_first_order_in_small_probabilities() -> None:
    """With many negatives an anchor gives z little, and both forms agree."""
    objective, pairs = CONTRASTIVE["info_nce"], outputs("info_nce", 5, 1)
    batch = summarise(objective, outputs("info_nce", 40, 0), 4_000_000)
    exact, taylor = (influence(objective, pairs, batch, form)[1] for form in ("exact", "taylor"))
    torch.testing.assert_close(exact, taylor, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("name", POINTWISE)
@few
@given(size=sizes, seed=seeds)
def test_pointwise_influence_is_the_derivative_of_each_loss(name: str, size: int, seed: int) -> None:
    a, objective = outputs(name, size, seed), POINTWISE[name]
    torch.testing.assert_close(pointwise_influence(objective, a), along(objective.terms, a))


def random_logits(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    S, dS = 3 * torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    return S, dS


@given(size=sizes, seed=seeds)
def test_taylor_form_differentiates_the_sum_of_probabilities(size: int, seed: int) -> None:
    S, dS = random_logits(size, seed)

    def given_to_others(S: Tensor) -> Tensor:
        mask = 1 - torch.eye(size, dtype=S.dtype)
        return ((S.softmax(1) * mask).sum(0) + (S.softmax(0) * mask).sum(1)) / 2

    own, by_others = (jvp(f, (S,), (dS,))[1] for f in (info_nce_terms, given_to_others))
    torch.testing.assert_close(own_role_derivative(S, dS), own)
    torch.testing.assert_close(negative_role_derivative(S, dS, "taylor"), by_others)


@given(size=sizes, seed=seeds, steepness=st.sampled_from([1.0, 30.0, 1000.0]))
def test_a_certain_match_costs_no_digits(size: int, seed: int, steepness: float) -> None:
    """Where a pair has all the probability of its row, what is left for the others is no number of the format."""
    S, dS = (x.float() for x in random_logits(size, seed))
    derivative = negative_role_derivative(steepness * S, dS)
    others = torch.arange(1, size)

    def of_others(S: Tensor) -> Tensor:
        return (info_nce_terms(S)[others] - info_nce_terms(S[others][:, others])).sum()

    expected = jvp(of_others, ((steepness * S).double(),), (dS.double(),))[1]
    torch.testing.assert_close(derivative[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_form_is_named() -> None:
    objective, a = CONTRASTIVE["info_nce"], outputs("info_nce", 3, 0)
    with pytest.raises(ValueError, match="'tailor'"):
        removal(objective, a, "tailor")
    with pytest.raises(ValueError, match="'tailor'"):
        influence(objective, a, summarise(objective, a, 8), "tailor")
