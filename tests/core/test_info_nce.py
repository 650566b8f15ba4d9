"""Laws of the closed forms against autograd and direct evaluation, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core import info_nce

sizes = st.integers(2, 9)
seeds = st.integers(0, 2**31)


def random_logits(size: int, seed: int, count: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(count)]


@given(size=sizes, seed=seeds)
def test_info_nce_is_the_mean_of_both_cross_entropies(size: int, seed: int) -> None:
    (S,) = random_logits(size, seed)
    labels = torch.arange(size)
    direct = (
        torch.nn.functional.cross_entropy(S, labels) + torch.nn.functional.cross_entropy(S.T, labels)
    ) / 2
    torch.testing.assert_close(info_nce.info_nce(S), direct)


def test_a_batch_of_one_has_no_loss() -> None:
    assert float(info_nce.info_nce(torch.tensor([[3.7]]))) == 0


@given(size=sizes, seed=seeds)
def test_own_role_derivative_is_autograds(size: int, seed: int) -> None:
    S, dS = random_logits(size, seed, 2)
    _, derivative = torch.func.jvp(info_nce.info_nce_terms, (S,), (dS,))
    torch.testing.assert_close(info_nce.own_role_derivative(S, dS), derivative)


@given(size=st.integers(3, 9), seed=seeds)
def test_roles_make_the_leave_one_out_difference(size: int, seed: int) -> None:
    """Exact form: own + negative is the derivative of B L_B - (B-1) L_{B without n}."""
    S, dS = random_logits(size, seed, 2)
    together = info_nce.own_role_derivative(S, dS) + info_nce.negative_role_derivative(S, dS)
    for n in range(size):
        others = torch.tensor([k for k in range(size) if k != n])

        def difference(S: torch.Tensor, others: torch.Tensor = others) -> torch.Tensor:
            without = S[others][:, others]
            return size * info_nce.info_nce(S) - (size - 1) * info_nce.info_nce(without)

        _, derivative = torch.func.jvp(difference, (S,), (dS,))
        torch.testing.assert_close(together[n], derivative)


@given(size=sizes, seed=seeds)
def test_taylor_form_differentiates_the_sum_of_probabilities(size: int, seed: int) -> None:
    S, dS = random_logits(size, seed, 2)

    def given_to_others(S: torch.Tensor) -> torch.Tensor:
        mask = 1 - torch.eye(size, dtype=S.dtype)
        return ((S.softmax(1) * mask).sum(0) + (S.softmax(0) * mask).sum(1)) / 2

    _, derivative = torch.func.jvp(given_to_others, (S,), (dS,))
    torch.testing.assert_close(info_nce.negative_role_derivative(S, dS, "taylor"), derivative)


@given(size=st.integers(3, 9), seed=seeds, steepness=st.sampled_from([1.0, 30.0, 1000.0]))
def test_a_sure_match_costs_no_digits(size: int, seed: int, steepness: float) -> None:
    """Where a pair has all the probability of its row, what is left for the others is no number of the format."""
    S, dS = random_logits(size, seed, 2)
    found = info_nce.negative_role_derivative((steepness * S).float(), dS.float())
    n = 0
    others = torch.arange(1, size)

    def of_others(S: torch.Tensor) -> torch.Tensor:
        terms, without = info_nce.info_nce_terms(S)[others], info_nce.info_nce_terms(S[others][:, others])
        return (terms - without).sum()

    _, derivative = torch.func.jvp(of_others, ((steepness * S).float().double(),), (dS.float().double(),))
    torch.testing.assert_close(found[n].double(), derivative, rtol=1e-4, atol=1e-5)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="'tailor'"):
        info_nce.negative_role_derivative(torch.eye(3), torch.eye(3), "tailor")


@given(size=sizes, seed=seeds)
def test_gauss_newton_is_the_hessian_in_logit_space(size: int, seed: int) -> None:
    S, dS = random_logits(size, seed, 2)
    _, product = torch.func.jvp(torch.func.grad(info_nce.info_nce), (S,), (dS,))
    torch.testing.assert_close(info_nce.gauss_newton_logits(S, dS), product)
    assert float((dS * product).sum()) >= -1e-12
