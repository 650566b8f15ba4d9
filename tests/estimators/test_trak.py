"""TRAK against autograd of the margin and a dense kernel, in float64."""

import copy
import math

import laws
import numpy as np
import pytest
import torch
from torch import Tensor

from influencespace.core.contrastive import InfoNce, pair_logits
from influencespace.estimators.problem import scores
from influencespace.estimators.trak import Trak, margins
from influencespace.models.projected import reduced_space

PROBLEM = laws.SMALL.problem


def loop() -> tuple[Tensor, Tensor]:
    """Margin gradients (n, p) and weights 1 - p (n,), pair by pair, with sums of exponentials as they are defined."""
    proxy = copy.deepcopy(PROBLEM.space.proxy).requires_grad_(True)
    images, texts = laws.SMALL.pool
    rows, weights = [], []
    for z in range(laws.SMALL.pairs):
        values, wrong = [], []
        for recorded in PROBLEM.bank:
            if z in recorded.image:
                continue
            u, t = proxy(images[z : z + 1], texts[z : z + 1])
            cu, ct = proxy(*recorded.inputs)
            r = (PROBLEM.batch_size - 1) / len(cu)
            own = PROBLEM.objective.scale * u[0] @ t[0]
            for others in (ct @ u[0], cu @ t[0]):
                odds = own.exp() / (r * (PROBLEM.objective.scale * others).exp().sum())
                values.append(odds.log())
                wrong.append(float(1 / (1 + odds.detach())))
        g = torch.autograd.grad(torch.stack(values).mean(), list(proxy.parameters()))
        rows.append(torch.cat([part.flatten() for part in g]))
        weights.append(np.mean(wrong))
    return torch.stack(rows), torch.tensor(weights)


PHI, WEIGHTS = loop()


@pytest.mark.parametrize("dimension", [6, 256])
def test_it_is_the_dense_kernel_between_the_features(dimension: int) -> None:
    matrix = laws.projection_matrix(reduced_space(PROBLEM.space, dimension, PROBLEM.seed))
    phi, target = PHI @ matrix, PROBLEM.target_gradient @ matrix
    kernel = phi.T @ phi
    ridge = 0.05 * kernel.diagonal().mean()
    inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=torch.float64))
    truth = -WEIGHTS * (phi @ inverse @ target)
    found = scores(Trak(dimension=dimension, relative_ridge=0.05), PROBLEM, laws.WHOLE)
    np.testing.assert_allclose(found, truth, rtol=1e-7, atol=1e-9)


def test_the_loss_is_the_softplus_of_minus_the_margin() -> None:
    """So that its gradient is the margin's, weighted by the probability of a wrong match."""
    images, texts = laws.SMALL.pool
    with torch.no_grad():
        u, t = PROBLEM.space.proxy(images, texts)
        cu, ct = PROBLEM.space.proxy(*PROBLEM.bank[0].inputs)
    logits = pair_logits(u, t, cu, ct, PROBLEM.objective.scale)
    found = torch.nn.functional.softplus(-margins(logits, 2.5)).mean(0)
    torch.testing.assert_close(found, InfoNce(1.0).own_loss(logits, 2.5))


def test_a_margin_of_equals_is_the_number_of_negatives() -> None:
    same = torch.nn.functional.normalize(torch.ones(4, 3, dtype=torch.float64), dim=-1)
    found = margins(pair_logits(same, same, same, same, 7.0), factor=3.0)
    np.testing.assert_allclose(found, -math.log(12))
