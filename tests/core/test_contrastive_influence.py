"""The bank form against autograd on the batch loss, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp

from influencespace.core.contrastive import InfoNce, added_loss, negative_loss, own_loss
from influencespace.core.contrastive_influence import (
    Tangents,
    anchor_normalisers,
    bank_influence,
    make_context,
)
from influencespace.core.info_nce import info_nce

SCALE = 7.0
LOSS = InfoNce(SCALE)


def random_tangents(n: int, seed: int, directions: int = 2, d: int = 5) -> Tangents:
    generator = torch.Generator().manual_seed(seed)

    def unit(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.nn.functional.normalize(
            torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1
        )

    def free(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Tangents(u=unit((n, d)), t=unit((n, d)), du=free((directions, n, d)), dt=free((directions, n, d)))


def joined(context: Tangents, pair: Tangents) -> Tangents:
    return Tangents(
        u=torch.cat([context.u, pair.u]),
        t=torch.cat([context.t, pair.t]),
        du=torch.cat([context.du, pair.du], 1),
        dt=torch.cat([context.dt, pair.dt], 1),
    )


def loss_derivative(a: Tangents, direction: int) -> tuple[torch.Tensor, torch.Tensor]:
    return jvp(
        lambda u, t: len(a.u) * info_nce(SCALE * u @ t.T),
        (a.u, a.t),
        (a.du[direction], a.dt[direction]),
    )


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_own_plus_negative_is_the_change_of_the_summed_loss(size: int, seed: int) -> None:
    """own + negative = D_v [B l(C + z) - (B - 1) l(C)] for a context of B - 1 pairs."""
    context, pairs = random_tangents(size, seed), random_tangents(3, seed + 1)
    own, negative = bank_influence(pairs, make_context(context, SCALE, batch_size=size + 1))
    for v in range(2):
        _, without = loss_derivative(context, v)
        for z in range(3):
            _, together = loss_derivative(joined(context, pairs[slice(z, z + 1)]), v)
            torch.testing.assert_close((own + negative)[v, z], together - without)


def test_mean_own_over_a_batch_is_the_loss_derivative() -> None:
    """Each pair of a batch against the rest of it: the mean of own is D_v L_B."""
    batch = random_tangents(6, 3)
    owns = []
    for z in range(6):
        rest = torch.tensor([k for k in range(6) if k != z])
        own, _ = bank_influence(batch[slice(z, z + 1)], make_context(batch[rest], SCALE, batch_size=6))
        owns.append(own)
    for v in range(2):
        _, derivative = loss_derivative(batch, v)
        torch.testing.assert_close(torch.cat(owns, 1).mean(1)[v], derivative / 6)


def test_directions_are_linear() -> None:
    context, pairs = random_tangents(5, 0), random_tangents(4, 1)
    summed = Tangents(
        u=pairs.u, t=pairs.t, du=pairs.du.sum(0, keepdim=True), dt=pairs.dt.sum(0, keepdim=True)
    )
    summed_context = Tangents(
        u=context.u, t=context.t, du=context.du.sum(0, keepdim=True), dt=context.dt.sum(0, keepdim=True)
    )
    separate = bank_influence(pairs, make_context(context, SCALE, 20))
    together = bank_influence(summed, make_context(summed_context, SCALE, 20))
    for one, both in zip(separate, together):
        torch.testing.assert_close(one.sum(0, keepdim=True), both)


def test_a_small_bank_stands_for_a_large_batch() -> None:
    """Repeating a context k times is the same as weighting its pairs by k, where no anchor meets a copy of itself."""
    context, pairs = random_tangents(4, 0), random_tangents(3, 1)
    four_times = context[torch.arange(4).repeat(4)]
    small, _ = bank_influence(pairs, make_context(context, SCALE, batch_size=17))
    large, _ = bank_influence(pairs, make_context(four_times, SCALE, batch_size=17))
    torch.testing.assert_close(small, large)


def test_any_partition_of_the_pairs_gives_the_same_scores() -> None:
    context, pairs = make_context(random_tangents(6, 0), SCALE, 30), random_tangents(11, 1)
    whole = sum(bank_influence(pairs, context))
    parts = torch.cat([sum(bank_influence(pairs[slice(i, i + 3)], context)) for i in range(0, 11, 3)], 1)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)


def test_taylor_is_the_first_order_in_small_probabilities() -> None:
    """With many negatives an anchor gives z little, and both forms agree."""
    context, pairs = make_context(random_tangents(40, 0), 0.5, 40_000), random_tangents(5, 1)
    exact = bank_influence(pairs, context, "exact")[1]
    taylor = bank_influence(pairs, context, "taylor")[1]
    torch.testing.assert_close(exact, taylor, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_a_context_of_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="two or more"):
        make_context(random_tangents(1, 0), SCALE, 8)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 8), batch_size=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_the_derivative_of_the_bank_loss_is_own_plus_negative(size: int, batch_size: int, seed: int) -> None:
    """In each role too, whatever the batch that the context stands for."""
    context, pairs = random_tangents(size, seed), random_tangents(3, seed + 1)
    own, negative = bank_influence(pairs, make_context(context, SCALE, batch_size))

    def total(*at: torch.Tensor) -> torch.Tensor:
        return added_loss(LOSS, *at, batch_size)

    def as_anchor(*at: torch.Tensor) -> torch.Tensor:
        return own_loss(LOSS, *at, batch_size)

    def as_negative(*at: torch.Tensor) -> torch.Tensor:
        normalisers = anchor_normalisers(*at[2:], SCALE, batch_size)
        return negative_loss(LOSS, *at, normalisers, batch_size)

    position = (pairs.u, pairs.t, context.u, context.t)
    for v in range(2):
        direction = (pairs.du[v], pairs.dt[v], context.du[v], context.dt[v])
        for function, expected in ((total, own + negative), (as_anchor, own), (as_negative, negative)):
            derivative = jvp(function, position, direction)[1]
            torch.testing.assert_close(derivative, expected[v], rtol=1e-10, atol=1e-10)


def test_the_bank_loss_is_what_a_pair_adds_to_the_summed_loss() -> None:
    context, pairs = random_tangents(5, 0), random_tangents(4, 1)
    alone = 5 * info_nce(SCALE * context.u @ context.t.T)
    found = added_loss(LOSS, pairs.u, pairs.t, context.u, context.t, batch_size=6)
    for z in range(4):
        batch = joined(context, pairs[slice(z, z + 1)])
        torch.testing.assert_close(found[z], 6 * info_nce(SCALE * batch.u @ batch.t.T) - alone)


def test_the_normalisers_are_those_of_the_context() -> None:
    context = random_tangents(5, 0)
    made = make_context(context, SCALE, 30)
    images, texts = anchor_normalisers(context.u, context.t, SCALE, 30)
    torch.testing.assert_close(images, made.log_Z)
    torch.testing.assert_close(texts, made.log_Z_text)


def test_normalisers_of_a_context_of_one_pair_are_refused() -> None:
    one = random_tangents(1, 0)
    with pytest.raises(ValueError, match="two or more"):
        added_loss(LOSS, one.u, one.t, one.u, one.t, 8)
