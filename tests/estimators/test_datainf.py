"""DataInf against the paper's double sum and against its mean of inverse matrices, in float64."""

from functools import cache

import laws
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from influencespace.core.contrastive import Pointwise, cross_entropy
from influencespace.estimators.datainf import DataInf
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.problem import Problem, scores
from influencespace.estimators.proxy_problem import batch_of, proxy_problem
from influencespace.models.predictor import Predictor
from influencespace.models.projected import reduced_space
from influencespace.models.training import HeadsConfig

PROBLEM = laws.SMALL.problem
GRADIENTS = laws.dense_gradients(PROBLEM, laws.WHOLE[0])


def blocks(dimension: int) -> list[tuple[Tensor, Tensor, int]]:
    """(g_l (n, k_l), v_l (k_l,), d_l) of each block, projected."""
    reduced = reduced_space(PROBLEM.space, dimension, PROBLEM.seed)
    matrix = laws.projection_matrix(reduced)
    g = torch.split(GRADIENTS @ matrix, reduced.sizes, 1)
    v = torch.split(PROBLEM.target_gradient @ matrix, reduced.sizes)
    return list(zip(g, v, reduced.original_sizes, strict=True))


def as_printed(dimension: int) -> Tensor:
    """I(k) of equation 5 by loops over blocks and pairs: larger is harmful. Its last term is of whole gradients."""
    total = torch.zeros(len(GRADIENTS), dtype=torch.float64)
    for (g, v, size), (whole, target, _) in zip(blocks(dimension), blocks(256), strict=True):
        n = len(g)
        lam = 0.1 * sum(float(row @ row) for row in g) / (n * size)
        L = g @ g.T
        for k in range(n):
            inner = sum(float((v @ g[i]) * L[i, k] / (lam + L[i, i])) for i in range(n)) / n
            total[k] += (inner - float(target @ whole[k])) / lam
    return total


@pytest.mark.parametrize("dimension", [6, 256])
def test_it_is_the_negative_of_the_papers_sum(dimension: int) -> None:
    """With a sum over projected gradients, and over whole ones where they are small."""
    found = scores(DataInf(dimension=dimension), PROBLEM, laws.WHOLE)
    np.testing.assert_allclose(found, -as_printed(dimension), rtol=1e-7, atol=1e-7)


def test_it_is_the_mean_of_inverse_matrices() -> None:
    total = torch.zeros(len(GRADIENTS), dtype=torch.float64)
    for g, v, size in blocks(256):
        lam = 0.1 * g.square().sum() / (len(g) * size)
        eye = torch.eye(len(v), dtype=torch.float64)
        inverse = torch.stack([torch.linalg.inv(torch.outer(row, row) + lam * eye) for row in g]).mean(0)
        total += g @ inverse @ v
    found = scores(DataInf(), PROBLEM, laws.WHOLE)
    np.testing.assert_allclose(found, total, rtol=1e-6, atol=1e-6)


def test_large_damping_is_the_gradient_dot_product() -> None:
    found = scores(DataInf(relative_damping=1e6), PROBLEM, laws.WHOLE)
    lam = [1e6 * float(g.square().sum()) / (len(g) * size) for g, _, size in blocks(256)]
    truth = sum(g @ v / by for (g, v, _), by in zip(blocks(256), lam, strict=True))
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))


@cache
def wide() -> tuple[Problem, NegativeBatch]:
    """A classifier of one block with five times more parameters than it is projected to."""
    torch.manual_seed(0)
    rule = torch.randn(64, 10, dtype=torch.float64)
    x = torch.randn(240, 64, dtype=torch.float64)
    y = torch.nn.functional.one_hot((x @ rule).argmax(1), 10).double()
    pool, target = (
        NegativeBatch(inputs=(x[rows], y[rows]), image=np.arange(len(x[rows])))
        for rows in (slice(0, 200), slice(200, 240))
    )
    proxy = Predictor(torch.nn.Linear(64, 10, bias=False))
    config = HeadsConfig(steps=60, batch_size=20, learning_rate=0.1)
    loss = Pointwise(cross_entropy)
    return proxy_problem(pool, target, config, proxy=proxy, objective=loss, rule="sgd"), pool


def test_projecting_hardly_changes_the_scores() -> None:
    problem, pool = wide()
    found, truth = (scores(DataInf(dimension=k), problem, [batch_of(pool)]) for k in (128, 640))
    assert spearmanr(found, truth).statistic > 0.99
