"""Diff-In against per-sample gradients and dense Hessians, in float64, and against real removal."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from problems import Small
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev

from influencespace.core.contrastive import info_nce
from influencespace.errors import InputError
from influencespace.estimators.checkpoints import at_checkpoints
from influencespace.estimators.diff_in import DiffIn, interaction, presence
from influencespace.estimators.influence import InfluenceScorer
from influencespace.estimators.problem import scores
from influencespace.models.space import Inputs, Space

SMALL = Small(pairs=60, steps=60, kept_checkpoints=2)
PROBLEM = SMALL.problem
THETA = PROBLEM.space.flatten(PROBLEM.space.parameters)


@cache
def found() -> np.ndarray:
    return scores(DiffIn(), PROBLEM, SMALL.cut())


def loss(theta: Tensor, space: Space, inputs: Inputs) -> Tensor:
    u, t = functional_call(space.proxy, space.unflatten(theta), inputs)
    return info_nce(PROBLEM.objective.scale * u @ t.T)


def test_the_derivative_of_presence_is_what_the_influence_scorer_computes() -> None:
    v = torch.randn(3, PROBLEM.space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = SMALL.rows(np.arange(9))
    scorer = InfluenceScorer(PROBLEM.space, v, PROBLEM.bank, PROBLEM.objective, PROBLEM.batch_size)
    jacobian = jacrev(presence(PROBLEM, inputs))(THETA)  # (C, 9, p)
    truth = scorer(inputs, np.full(9, -1)).by_batch  # (3, 9, C)
    np.testing.assert_allclose(torch.einsum("cnp,vp->vnc", jacobian, v), truth, atol=1e-10)


def test_the_bracket_is_of_dense_hessians_and_gradients_of_single_pairs() -> None:
    """<g_V, H_B G_z + H_z G_B>, G_z and H_z of B l(C + z) - (B - 1) l(C), up to what all pairs have alike."""
    space, recorded = PROBLEM.space, PROBLEM.bank[1]
    g = grad(loss)(THETA, space, SMALL.target)
    G_B, H_B = grad(loss)(THETA, space, recorded.inputs), hessian(loss)(THETA, space, recorded.inputs)

    def l_z(theta: Tensor, z: Inputs, other: Inputs) -> Tensor:
        joined = (torch.cat([other[0], z[0]]), torch.cat([other[1], z[1]]))
        return 16 * loss(theta, space, joined) - 15 * loss(theta, space, other)

    strangers = np.setdiff1d(np.arange(60), np.concatenate([c.image for c in PROBLEM.bank[:2]]))[:4]
    single = replace(PROBLEM, bank=PROBLEM.bank[:2])
    batch = SMALL.cut([4], strangers)[0]
    fast = interaction(single, recorded, batch)
    slow = []
    for pair in strangers:
        z = SMALL.rows(np.array([pair]))
        of_contexts = [
            g @ (H_B @ grad(l_z)(THETA, z, c.inputs) + hessian(l_z)(THETA, z, c.inputs) @ G_B)
            for c in single.bank
        ]
        slow.append(float(sum(of_contexts)) / 2)
    np.testing.assert_allclose(fast - fast[0], np.array(slow) - slow[0], rtol=1e-6, atol=1e-8)


def test_the_score_weighs_checkpoints_as_published_with_the_other_sign() -> None:
    drawn = np.random.default_rng(PROBLEM.seed).integers(len(PROBLEM.bank), size=2)
    batch, total = SMALL.cut()[0], np.zeros(60)
    for k, (checkpoint, then) in enumerate(at_checkpoints(PROBLEM)):
        a_t = -checkpoint.step * checkpoint.learning_rate**2 / (60 * 2)
        total -= a_t * interaction(then, PROBLEM.bank[drawn[k]], batch)
    np.testing.assert_allclose(found(), total, rtol=1e-12)


def test_the_score_has_no_term_of_first_order_in_the_rate() -> None:
    """With a rate twice as high at the same checkpoints the score is four times as large."""
    hot = [replace(c, learning_rate=2 * c.learning_rate) for c in PROBLEM.checkpoints]
    again = scores(DiffIn(), replace(PROBLEM, checkpoints=hot), SMALL.cut())
    np.testing.assert_allclose(again, 4 * found(), rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_positive_helps_by_real_removal(seed: int) -> None:
    """Only as a tendency: of single pairs its Pearson correlation with leave-one-out retraining is -.17 to .86."""
    small = Small(seed=seed)
    order = np.argsort(scores(DiffIn(), small.problem, small.cut()))

    def target_loss(dropped: np.ndarray) -> float:
        weights = np.ones(small.pairs)
        weights[dropped] = 0
        return float(np.mean([small.target_loss(small.train(weights, seed)) for seed in range(3)]))

    assert target_loss(order[:24]) < target_loss(order[-24:])


def test_any_partition_and_any_order_give_the_same_scores() -> None:
    order = np.random.default_rng(2).permutation(60)
    again = np.empty(60)
    again[order] = scores(DiffIn(), PROBLEM, SMALL.cut([21, 39], order))
    np.testing.assert_allclose(again, found(), rtol=0, atol=1e-9 * found().std())


def test_the_batches_are_drawn_by_the_seed() -> None:
    assert not np.allclose(scores(DiffIn(), replace(PROBLEM, seed=1), SMALL.cut()), found())
    np.testing.assert_array_equal(scores(DiffIn(), PROBLEM, SMALL.cut()), found())


def test_without_checkpoints_the_error_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"diff_in .* keep some in training"):
        DiffIn().fit(replace(PROBLEM, checkpoints=()))
