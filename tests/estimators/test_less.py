"""LESS against dense per-sample gradients at every checkpoint, in float64."""

from dataclasses import replace

import laws
import numpy as np
import torch
from torch import Tensor

from influencespace.estimators.less import Less, projection_rows
from influencespace.estimators.problem import Problem, scores

PROBLEM = laws.SMALL.problem
END = replace(PROBLEM, checkpoints=())


def cosines(problem: Problem) -> Tensor:
    g = laws.dense_gradients(problem, laws.WHOLE[0]) / problem.preconditioner
    return torch.nn.functional.cosine_similarity(g, problem.target_gradient[None], dim=1)


def test_it_is_the_cosine_with_adams_step() -> None:
    np.testing.assert_allclose(scores(Less(), END, laws.WHOLE), cosines(END), rtol=1e-8, atol=1e-9)


def test_checkpoints_count_by_their_learning_rate() -> None:
    kept = [PROBLEM.checkpoints[i] for i in (0, 2, 3, 5)]
    parts = [cosines(replace(PROBLEM, space=checkpoint.load())) for checkpoint in kept]
    rates = [checkpoint.learning_rate for checkpoint in kept]
    truth = sum(rate * part for rate, part in zip(rates, parts, strict=True)) / sum(rates)
    np.testing.assert_allclose(scores(Less(), PROBLEM, laws.WHOLE), truth, rtol=1e-8, atol=1e-9)


def test_one_checkpoint_is_the_last() -> None:
    last = replace(PROBLEM, space=PROBLEM.checkpoints[-1].load())
    np.testing.assert_allclose(scores(Less(checkpoints=1), PROBLEM, laws.WHOLE), cosines(last), atol=1e-9)


def test_few_directions_estimate_the_norm() -> None:
    """The relative error of the score is that of the norm, about 1 / sqrt(2 dimension)."""
    found = scores(Less(dimension=24), END, laws.WHOLE)
    error = np.abs(found / cosines(END).numpy() - 1)
    assert error.mean() < 2 / np.sqrt(48)
    assert np.corrcoef(found, cosines(END))[0, 1] > 0.95


def test_directions_keep_norms_in_expectation() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = [float((projection_rows(50, 8, seed) @ x).square().sum()) for seed in range(400)]
    assert abs(np.mean(squares) / float(x @ x) - 1) < 4 * np.sqrt(2 / 8 / 400)
