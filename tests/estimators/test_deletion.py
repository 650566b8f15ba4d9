"""An edit comes near the proxy really retrained on the same batches less the pairs, in float64."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad

from influencespace.core.batches import training_batches
from influencespace.errors import InputError
from influencespace.estimators.deletion import (
    SHARE,
    WeightedBatch,
    batch_with,
    deletion_displacement,
    long_step,
    segments,
    steps_for,
    weighted_gradient,
    without,
)
from influencespace.models.heads import initial_heads
from influencespace.models.space import Inputs, Space
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import Rule, State, Trajectory, loss_gradient, space_at, step

PAIRS, INPUT = 60, 16
CONFIG = HeadsConfig(dimension=8, steps=80, batch_size=20, weight_decay=0.1, temperature=0.1)
RATES: dict[Rule, float] = {"adamw": 1e-3, "sgd": 3e-3}
IMAGES = np.arange(PAIRS) // 2  # two captions an image
rules = pytest.mark.parametrize("rule", list(RATES))


def embeddings(n: int, seed: int) -> Inputs:
    x = torch.randn(2, n, INPUT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x[0], dim=-1), F.normalize(x[0] + 0.7 * x[1], dim=-1)


POOL, TEST = embeddings(PAIRS, 0), embeddings(50, 1)


def rows_of_pool(rows: np.ndarray) -> Inputs:
    return POOL[0][rows], POOL[1][rows]


def path_of(rule: Rule = "adamw", images: np.ndarray = IMAGES, seed: int = 0, **changes: float) -> Trajectory:
    space = Space(initial_heads(INPUT, INPUT, CONFIG.dimension, 0).double())
    config = replace(CONFIG, **({"learning_rate": RATES[rule]} | changes))
    batches = training_batches(np.ones(PAIRS), images, config.batch_size, config.steps, seed)
    return Trajectory(
        space=space,
        initial=space.flatten(space.parameters).clone(),
        config=config,
        batches=list(batches),
        inputs=rows_of_pool,
        objective=config.objective,
        rule=rule,
    )


def logits(path: Trajectory, theta: Tensor, inputs: Inputs = TEST) -> Tensor:
    u, t = space_at(path.space, theta).embed(inputs)
    return u @ t.T


@rules
@settings(max_examples=5)
@given(removed=st.sets(st.integers(0, PAIRS - 1), min_size=1, max_size=12))
def test_with_the_steps_of_the_training_it_is_retraining(rule: Rule, removed: set[int]) -> None:
    path = path_of(rule)
    rows = np.array(sorted(removed))
    edited = path.final + deletion_displacement(path, rows, IMAGES.__getitem__, len(path.batches))
    torch.testing.assert_close(edited, without(path, rows).final, rtol=0, atol=1e-9)


@rules
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_it_comes_near_retraining_in_few_steps_and_nearer_in_more(rule: Rule, share: float) -> None:
    """Batches of the whole pool, so that only the length of the steps is between the two."""
    path = path_of(rule, images := np.arange(PAIRS), batch_size=PAIRS)
    removed = np.random.default_rng(1).permutation(PAIRS)[: round(share * PAIRS)]
    retrained = logits(path, without(path, removed).final)

    def distance(steps: int) -> float:
        edited = path.final + deletion_displacement(path, removed, images.__getitem__, steps)
        return float(
            (logits(path, edited) - retrained).norm() / (logits(path, path.final) - retrained).norm()
        )

    found = [distance(steps) for steps in (4, 8, 16, 32)]
    assert found[0] < 0.3
    for fewer, more in pairwise(found):
        assert more < 0.6 * fewer  # first order in the length of a step


def test_deleting_nothing_changes_nothing() -> None:
    assert not deletion_displacement(path_of(), np.array([], np.int64), IMAGES.__getitem__).any()


def test_the_order_of_the_pairs_is_irrelevant() -> None:
    removed = np.array([5, 17, 3, 40])
    forward, backward = (
        deletion_displacement(path_of(), rows, IMAGES.__getitem__) for rows in (removed, removed[::-1])
    )
    assert torch.equal(forward, backward)


def test_a_deleted_pair_becomes_as_strange_as_to_the_retrained_proxy() -> None:
    """Over several draws of the batches, a fifth of the way is left on average: single draws leave 2 to 28 %."""
    removed, left = np.arange(0, 20, 2), []
    for seed in range(5):
        path = path_of(seed=seed)
        ends = {
            "unedited": path.final,
            "retrained": without(path, removed).final,
            "edited": path.final + deletion_displacement(path, removed, IMAGES.__getitem__, 16),
        }
        own = {
            name: float(logits(path, end, rows_of_pool(removed)).diagonal().mean())
            for name, end in ends.items()
        }
        assert own["retrained"] < own["unedited"]
        left.append(abs(own["edited"] - own["retrained"]) / (own["unedited"] - own["retrained"]))
    assert np.mean(left) < 0.2


@rules
def test_a_long_step_of_one_step_is_the_optimisers(rule: Rule) -> None:
    path = path_of(rule)
    state, gradient = random_state(path)
    expected = step(state, gradient, 7, path.rate(7), path.config.weight_decay, rule)
    for found, wanted in zip(long_step(path, state, gradient, range(7, 8)), expected):
        torch.testing.assert_close(found, wanted)


@rules
def test_a_long_step_is_many_steps_of_one_gradient(rule: Rule) -> None:
    path = path_of(rule, weight_decay=0.0)
    state, gradient = random_state(path)
    looped = state
    for index in range(30, 36):
        looped = step(looped, gradient, index, path.rate(index), 0.0, rule)
    found = long_step(path, state, gradient, range(30, 36))
    torch.testing.assert_close(found.m, looped.m)
    torch.testing.assert_close(found.v, looped.v)
    moved, expected = found.theta - state.theta, looped.theta - state.theta
    assert float((moved - expected).norm() / expected.norm()) < 0.01  # one preconditioner stands for six


def random_state(path: Trajectory) -> tuple[State, Tensor]:
    generator = torch.Generator().manual_seed(0)
    theta, m, v, gradient = torch.randn(4, len(path.initial), generator=generator, dtype=torch.float64)
    return State(theta, m, v.abs() + 1), gradient


@pytest.mark.parametrize("count", [1, 3, 17, 79, 80, 500])
def test_segments_cover_every_step_once_and_go_equally_far(count: int) -> None:
    path = path_of()
    found = segments(path, count)
    assert [index for segment in found for index in segment] == list(range(len(path.batches)))
    assert len(found) <= count
    if count <= 3:
        ways = [sum(path.rate(index) for index in segment) for segment in found]
        assert max(ways) < 1.2 * min(ways)


def test_every_removed_pair_counts_by_its_share_of_a_segments_batches() -> None:
    path, removed, segment = path_of(), np.array([4, 5, 31]), range(10, 16)
    batch = batch_with(path, without(path, removed), segment)
    weight = dict(zip(batch.rows.tolist(), batch.weights.tolist()))
    assert len(weight) == len(batch.rows)
    for row in removed:
        seen = sum(row in path.batches[index] for index in segment)
        assert weight.get(int(row), 0.0) == seen / len(segment)


@settings(max_examples=10)
@given(weights=st.lists(st.floats(0.05, 3), min_size=2, max_size=12))
def test_the_gradient_is_that_of_the_weighted_loss(weights: list[float]) -> None:
    path, w = path_of(), torch.tensor(weights, dtype=torch.float64)
    rows = np.arange(len(w))
    others = (w * torch.from_numpy(IMAGES[rows][:, None] != IMAGES[rows])) + torch.eye(len(w))

    def loss(theta: Tensor) -> Tensor:
        u, t = functional_call(path.space.proxy, path.space.unflatten(theta), path.inputs(rows))
        exponentials = (path.objective.scale * u @ t.T).exp()
        own = exponentials.diagonal()
        normalisers = (exponentials * others).sum(1).log() + (exponentials * others.T).sum(0).log()
        value: Tensor = (w * (normalisers / 2 - own.log())).sum() / w.sum()
        return value

    found = weighted_gradient(path, path.initial, WeightedBatch(rows, np.array(weights)), IMAGES.__getitem__)
    torch.testing.assert_close(found, grad(loss)(path.initial), rtol=1e-9, atol=1e-12)


def test_weights_of_one_are_the_loss_and_pairs_of_an_image_are_no_negatives() -> None:
    path = path_of()
    rows = np.arange(0, 12, 2)  # of distinct images
    ones = WeightedBatch(rows, np.ones(6))
    expected = loss_gradient(path.space, path.initial, path.inputs(rows), path.objective)
    torch.testing.assert_close(weighted_gradient(path, path.initial, ones, IMAGES.__getitem__), expected)
    # another caption of an image enters with no weight to speak of: only as a negative it could be felt
    with_sibling = WeightedBatch(np.append(rows, 1), np.append(np.ones(6), 1e-12))
    torch.testing.assert_close(
        weighted_gradient(path, path.initial, with_sibling, IMAGES.__getitem__), expected
    )
    alone = WeightedBatch(np.array([0, 1]), np.ones(2))
    assert float(weighted_gradient(path, path.initial, alone, IMAGES.__getitem__).norm()) < 1e-12


def test_a_high_learning_rate_is_given_more_steps() -> None:
    low, high = (steps_for(path_of(learning_rate=rate)) for rate in (1e-5, 1e-2))
    assert low == round(SHARE * CONFIG.steps)
    assert low < high <= CONFIG.steps


def test_refusals() -> None:
    path = path_of()
    with pytest.raises(InputError, match="train a proxy on the kept pairs instead"):
        deletion_displacement(path, np.arange(PAIRS - 1), IMAGES.__getitem__)
    with pytest.raises(ValueError, match="one or more"):
        deletion_displacement(path, np.array([1]), IMAGES.__getitem__, steps=0)
