"""Per-sample gradients, whole and projected, against a loop of autograd and the influence scorer, in float64."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nonlinear import towers
from torch import Tensor

from influencespace.core.contrastive import InfoNce, added_loss
from influencespace.estimators.influence import InfluenceScorer, NegativeBatch
from influencespace.models.gradients import PairGradients
from influencespace.models.heads import initial_heads
from influencespace.models.projected import reduced_space
from influencespace.models.space import Inputs, Space

SCALE, BATCH = 5.0, 12
LOSS = InfoNce(SCALE)


PROXYS = {
    "heads": lambda: Space(initial_heads(3, 5, 2, seed=0).double()),
    "one head": lambda: Space(initial_heads(3, 5, 2, seed=0).double(), ["text"]),
    "towers": lambda: Space(towers()),
    "a block": lambda: Space(towers(), ["image.2.weight", "text.bias"]),
}


@pytest.fixture(params=PROXYS)
def space(request: pytest.FixtureRequest) -> Space:
    return PROXYS[request.param]()


def random(n: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (3, 5))
    return images, texts


BANK = [
    NegativeBatch(inputs=random(size, seed), image=np.arange(10 * seed, 10 * seed + size))
    for seed, size in ((1, 6), (2, 4), (3, 6))
]
PAIRS = random(7, 9)
IMAGES = np.array(
    [100, 101, 12, 20, 104, 105, 106]
)  # the third and fourth share an image with a negative batch


def gradients(space: Space, **options: object) -> PairGradients:
    return PairGradients(space=space, bank=BANK, objective=LOSS, batch_size=BATCH, **options)


def loop(space: Space) -> Tensor:
    """Gradients of the mean of F_z over the negative batches without the pair's image, one autograd call each."""
    proxy = copy.deepcopy(space.proxy).requires_grad_(True)
    named = dict(proxy.named_parameters())
    chosen = [named[name] for name in space.parameters]
    rows = []
    for z, image in enumerate(IMAGES):
        u, t = proxy(PAIRS[0][z : z + 1], PAIRS[1][z : z + 1])
        allowed = [recorded for recorded in BANK if image not in recorded.image]
        values = [added_loss(LOSS, u, t, *proxy(*c.inputs), BATCH)[0] for c in allowed]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(torch.stack(values).mean(), chosen)]))
    return torch.stack(rows)


@pytest.mark.parametrize("memory", [1, 2**28])
def test_gradients_are_those_of_a_loop(space: Space, memory: int) -> None:
    """In chunks of any size: memory for one row is one row at a time."""
    found = gradients(space, centred=False, memory=memory)(PAIRS, IMAGES)
    torch.testing.assert_close(found, loop(space), rtol=1e-9, atol=1e-10)


def test_along_a_direction_they_are_the_influences(space: Space) -> None:
    v = torch.randn(3, space.size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scorer = InfluenceScorer(space, v, BANK, LOSS, BATCH)
    found = gradients(space)
    influence = np.nanmean(scorer(PAIRS, IMAGES).by_batch, -1)
    np.testing.assert_allclose((found(PAIRS, IMAGES) @ v.T).T, influence, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(found.offset @ v.T, scorer.offset, rtol=1e-9, atol=1e-10)
    raw = gradients(space, centred=False)(PAIRS, IMAGES) - found(PAIRS, IMAGES)
    torch.testing.assert_close(raw, found.offset.expand_as(raw), rtol=1e-9, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 7), max_size=3), seed=st.integers(0, 1000))
def test_any_partition_in_any_order_gives_the_same_gradients(cuts: list[int], seed: int) -> None:
    found = gradients(PROXYS["heads"]())
    whole, order = found(PAIRS, IMAGES), np.random.default_rng(seed).permutation(7)
    for rows in np.split(order, sorted(cuts)):
        part = found((PAIRS[0][rows], PAIRS[1][rows]), IMAGES[rows])
        torch.testing.assert_close(part, whole[rows], rtol=1e-10, atol=1e-11)


def test_a_bad_pair_is_a_row_of_nan_and_touches_no_other() -> None:
    images, texts = PAIRS[0].clone(), PAIRS[1].clone()
    images[1, 0], texts[4] = torch.inf, torch.nan
    found = gradients(PROXYS["heads"]())
    rows = found((images, texts), IMAGES)
    whole = found(PAIRS, IMAGES)
    bad = torch.isnan(rows).all(1)
    assert bad.nonzero().flatten().tolist() == [1, 4]
    assert torch.isfinite(rows[~bad]).all()
    torch.testing.assert_close(rows[~bad], whole[~bad], rtol=1e-10, atol=1e-11)


def test_a_batch_can_lie_in_one_negative_batch_or_be_empty() -> None:
    """Its pairs are judged by the others."""
    found, inside = gradients(PROXYS["heads"]()), np.full(7, 10)
    assert torch.isfinite(found(PAIRS, inside)).all()
    assert found((PAIRS[0][:0], PAIRS[1][:0]), inside[:0]).shape == (0, 16)


def test_a_pair_that_no_negative_batch_can_judge_is_a_row_of_nan() -> None:
    shared = [NegativeBatch(inputs=c.inputs, image=np.append(c.image[1:], 104)) for c in BANK]
    found = PairGradients(space=PROXYS["heads"](), bank=shared, objective=LOSS, batch_size=BATCH)
    rows = found(PAIRS, IMAGES)
    assert torch.isnan(rows).all(1).nonzero().flatten().tolist() == [4]
    assert not torch.isnan(rows[[0, 1, 2, 3, 5, 6]]).any()


@pytest.mark.parametrize("dimension", [1, 3, 4])
def test_projected_gradients_are_the_projections_of_the_whole(space: Space, dimension: int) -> None:
    reduced = reduced_space(space, dimension, seed=2)
    whole = gradients(space)(PAIRS, IMAGES)
    blocks = torch.split(whole, reduced.original_sizes, 1)
    projected = [
        projection(block.reshape(-1, *projection.shape)).flatten(1)
        for projection, block in zip(reduced.projections, blocks, strict=True)
    ]
    found = gradients(reduced.space)(PAIRS, IMAGES)
    assert found.shape[1] == sum(reduced.sizes)
    torch.testing.assert_close(found, torch.cat(projected, 1), rtol=1e-9, atol=1e-10)


def test_a_projected_diagonal_is_that_of_its_matrix(space: Space) -> None:
    reduced = reduced_space(space, 3, seed=2)
    matrix = torch.block_diag(*(torch.kron(projection.A, projection.B) for projection in reduced.projections))
    D = torch.rand(space.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(reduced.diagonal(D), matrix.T @ torch.diag(D) @ matrix)


def test_the_projected_curvature_is_the_projection_of_the_curvature(space: Space) -> None:
    reduced = reduced_space(space, 3, seed=2)
    matrix = torch.block_diag(*(torch.kron(projection.A, projection.B) for projection in reduced.projections))
    inputs = BANK[0].inputs
    whole = space.gauss_newton(inputs, torch.eye(space.size, dtype=torch.float64), LOSS)
    small = reduced.space.gauss_newton(inputs, torch.eye(reduced.space.size, dtype=torch.float64), LOSS)
    torch.testing.assert_close(small, matrix.T @ whole @ matrix, rtol=1e-9, atol=1e-10)


def test_small_parameters_stay_whole_and_the_space_is_the_same() -> None:
    space = PROXYS["heads"]()
    reduced = reduced_space(space, 10, seed=0)
    assert reduced.space is space
    assert reduced.sizes == reduced.original_sizes == [6, 10]


def test_a_projected_space_depends_on_its_seed_and_can_be_sent_away() -> None:
    space = PROXYS["towers"]()

    def rows(seed: int) -> Tensor:
        sent = pickle.loads(pickle.dumps(gradients(reduced_space(space, 2, seed).space)))
        return sent(PAIRS, IMAGES)

    torch.testing.assert_close(rows(1), rows(1), rtol=0, atol=0)
    assert not torch.allclose(rows(1), rows(2))
