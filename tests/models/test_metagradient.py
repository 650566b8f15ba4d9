"""Derivatives by data weights against proxies really trained with other weights, and what descent on them finds, in float64."""

import io
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from influencespace.core.arrays import BoolArray, FloatArray, IntArray
from influencespace.core.batches import training_batches
from influencespace.models.heads import initial_heads
from influencespace.models.metagradient import MAX_WEIGHT, MIN_WEIGHT, Descent, round_of, weight_gradients
from influencespace.models.space import Inputs, Space
from influencespace.models.training import HeadsConfig, cosine_factor
from influencespace.models.trajectory import Rule, Trajectory, batch_loss

MEANINGS, INPUT, OUTPUT = 12, 16, 12
rules = pytest.mark.parametrize("rule", ["adamw", "sgd"])


def embeddings(n: int, seed: int) -> Inputs:
    """Unit embeddings of n images and their captions in one space: the same meanings through a fixed map, with noise."""
    place = np.random.default_rng(12345).normal(size=(MEANINGS, INPUT))
    generator = np.random.default_rng(seed)
    meaning = generator.normal(size=(n, MEANINGS)) @ place
    images, texts = (meaning + 0.3 * generator.normal(size=(n, INPUT)) for _ in range(2))
    return F.normalize(torch.from_numpy(images), dim=-1), F.normalize(torch.from_numpy(texts), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A pool of which a third has the captions of other images, a clean target, and how a proxy is trained."""

    pairs: int = 60
    batch_size: int = 12
    steps: int = 30
    learning_rate: float = 0.02
    seed: int = 0

    @cached_property
    def wrong(self) -> BoolArray:
        wrong: BoolArray = np.random.default_rng(self.seed).permutation(self.pairs) < self.pairs // 3
        return wrong

    @cached_property
    def pool(self) -> Inputs:
        images, texts = embeddings(self.pairs, self.seed + 100)
        rows = np.flatnonzero(self.wrong)
        texts[rows] = texts[np.roll(rows, 1)]
        return images, texts

    @cached_property
    def target(self) -> Inputs:
        return embeddings(64, self.seed + 200)

    def inputs(self, rows: IntArray) -> Inputs:
        return self.pool[0][rows], self.pool[1][rows]

    @cached_property
    def trajectory(self) -> Trajectory:
        config = HeadsConfig(
            dimension=OUTPUT,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.1,
            temperature=0.3,
        )
        ones, images = np.ones(self.pairs), np.arange(self.pairs)
        space = Space(initial_heads(INPUT, INPUT, OUTPUT, 0).double())
        return Trajectory(
            space=space,
            initial=space.flatten(space.parameters),
            config=config,
            batches=list(training_batches(ones, images, self.batch_size, self.steps, seed=self.seed)),
            inputs=self.inputs,
            objective=config.objective,
        )

    def target_loss(self, theta: Tensor) -> Tensor:
        path = self.trajectory
        return batch_loss(path.space, theta, self.target, path.objective)


def weighted(path: Trajectory, weights: FloatArray) -> Trajectory:
    by_row = torch.from_numpy(weights)
    return replace(path, weights=lambda rows: by_row[rows])


def descended(world: Planted, descent: Descent, rounds: int) -> Descent:
    for _ in range(rounds):
        path = weighted(world.trajectory, descent.weights)
        descent = round_of(descent, path, grad(world.target_loss))
    return descent


SMALL = Planted(pairs=20, batch_size=6, steps=9)
UNEQUAL: FloatArray = np.random.default_rng(5).uniform(0.3, 1.8, SMALL.pairs)


def trained_by_torch(rule: Rule, weights: FloatArray) -> Tensor:
    """Parameters after training by torch.optim on the same batches, each pair weighted: (p,)."""
    path, heads = SMALL.trajectory, initial_heads(INPUT, INPUT, OUTPUT, 0).double()
    make = torch.optim.SGD if rule == "sgd" else torch.optim.AdamW
    config = path.config
    optimizer = make(heads.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    for index, rows in enumerate(path.batches):
        optimizer.param_groups[0]["lr"] = config.learning_rate * cosine_factor(index, config.steps)
        optimizer.zero_grad()
        u, t = heads(*SMALL.inputs(rows))
        loss = path.objective.weighted_loss(u, t, torch.from_numpy(weights[rows]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in heads.parameters()])


def gradients(path: Trajectory) -> FloatArray:
    return weight_gradients(path, grad(SMALL.target_loss)(path.final), SMALL.pairs)


@rules
def test_the_replay_of_a_weighted_path_is_the_weighted_training(rule: Rule) -> None:
    path = weighted(replace(SMALL.trajectory, rule=rule), UNEQUAL)
    torch.testing.assert_close(path.final, trained_by_torch(rule, UNEQUAL), rtol=0, atol=1e-10)


@rules
def test_the_gradients_are_those_of_retraining_with_other_weights(rule: Rule) -> None:
    """Central differences over whole trainings by torch.optim, whose weights differ from pair to pair."""
    found, h = gradients(weighted(replace(SMALL.trajectory, rule=rule), UNEQUAL)), 1e-5
    for pair in range(SMALL.pairs):
        nudge = h * np.eye(SMALL.pairs)[pair]
        less, more = (
            float(SMALL.target_loss(trained_by_torch(rule, UNEQUAL + by))) for by in (-nudge, nudge)
        )
        assert found[pair] == pytest.approx((more - less) / (2 * h), rel=1e-4, abs=1e-8)
    assert np.abs(found).max() > 1e-3


def test_without_weights_the_gradients_are_at_weights_of_one() -> None:
    path = SMALL.trajectory
    np.testing.assert_allclose(
        gradients(path), gradients(weighted(path, np.ones(SMALL.pairs))), rtol=1e-9, atol=1e-14
    )


def test_a_pair_in_no_batch_has_no_gradient_and_no_vote() -> None:
    path = replace(SMALL.trajectory, batches=SMALL.trajectory.batches[:2])
    seen = np.isin(np.arange(SMALL.pairs), np.concatenate(path.batches))
    assert 0 < seen.sum() < SMALL.pairs
    np.testing.assert_array_equal(gradients(path) != 0, seen)
    after = round_of(Descent.begin(SMALL.pairs), path, grad(SMALL.target_loss))
    np.testing.assert_array_equal(np.abs(after.votes), seen)
    np.testing.assert_array_equal(after.score != 0, seen)


def test_a_round_votes_against_the_gradient() -> None:
    before = Descent(np.arange(20.0) - 10, np.linspace(1, -1, 20))
    path = weighted(SMALL.trajectory, before.weights)
    after = round_of(before, path, grad(SMALL.target_loss))
    np.testing.assert_array_equal(after.votes - before.votes, -np.sign(gradients(path)))
    np.testing.assert_allclose(after.total - before.total, -gradients(path))


def test_weights_are_one_and_a_fifth_a_vote_within_their_limits() -> None:
    descent = Descent(np.array([-9.0, -1, 0, 2, 9]), np.zeros(5))
    np.testing.assert_allclose(descent.weights, [MIN_WEIGHT, 0.8, 1, 1.4, MAX_WEIGHT])


def test_the_score_is_the_votes_and_the_total_decides_among_equals() -> None:
    descent = Descent(np.array([2.0, 1, 1, 1, 0]), np.array([-50.0, 3, 50, -3, 50]))
    np.testing.assert_array_equal(np.argsort(-descent.score), [0, 2, 1, 3, 4])
    np.testing.assert_array_equal(Descent.begin(3).score, np.zeros(3))


def auroc(score: FloatArray, good: BoolArray) -> float:
    return float((score[good][:, None] > score[~good]).mean())


@pytest.mark.parametrize("seed", range(3))
def test_wrong_captions_end_with_lower_scores_and_the_target_loss_falls(seed: int) -> None:
    world = Planted(seed=seed)
    descent = descended(world, Descent.begin(world.pairs), 3)
    assert auroc(descent.score, ~world.wrong) > 0.8
    losses = [
        float(world.target_loss(weighted(world.trajectory, w).final))
        for w in (np.ones(world.pairs), descent.weights)
    ]
    assert losses[1] < losses[0]


def test_a_saved_descent_continues_as_if_it_had_never_stopped() -> None:
    file = io.BytesIO()
    halfway = descended(SMALL, Descent.begin(SMALL.pairs), 2)
    np.savez(file, votes=halfway.votes, total=halfway.total)
    file.seek(0)
    loaded = Descent(**np.load(file))
    found, straight = descended(SMALL, loaded, 2), descended(SMALL, Descent.begin(SMALL.pairs), 4)
    np.testing.assert_array_equal(found.votes, straight.votes)
    np.testing.assert_array_equal(found.total, straight.total)
