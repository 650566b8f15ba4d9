"""The influence estimator against per-sample autograd and dense solves on a tiny problem, in float64."""

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev

from influencespace.core.contrastive import InfoNce, info_nce
from influencespace.estimators.ecif import Ecif
from influencespace.estimators.influence import (
    Curvature,
    CurvatureConfig,
    Influence,
    InfluenceScorer,
    NegativeBatch,
    damping_of,
    floored,
    sketch_curvature,
    solve,
    target_gradients,
)
from influencespace.models.heads import initial_heads
from influencespace.models.space import Inputs, Space

SCALE, D_IN, D_OUT = 6.0, 4, 3
LOSS = InfoNce(SCALE)
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def embeddings(n: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, D_IN, generator=generator, dtype=torch.float64)
    return F.normalize(x[0], dim=-1), F.normalize(x[0] + x[1], dim=-1)


def make_space() -> Space:
    return Space(initial_heads(D_IN, D_IN, D_OUT, seed=0).double())


SPACE = make_space()
POSITION = SPACE.flatten(SPACE.parameters)


def loss_of(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """The mean loss of one batch as a function of the flat parameters."""

    def loss(vector: Tensor) -> Tensor:
        u, t = functional_call(SPACE.proxy, SPACE.unflatten(vector), inputs)
        return info_nce(SCALE * u @ t.T)

    return loss


def together(left: Inputs, right: Inputs) -> Inputs:
    return torch.cat([left[0], right[0]]), torch.cat([left[1], right[1]])


def one(inputs: Inputs, row: int) -> Inputs:
    return inputs[0][row : row + 1], inputs[1][row : row + 1]


def bank(sizes: tuple[int, ...] = (7, 7, 7)) -> list[NegativeBatch]:
    starts = np.cumsum([0, *sizes])
    return [
        NegativeBatch(inputs=embeddings(size, 10 + k), image=np.arange(starts[k], starts[k + 1]))
        for k, size in enumerate(sizes)
    ]


def directions(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, SPACE.size, generator=generator, dtype=torch.float64)


def scorer(count: int = 2, batch_size: int = 8, sizes: tuple[int, ...] = (7, 7, 7)) -> InfluenceScorer:
    return InfluenceScorer(SPACE, directions(count), bank(sizes), LOSS, batch_size)


PAIRS, IMAGES = embeddings(11, 3), np.arange(100, 111)


def test_influence_is_the_gradient_of_presence_along_the_direction() -> None:
    """By per-sample autograd: v . grad [B l(C + z) - (B - 1) l(C)], less its part that any pair has."""
    scored = scorer()
    found = scored(PAIRS, IMAGES)
    for c, recorded in enumerate(bank()):
        alone = grad(loss_of(recorded.inputs))(POSITION)
        for z in range(len(IMAGES)):
            joined = grad(loss_of(together(recorded.inputs, one(PAIRS, z))))(POSITION)
            truth = directions() @ (8 * joined - 7 * alone) - torch.from_numpy(scored.offset)
            np.testing.assert_allclose(found.by_batch[:, z, c], truth, atol=1e-6, rtol=1e-6)


def test_own_and_negative_are_what_a_pair_does_as_an_anchor_and_to_the_others() -> None:
    """The mean of own is the batch's loss along v where every pair meets the rest of its batch."""
    batch = embeddings(8, 30)
    owns = []
    for z in range(8):
        rest = [k for k in range(8) if k != z]
        recorded = NegativeBatch(inputs=(batch[0][rest], batch[1][rest]), image=np.array(rest))
        single = InfluenceScorer(SPACE, directions(), [recorded, *bank()[:1]], LOSS, 8)
        owns.append(single(one(batch, z), np.array([z])).own[:, 0, 0])
    derivative = directions() @ grad(loss_of(batch))(POSITION)
    np.testing.assert_allclose(np.mean(owns, axis=0), derivative, atol=1e-8)


def test_the_offset_is_what_bank_pairs_do_to_negative_batches_that_are_not_theirs() -> None:
    """So the mean negative influence of bank pairs as strangers is zero."""
    scored = scorer()
    negatives = []
    for k, recorded in enumerate(bank()):
        as_strangers = scored(recorded.inputs, np.full(len(recorded.image), -1)).negative
        others = [j for j in range(3) if j != k]
        negatives.append(as_strangers[:, :, others])
    np.testing.assert_allclose(np.concatenate(negatives, 1).mean((1, 2)), 0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 11), max_size=4), seed=st.integers(0, 1000))
def test_any_partition_in_any_order_gives_the_same_scores(cuts: list[int], seed: int) -> None:
    scored = scorer()
    whole = scored(PAIRS, IMAGES)
    order = np.random.default_rng(seed).permutation(11)
    borders = [0, *sorted(cuts), 11]
    for a, b in itertools.pairwise(borders):
        rows = order[a:b]
        if not len(rows):
            continue
        part: Influence = scored((PAIRS[0][rows], PAIRS[1][rows]), IMAGES[rows])
        np.testing.assert_allclose(part.own, whole.own[:, rows], atol=1e-12)
        np.testing.assert_allclose(part.negative, whole.negative[:, rows], atol=1e-12)


def test_negative_batches_with_the_pairs_image_do_not_judge_it() -> None:
    images = IMAGES.copy()
    images[2], images[5] = 3, 20  # in the first and in the third negative batch
    found, free = scorer()(PAIRS, images), scorer()(PAIRS, IMAGES)
    unknown = np.isnan(found.own[0])
    np.testing.assert_array_equal(np.isnan(found.negative[0]), unknown)
    assert np.argwhere(unknown).tolist() == [[2, 0], [5, 2]]
    np.testing.assert_array_equal(found.by_batch[:, ~unknown], free.by_batch[:, ~unknown])


def test_influence_is_linear_in_the_direction() -> None:
    summed = InfluenceScorer(SPACE, directions().sum(0, keepdim=True), bank(), LOSS, 8)
    both = scorer()(PAIRS, IMAGES).by_batch.sum(0)
    np.testing.assert_allclose(summed(PAIRS, IMAGES).by_batch[0], both, atol=1e-10)


def test_taylor_is_another_form() -> None:
    taylor = InfluenceScorer(SPACE, directions(), bank(), LOSS, 8, "taylor")
    exact = scorer()(PAIRS, IMAGES)
    np.testing.assert_array_equal(taylor(PAIRS, IMAGES).own, exact.own)
    assert not np.allclose(taylor(PAIRS, IMAGES).negative, exact.negative)


def test_scoring_leaves_the_proxy_as_it_was() -> None:
    before = copy.deepcopy(SPACE.proxy.state_dict())
    scorer()(PAIRS, IMAGES)
    for name, value in SPACE.proxy.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


BATCHES = [recorded.inputs for recorded in bank()]
D = torch.rand(SPACE.size, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 0.1
CURVATURE = Curvature(space=SPACE, batches=BATCHES, objective=LOSS, preconditioner=D)


def dense_curvature() -> Tensor:
    """The Gauss-Newton matrix of all negative batches by Jacobians and Hessians."""
    total = torch.zeros(SPACE.size, SPACE.size, dtype=torch.float64)
    for inputs in BATCHES:
        n = len(inputs[0])

        def logits(vector: Tensor, inputs: Inputs = inputs) -> Tensor:
            u, t = functional_call(SPACE.proxy, SPACE.unflatten(vector), inputs)
            return (SCALE * u @ t.T).reshape(-1)

        J = jacrev(logits)(POSITION)
        inner = hessian(lambda S, n=n: info_nce(S.reshape(n, n)))(logits(POSITION))
        total += J.T @ inner @ J
    return total / len(BATCHES)


def test_products_are_those_of_the_scaled_dense_curvature() -> None:
    rows = directions(3)
    scaled = dense_curvature() / torch.outer(D.sqrt(), D.sqrt())
    torch.testing.assert_close(CURVATURE(rows), rows @ scaled, **EXACT)


def test_products_do_not_depend_on_what_is_multiplied_beside() -> None:
    rows = directions(5)
    whole = CURVATURE(rows)
    parts = [CURVATURE(part) for part in rows.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 8, SPACE.size])
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_the_solved_direction_is_the_dense_solution_whatever_the_rank(rank: int, damping: float) -> None:
    """(G + mu D) v = g."""
    g = directions(2)
    config = CurvatureConfig(tolerance=1e-12, max_iterations=300)
    sketch = sketch_curvature(CURVATURE, rank, seed=0)
    solution = solve(CURVATURE, D, sketch, damping, g, config)
    dense = torch.linalg.solve(dense_curvature() + damping * torch.diag(D), g.T).T
    assert solution.residual < 1e-12
    torch.testing.assert_close(solution.x, dense, rtol=1e-6, atol=1e-8)


def test_a_sketch_of_full_rank_is_the_curvature() -> None:
    sketch = sketch_curvature(CURVATURE, rank=10 * SPACE.size, seed=0)
    scaled = dense_curvature() / torch.outer(D.sqrt(), D.sqrt())
    torch.testing.assert_close(sketch.U @ torch.diag(sketch.lam) @ sketch.U.T, scaled, rtol=0, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=4),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_target_gradients_of_the_folds_average_to_the_whole(sizes: list[int], count: int, seed: int) -> None:
    recorded_batches = [embeddings(size, 40 + k) for k, size in enumerate(sizes)]
    generator = np.random.default_rng(seed)
    folds = [generator.integers(0, count, size) for size in sizes]
    found = target_gradients(SPACE, recorded_batches, folds, count, LOSS)
    whole = sum(
        size * grad(loss_of(inputs))(POSITION) for size, inputs in zip(sizes, recorded_batches, strict=True)
    )
    torch.testing.assert_close(found.mean(0), whole / sum(sizes), **EXACT)


def test_a_fold_without_pairs_has_no_gradient() -> None:
    """With all pairs in one fold of two, the other has none, and the first has twice the mean."""
    inputs = embeddings(6, 50)
    found = target_gradients(SPACE, [inputs], [np.zeros(6, np.int64)], 2, LOSS)
    torch.testing.assert_close(found[0], 2 * grad(loss_of(inputs))(POSITION), **EXACT)
    torch.testing.assert_close(found[1], torch.zeros(SPACE.size, dtype=torch.float64))


def test_a_bank_of_one_negative_batch_is_refused() -> None:
    lone = InfluenceScorer(SPACE, directions(), bank()[:1], LOSS, 8)
    with pytest.raises(ValueError, match="two negative batches or more"):
        lone(embeddings(3, 70), np.arange(3) + 1000)


def test_a_damping_that_the_estimator_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="the damping is the problem's"):
        Ecif(curvature=CurvatureConfig(damping_factor=1))


def test_damping_is_weight_decay_and_early_stopping() -> None:
    assert damping_of(CurvatureConfig(damping_factor=10), 0.5, 0.3) == pytest.approx(20.3)


def test_the_floor_lifts_only_what_hardly_moves() -> None:
    D = torch.tensor([1e-9, 0.5, 1.5])
    torch.testing.assert_close(floored(D), torch.tensor([D.mean().item() / 1000, 0.5, 1.5]))


def test_the_score_predicts_the_change_of_the_target_loss() -> None:
    """Positive helps: along the response -H^-1 grad of a pair's presence, the target loss moves by minus the score."""
    target = embeddings(9, 60)
    g = grad(loss_of(target))(POSITION)
    H = dense_curvature() + torch.diag(D)
    v = torch.linalg.solve(H, g)
    scored = InfluenceScorer(SPACE, v[None], bank(), LOSS, 8)
    scores = scored(PAIRS, IMAGES).by_batch[0, :, 0] + scored.offset[0]
    recorded, step = BATCHES[0], 1e-4
    for z in range(4):
        joined, alone = loss_of(together(recorded, one(PAIRS, z))), loss_of(recorded)
        presence = 8 * grad(joined)(POSITION) - 7 * grad(alone)(POSITION)
        moved = POSITION - step * torch.linalg.solve(H, presence)
        fall = (loss_of(target)(POSITION) - loss_of(target)(moved)) / step
        assert float(fall) == pytest.approx(scores[z], rel=1e-2, abs=1e-3)
