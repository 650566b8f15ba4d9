"""Laws over the table of estimators: sign by real retraining, any partition, any order, one seed, linear in the target."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Small

from influencespace.core.metrics import auroc
from influencespace.errors import InputError
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.problem import scores
from influencespace.estimators.table import TABLE
from influencespace.models.trajectory import space_at

SMALL = Small()
BLIND = {"random", "norm_sim"}  # neither sees whether image and caption belong together
BLIND_TO_TARGET = {
    "random",
    "norm_sim",
    "el2n",
    "clip_score",
    "neg_clip_loss",
    "self_influence",
}  # to its loss
GRADIENTS = {
    "nystrom",
    "ecif",
    "ekfac",
    "grad_dot",
    "datainf",
    "tracin",
    "unrolled",
}  # linear in the target's gradient

everything = pytest.mark.parametrize("name", TABLE)


@pytest.fixture(scope="module")
def found() -> dict[str, np.ndarray]:
    """Scores of the pool in one batch."""
    return {name: scores(estimator(), SMALL.problem, SMALL.cut()) for name, estimator in TABLE.items()}


@everything
def test_every_pair_has_a_finite_score(name: str, found: dict[str, np.ndarray]) -> None:
    assert found[name].shape == (SMALL.pairs,)
    assert np.isfinite(found[name]).all()
    assert found[name].std() > 0


@everything
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_any_partition_and_any_order_give_the_same_scores(
    name: str, found: dict[str, np.ndarray], data: st.DataObject
) -> None:
    sizes = data.draw(st.sampled_from([[96], [1, 95], [13, 40, 43], [48, 48], [16] * 6]))
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(SMALL.pairs)
    again = np.empty(SMALL.pairs)
    again[order] = scores(TABLE[name](), SMALL.problem, SMALL.cut(sizes, order))
    np.testing.assert_allclose(again, found[name], rtol=0, atol=1e-8 * found[name].std())


@everything
def test_the_same_seed_gives_the_same_scores(name: str, found: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(scores(TABLE[name](), SMALL.problem, SMALL.cut()), found[name])


@pytest.mark.parametrize("name", sorted(set(TABLE) - BLIND))
def test_wrong_captions_score_low(name: str, found: dict[str, np.ndarray]) -> None:
    assert auroc(-found[name], SMALL.wrong) > 0.6


@pytest.mark.parametrize("name", sorted(set(TABLE) - BLIND))
def test_the_sign_by_real_retraining(name: str, found: dict[str, np.ndarray]) -> None:
    """Without the quarter that scores lowest a proxy has a lower target loss than without the quarter that scores highest."""
    order = np.argsort(found[name])
    quarter = SMALL.pairs // 4

    def loss(dropped: np.ndarray) -> float:
        weights = np.ones(SMALL.pairs)
        weights[dropped] = 0
        return float(np.mean([SMALL.target_loss(SMALL.train(weights, seed)) for seed in (0, 1)]))

    assert loss(order[:quarter]) < loss(order[-quarter:])


@pytest.mark.parametrize("name", sorted(GRADIENTS & set(TABLE)))
def test_scores_are_linear_in_the_target(name: str, found: dict[str, np.ndarray]) -> None:
    """The score for two halves of the target, each with its own negatives, is the mean of the scores for either."""
    half = SMALL.targets // 2
    rows = (torch.arange(half), torch.arange(half, SMALL.targets))
    parts = [NegativeBatch(inputs=(SMALL.target[0][r], SMALL.target[1][r]), image=r.numpy()) for r in rows]

    def score(target: list[NegativeBatch]) -> np.ndarray:
        return scores(TABLE[name](), replace(SMALL.problem, target=target), SMALL.cut())

    apart = (score(parts[:1]) + score(parts[1:])) / 2
    # conjugate gradients stop at a relative residual of a thousandth
    np.testing.assert_allclose(score(parts), apart, atol=5e-3 * apart.std())


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("name", sorted(set(TABLE) - {"unrolled", "random"}))
def test_a_bad_pair_has_no_score_and_harms_no_other(name: str, value: float) -> None:
    """A pair whose picture has embedding nan, infinity or zero. (Unrolled scores trained pairs, random reads nothing.)"""
    images, texts = SMALL.pool
    bad = images.clone()
    bad[3] = value
    (whole,) = SMALL.cut()
    good = [i for i in range(SMALL.pairs) if i != 3]
    found = scores(TABLE[name](), SMALL.problem, [replace(whole, inputs=(bad, texts))])
    assert np.isnan(found[3]) == (not np.isfinite(value))
    alone = scores(TABLE[name](), SMALL.problem, SMALL.cut(None, np.array(good)))
    # a zero is still a pair: it counts in the passes of trak and datainf
    tolerance = 0.05 if value == 0 else 1e-9
    np.testing.assert_allclose(found[good], alone, rtol=tolerance, atol=tolerance * np.abs(alone).max())


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"random"}))
def test_a_target_of_one_pair_is_an_error_for_people(name: str) -> None:
    one = NegativeBatch(inputs=(SMALL.target[0][:1], SMALL.target[1][:1]), image=np.arange(1))
    if name in BLIND_TO_TARGET:
        assert np.isfinite(scores(TABLE[name](), replace(SMALL.problem, target=[one]), SMALL.cut())).all()
        return
    with pytest.raises(InputError, match="the target has 1 pair"):
        scores(TABLE[name](), replace(SMALL.problem, target=[one]), SMALL.cut())


def test_parameters_that_are_not_finite_are_an_error_for_people() -> None:
    theta = SMALL.problem.space.flatten(SMALL.problem.space.parameters).clone()
    theta[0] = torch.nan
    broken = replace(SMALL.problem, space=space_at(SMALL.problem.space, theta))
    with pytest.raises(InputError, match="gradient of the target loss is not finite"):
        scores(TABLE["ecif"](), broken, SMALL.cut())
