"""The gradient dot product against per-sample gradients, in float64."""

import laws
import numpy as np

from influencespace.core.metrics import auroc
from influencespace.estimators.grad_dot import GradDot
from influencespace.estimators.problem import scores


def test_it_is_the_inner_product_of_the_gradients() -> None:
    found = scores(GradDot(), laws.SMALL.problem, laws.WHOLE)
    truth = laws.dense_gradients(laws.SMALL.problem, laws.WHOLE[0]) @ laws.SMALL.problem.target_gradient
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-10)


def test_wrong_captions_score_low() -> None:
    assert auroc(-scores(GradDot(), laws.SMALL.problem, laws.WHOLE), laws.SMALL.wrong) > 0.6
