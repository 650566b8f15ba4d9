"""The derivative of a step's target loss by the mix, and what mix is learnt where some captions are wrong, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_metagradient import Planted
from torch import Tensor
from torch.func import grad

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.models.mixing import MixStep, learn_mix, loss_ahead
from influencespace.models.space import Inputs
from influencespace.models.trajectory import Rule, step

SMALL = Planted(pairs=20, batch_size=6, steps=9)
SCORES: FloatArray = np.random.default_rng(3).normal(size=(SMALL.pairs, 3))


def scores_of(rows: IntArray) -> FloatArray:
    return SCORES[rows]


def halves(world: Planted) -> list[Inputs]:
    (u, v), (t, s) = (side.chunk(2) for side in world.target)
    return [(u, t), (v, s)]


@pytest.mark.parametrize("index", [0, 1, 5])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_the_derivative_through_a_step_is_that_of_finite_differences(rule: Rule, index: int) -> None:
    path = replace(SMALL.trajectory, rule=rule)
    state, rows = dict(path.backwards())[index], path.batches[index]
    one = MixStep(index, SMALL.inputs(rows), torch.from_numpy(SCORES[rows]), SMALL.target)
    mix, h = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64), 1e-5

    def ahead(mix: Tensor) -> Tensor:
        return loss_ahead(mix, path, state, one)[0]

    found = grad(ahead)(mix)
    truth = torch.stack([(ahead(mix + by) - ahead(mix - by)) / (2 * h) for by in h * torch.eye(3).to(mix)])
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-9)


def test_a_step_weighs_its_batch_by_the_softmax_of_the_mixed_scores() -> None:
    path, index = SMALL.trajectory, 4
    state, rows = dict(path.backwards())[index], path.batches[index]
    scores, mix = torch.from_numpy(SCORES[rows]), torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
    one = MixStep(index, SMALL.inputs(rows), scores, SMALL.target)
    loss, after = loss_ahead(mix, path, state, one)
    exponentials = torch.exp(scores @ mix)
    weights = exponentials / exponentials.mean()
    theta = state.theta.clone().requires_grad_()
    u, t = path.space.embed_at(path.space.unflatten(theta), SMALL.inputs(rows))
    (gradient,) = torch.autograd.grad(path.objective.weighted_loss(u, t, weights), theta)
    expected = step(state, gradient, index, path.rate(index), path.config.weight_decay, "adamw")
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(loss, SMALL.target_loss(expected.theta))


@pytest.mark.parametrize("seed", range(3))
def test_what_tells_right_from_wrong_outweighs_noise(seed: int) -> None:
    world = Planted(pairs=600, batch_size=48, steps=60, seed=seed)
    generator = np.random.default_rng(seed)
    telling = ~world.wrong + 0.3 * generator.normal(size=world.pairs)
    scores = np.stack([telling, *generator.normal(size=(3, world.pairs))], axis=1)
    standardised = (scores - scores.mean(0)) / scores.std(0)
    mix = learn_mix(world.trajectory, lambda rows: standardised[rows], halves(world))
    assert mix[0] > 3 * np.abs(mix[1:]).mean()
    assert mix[0] > 2 * np.abs(mix[1:]).max()


def test_a_score_turned_round_gets_the_opposite_coefficient() -> None:
    sign = np.array([1, -1, 1])
    mix = learn_mix(SMALL.trajectory, scores_of, [SMALL.target])
    np.testing.assert_allclose(
        learn_mix(SMALL.trajectory, lambda rows: sign * scores_of(rows), [SMALL.target]),
        sign * mix,
        rtol=1e-6,
    )


def test_scores_that_are_all_equal_say_nothing() -> None:
    mix = learn_mix(SMALL.trajectory, lambda rows: np.ones((len(rows), 2)), [SMALL.target])
    np.testing.assert_allclose(mix, 0, atol=1e-6)


def test_the_batches_of_the_target_take_turns() -> None:
    first, second = halves(SMALL)
    one, two = (replace(SMALL.trajectory, batches=SMALL.trajectory.batches[:steps]) for steps in (1, 2))
    np.testing.assert_array_equal(
        learn_mix(one, scores_of, [first, second]), learn_mix(one, scores_of, [first])
    )
    assert (learn_mix(two, scores_of, [first, second]) != learn_mix(two, scores_of, [first])).all()


def test_the_weights_of_the_path_are_not_read() -> None:
    path = SMALL.trajectory
    weighted = replace(path, weights=lambda rows: torch.full((len(rows),), 7.0, dtype=torch.float64))
    np.testing.assert_array_equal(
        learn_mix(weighted, scores_of, [SMALL.target]), learn_mix(path, scores_of, [SMALL.target])
    )


def test_a_mix_that_is_not_finite_names_its_step() -> None:
    scores = SCORES.copy()
    scores[SMALL.trajectory.batches[0][0], 1] = np.inf
    with pytest.raises(FloatingPointError, match="step 0"):
        learn_mix(SMALL.trajectory, lambda rows: scores[rows], [SMALL.target])
