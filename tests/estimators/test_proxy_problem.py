"""The problem made from embeddings alone is the trainer's own proxy, and every estimator of the table can score it."""

import numpy as np
import pytest
import torch
from problems import INPUT, OUTPUT, Small

from influencespace.core.metrics import auroc
from influencespace.errors import InputError
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch, damping_of, floored
from influencespace.estimators.problem import scores
from influencespace.estimators.proxy_problem import batch_of, proxy_problem
from influencespace.estimators.table import TABLE
from influencespace.models.heads import initial_heads
from influencespace.models.training import train_heads

SMALL = Small(pairs=64, steps=60)
POOL = NegativeBatch(inputs=SMALL.pool, image=np.arange(SMALL.pairs))
TARGET = NegativeBatch(inputs=SMALL.target, image=np.arange(SMALL.targets))
PROBLEM = proxy_problem(POOL, TARGET, SMALL.config, seed=3)


def test_the_proxy_is_the_trainers() -> None:
    heads = initial_heads(INPUT, INPUT, OUTPUT, 3).double()
    trained = train_heads(SMALL.rows, SMALL.batches(np.ones(SMALL.pairs), 3), heads, SMALL.config)
    found = PROBLEM.space.parameters
    for name, value in trained.heads.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(PROBLEM.preconditioner, floored(trained.preconditioner), rtol=1e-6, atol=1e-12)
    # torch's schedule reports each rate before its step
    expected = damping_of(CurvatureConfig(), trained.sum_of_learning_rates, SMALL.config.weight_decay)
    assert PROBLEM.damping == pytest.approx(expected, rel=1e-9)


def test_bank_and_target_are_recorded_pairs() -> None:
    assert [len(recorded.image) for recorded in PROBLEM.bank] == [SMALL.batch_size - 1] * 4
    for recorded in PROBLEM.bank:
        torch.testing.assert_close(recorded.inputs[1], SMALL.rows(recorded.image)[1])
    seen = np.concatenate([recorded.image for recorded in PROBLEM.target])
    assert sorted(seen) == list(range(SMALL.targets))


@pytest.mark.parametrize("name", TABLE)
def test_every_estimator_scores_it(name: str) -> None:
    found = scores(TABLE[name](), PROBLEM, [batch_of(POOL)])
    assert np.isfinite(found).all()
    parts = [batch_of(POOL, rows) for rows in np.split(np.arange(SMALL.pairs), [5, 40])]
    np.testing.assert_allclose(
        scores(TABLE[name](), PROBLEM, parts), found, rtol=1e-6, atol=1e-9 * found.std()
    )
    if name in ("ecif", "unrolled", "tracin"):
        assert auroc(-found, SMALL.wrong) > 0.7


def test_plain_gradient_descent_has_no_preconditioner() -> None:
    problem = proxy_problem(POOL, TARGET, SMALL.config, rule="sgd")
    assert (problem.preconditioner == 1).all()
    assert problem.trajectory is not None
    assert problem.trajectory.rule == "sgd"


def test_weights_say_how_often_a_pair_is_met() -> None:
    def met(weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        problem = proxy_problem(POOL, TARGET, SMALL.config, weights=weights, seed=3)
        assert problem.trajectory is not None
        in_bank = np.concatenate([recorded.image for recorded in problem.bank])
        in_batches = np.concatenate(problem.trajectory.batches)
        return in_batches, np.bincount(in_bank, minlength=SMALL.pairs)

    for found, expected in zip(met(np.ones(SMALL.pairs)), met(None)):
        np.testing.assert_array_equal(found, expected)
    weights = np.repeat([0.0, 1.0, 3.0, 0.0], SMALL.pairs // 4)
    batches, in_bank = met(weights)
    count = np.bincount(batches, minlength=SMALL.pairs)
    assert (count[weights == 0] == 0).all()
    assert (in_bank[weights == 0] == 0).all()
    assert in_bank[weights == 3].sum() > 0
    assert count[weights == 3].sum() / count[weights == 1].sum() == pytest.approx(3, rel=0.3)


def test_a_pool_without_a_bank_is_reported() -> None:
    few = NegativeBatch(inputs=SMALL.rows(np.arange(6)), image=np.array([0, 0, 1, 1, 2, 2]))
    with pytest.raises(InputError, match="the pool has 3 image"):
        proxy_problem(few, TARGET, SMALL.config)
    with pytest.raises(InputError, match="the pool has 2 image"):
        proxy_problem(POOL, TARGET, SMALL.config, weights=(np.arange(SMALL.pairs) < 2).astype(float))
