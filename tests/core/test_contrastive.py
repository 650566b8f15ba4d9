"""Every loss against its textbook form and against autograd, in float64: one set of laws for all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives import (
    CONTRASTIVE,
    OBJECTIVES,
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
from torch.func import grad, jvp
from torch.nn.functional import cross_entropy

from influencespace.core.contrastive import InfoNce, contrastive, info_nce, info_nce_only, role_losses
from influencespace.errors import InputError


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
    return (cross_entropy(S, labels) + cross_entropy(S.T, labels)) / 2


@every_objective
@few
@given(size=sizes, seed=seeds)
def test_the_mean_term_is_the_batch_loss(name: str, size: int, seed: int) -> None:
    a = outputs(name, size, seed)
    terms = OBJECTIVES[name].terms(a.u, a.t)
    assert terms.shape == (size,)
    torch.testing.assert_close(terms.mean(), written_out(name, a.u, a.t))


def test_a_batch_of_one_has_no_info_nce() -> None:
    assert float(info_nce(torch.tensor([[3.7]]))) == 0


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


@every_contrastive
@few
@given(size=sizes, seed=seeds)
def test_curvature_in_logits_is_the_hessian(name: str, size: int, seed: int) -> None:
    a, objective = outputs(name, size, seed, d=size), CONTRASTIVE[name]
    S, dS = objective.logits(a.u, a.t), a.du

    def loss(S: Tensor) -> Tensor:
        if isinstance(objective, InfoNce):
            return info_nce(S)
        return torch.nn.functional.softplus((1 - 2 * torch.eye(size)) * S).sum() / size

    products = torch.stack([jvp(grad(loss), (S,), (one,))[1] for one in dS])
    torch.testing.assert_close(objective.curvature_in_logits(S, dS), products)
    assert bool(((dS * products).sum((-1, -2)) >= -1e-12).all())


@every_contrastive
@few
@given(size=st.integers(2, 8), seed=seeds)
def test_both_roles_together_are_what_a_pair_adds_to_the_summed_loss(name: str, size: int, seed: int) -> None:
    """B l(batch + z) - (B - 1) l(batch) for a negative batch of B - 1 pairs."""
    objective, batch, pairs = CONTRASTIVE[name], outputs(name, size, seed), outputs(name, 3, seed + 1)
    added = sum(role_losses(objective, pairs.u, pairs.t, batch.u, batch.t, size + 1))
    alone = objective.terms(batch.u, batch.t).sum()
    for z in range(3):
        whole = joined(batch, pairs[slice(z, z + 1)])
        torch.testing.assert_close(added[z], objective.terms(whole.u, whole.t).sum() - alone)


@every_contrastive
@few
@given(seed=seeds)
def test_normaliser_slopes_are_the_slopes_of_the_normalisers(name: str, seed: int) -> None:
    objective, a = CONTRASTIVE[name], outputs(name, 5, seed)
    slopes = objective.normaliser_slopes(a.u, a.t, 9)
    assert len(slopes) == len(objective.normalisers(a.u, a.t, 9))
    dS = objective.scale * (a.du @ a.t.T + a.u @ a.dt.mT)
    for side, W in enumerate(slopes):
        derivative = along(lambda u, t, side=side: objective.normalisers(u, t, 9)[side], a)
        torch.testing.assert_close((W * dS).sum(-1 - side), derivative)


def test_a_negative_batch_of_one_pair_is_refused() -> None:
    one = outputs("info_nce", 1, 0)
    with pytest.raises(ValueError, match="needs two"):
        role_losses(CONTRASTIVE["info_nce"], one.u, one.t, one.u, one.t, 8)


def test_what_needs_negatives_says_so() -> None:
    with pytest.raises(InputError, match="clip_score is for contrastive losses"):
        contrastive(OBJECTIVES["cross_entropy"], "clip_score")
    with pytest.raises(InputError, match="ekfac is for the InfoNCE loss and the problem's is sigmoid"):
        info_nce_only(OBJECTIVES["sigmoid"], "ekfac")
