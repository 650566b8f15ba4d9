"""TracIn against per-sample autograd at each checkpoint, in float64, and against real removal."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from problems import Small
from torch import Tensor
from torch.func import functional_call, grad

from influencespace.core.contrastive import info_nce
from influencespace.errors import InputError
from influencespace.estimators.checkpoints import at_checkpoints
from influencespace.estimators.influence import InfluenceScorer
from influencespace.estimators.problem import Checkpoint, Problem, scores
from influencespace.estimators.tracin import TracIn
from influencespace.estimators.unrolled import Unrolled
from influencespace.models.space import Inputs, Space

SMALL = Small(pairs=60, steps=60, kept_checkpoints=5)


@cache
def found(preconditioned: bool = True) -> np.ndarray:
    return scores(TracIn(preconditioned=preconditioned), SMALL.problem, SMALL.cut())


def loss_gradient(space: Space, inputs: Inputs) -> Tensor:
    def loss(theta: Tensor) -> Tensor:
        u, t = functional_call(space.proxy, space.unflatten(theta), inputs)
        return info_nce(SMALL.problem.objective.scale * u @ t.T)

    gradient: Tensor = grad(loss)(space.flatten(space.parameters))
    return gradient


def slow(problem: Problem, pair: int, D: Tensor) -> float:
    """sum_t eta_t <D^-1 g_V, grad [B l(C + z) - (B - 1) l(C)]>, by a gradient for each pair and negative batch."""
    z, total = SMALL.rows(np.array([pair])), 0.0
    for checkpoint, then in at_checkpoints(problem):
        v = loss_gradient(then.space, SMALL.target) / D
        offset = float(
            InfluenceScorer(then.space, v[None], problem.bank, problem.objective, problem.batch_size).offset[
                0
            ]
        )
        values = []
        for recorded in problem.bank:
            if pair in recorded.image:
                continue
            joined = (torch.cat([recorded.inputs[0], z[0]]), torch.cat([recorded.inputs[1], z[1]]))
            B = problem.batch_size
            G_z = B * loss_gradient(then.space, joined) - (B - 1) * loss_gradient(then.space, recorded.inputs)
            values.append(float(v @ G_z) - offset)
        total += checkpoint.learning_rate * float(np.mean(values))
    return total


@pytest.mark.parametrize("preconditioned", [True, False])
def test_the_score_is_the_sum_of_inner_products_of_gradients(preconditioned: bool) -> None:
    D = SMALL.problem.preconditioner if preconditioned else torch.ones(SMALL.problem.space.size)
    for pair in (0, 17, 59):
        assert found(preconditioned)[pair] == pytest.approx(slow(SMALL.problem, pair, D.double()), rel=1e-7)


def test_scores_of_checkpoints_add_up() -> None:
    parts = [
        scores(TracIn(), replace(SMALL.problem, checkpoints=[checkpoint]), SMALL.cut())
        for checkpoint in SMALL.problem.checkpoints
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), found(), rtol=1e-12)


def test_the_preconditioner_of_sgd_changes_nothing() -> None:
    sgd = replace(SMALL.problem, preconditioner=torch.ones_like(SMALL.problem.preconditioner))
    np.testing.assert_array_equal(scores(TracIn(), sgd, SMALL.cut()), found(preconditioned=False))


def test_one_checkpoint_is_in_memory_at_a_time() -> None:
    alive: list[int] = []

    class Watched(Space):
        def __init__(self, of: Space):
            super().__init__(of.proxy)
            alive.append(1)
            assert len(alive) <= 2  # the loop's own and the one that takes its place

        def __del__(self) -> None:
            alive.pop()

    def watched(checkpoint: Checkpoint) -> Checkpoint:
        return replace(checkpoint, load=lambda: Watched(checkpoint.load()))

    checkpoints = [watched(checkpoint) for checkpoint in SMALL.problem.checkpoints]
    assert len(checkpoints) > 2
    again = scores(TracIn(), replace(SMALL.problem, checkpoints=checkpoints), SMALL.cut())
    np.testing.assert_array_equal(again, found())


def test_with_adamws_scale_it_is_nearer_to_what_removal_does() -> None:
    """Which is why it is the default: unrolled influence stands for leave-one-out retraining."""
    truth = scores(Unrolled(form="whole"), SMALL.problem, SMALL.cut())
    scaled, plain = (np.corrcoef(found(kind), truth)[0, 1] for kind in (True, False))
    assert scaled > plain > 0.4


def test_positive_helps_by_real_removal() -> None:
    order = np.argsort(found())

    def loss(dropped: np.ndarray) -> float:
        weights = np.ones(SMALL.pairs)
        weights[dropped] = 0
        return float(np.mean([SMALL.target_loss(SMALL.train(weights, seed)) for seed in range(3)]))

    assert loss(order[:15]) < loss(order[-15:])


def test_any_partition_and_any_order_give_the_same_scores() -> None:
    order = np.random.default_rng(2).permutation(60)
    again = np.empty(60)
    again[order] = scores(TracIn(), SMALL.problem, SMALL.cut([1, 20, 39], order))
    np.testing.assert_allclose(again, found(), rtol=0, atol=1e-10)


def test_without_checkpoints_the_error_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"tracin .* keep some in training"):
        TracIn().fit(replace(SMALL.problem, checkpoints=()))
