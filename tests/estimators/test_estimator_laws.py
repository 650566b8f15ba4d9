"""Laws over the table of estimators: sign by real retraining, any partition, any order, one seed, linear in the target.

Each estimator is there by its defaults, and once more where its options lead through other code.
"""

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Small

from influencespace.core.metrics import auroc
from influencespace.errors import InputError
from influencespace.estimators.datainf import DataInf
from influencespace.estimators.ecif import Ecif
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.less import Less
from influencespace.estimators.norm_sim import NormSim
from influencespace.estimators.problem import Estimator, Fold, Scorer, fitted, scores
from influencespace.estimators.self_influence import SelfInfluence
from influencespace.estimators.table import TABLE
from influencespace.estimators.trak import Trak
from influencespace.models.trajectory import space_at

SMALL = Small()
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    **TABLE,
    "datainf projected": partial(DataInf, dimension=6),
    "trak projected": partial(Trak, dimension=6),
    "less projected": partial(Less, dimension=24),
    "self_influence projected": partial(SelfInfluence, dimension=6),
    "norm_sim both": partial(NormSim, side="both"),
}
BLIND = {"random", "norm_sim", "norm_sim both"}  # to whether image and caption belong together
BLIND_TO_TARGET = {"random", "norm_sim", "el2n", "clip_score", "neg_clip_loss", "self_influence"}  # its loss
BY_BANK = set(TABLE) - {"random", "norm_sim", "clip_score", "unrolled"}  # judged by negative batches
LINEAR = {"nystrom", "ecif", "ekfac", "grad_dot", "datainf", "tracin", "unrolled"}  # in the target's gradient
PARTITIONS = [[96], [1, 95], [13, 40, 43], [48, 48], [16] * 6, [0, 95, 1]]

everything = pytest.mark.parametrize("name", ESTIMATORS)


@pytest.fixture(scope="module")
def found() -> dict[str, np.ndarray]:
    """Scores of the pool in one batch."""
    return {name: scores(make(), SMALL.problem, SMALL.cut()) for name, make in ESTIMATORS.items()}


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
    sizes = data.draw(st.sampled_from(PARTITIONS))
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(SMALL.pairs)
    again = np.empty(SMALL.pairs)
    again[order] = scores(ESTIMATORS[name](), SMALL.problem, SMALL.cut(sizes, order))
    np.testing.assert_allclose(again, found[name], rtol=0, atol=1e-8 * found[name].std())


@everything
def test_passes_merge_and_scorers_travel(name: str, found: dict[str, np.ndarray]) -> None:
    """Any split of the pool, merged either way round and with the empty statistic, gives the statistic of the whole."""
    whole, passes = SMALL.cut()[0], []

    def run(fold: Fold) -> Any:
        passes.append(fold)
        state = fold.observe(fold.zero(), whole)
        for sizes in PARTITIONS[:3]:
            chunks = [fold.observe(fold.zero(), batch) for batch in SMALL.cut(sizes)]
            for ordered in (chunks, chunks[::-1]):
                count, total = reduce(fold.merge, ordered, fold.zero())
                assert count == state[0] == SMALL.pairs
                tolerance = 1e-9 * float(state[1].abs().max())
                torch.testing.assert_close(total, state[1], rtol=1e-9, atol=tolerance)
        return state

    scorer: Scorer = pickle.loads(pickle.dumps(fitted(ESTIMATORS[name]().fit(SMALL.problem), run)))
    np.testing.assert_allclose(scorer(whole), found[name], rtol=1e-12)
    assert len(passes) == {"datainf": 2, "trak": 1}.get(name.split()[0], 0)


@pytest.mark.parametrize("name", sorted(BY_BANK))
def test_a_pair_whose_image_every_negative_batch_holds_has_no_score(name: str) -> None:
    (whole,) = SMALL.cut()
    image = np.where(whole.row == 5, -7, whole.image)
    bank = [replace(batch, image=np.append(batch.image, -7)) for batch in SMALL.problem.bank]
    problem, good = replace(SMALL.problem, bank=bank), np.delete(np.arange(SMALL.pairs), 5)
    lost = scores(ESTIMATORS[name](), problem, [replace(whole, image=image)])
    assert np.isnan(lost[5])
    alone = scores(ESTIMATORS[name](), problem, SMALL.cut(None, good))
    np.testing.assert_allclose(lost[good], alone, rtol=1e-9, atol=1e-9 * np.abs(alone).max())


@everything
def test_the_same_seed_gives_the_same_scores(name: str, found: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(scores(ESTIMATORS[name](), SMALL.problem, SMALL.cut()), found[name])


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - BLIND))
def test_wrong_captions_score_low(name: str, found: dict[str, np.ndarray]) -> None:
    assert auroc(-found[name], SMALL.wrong) > 0.6


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - BLIND))
def test_the_sign_by_real_retraining(name: str, found: dict[str, np.ndarray]) -> None:
    """Without the quarter that scores lowest a proxy has a lower target loss than without the quarter that scores highest."""
    order = np.argsort(found[name])
    quarter = SMALL.pairs // 4

    def loss(dropped: np.ndarray) -> float:
        weights = np.ones(SMALL.pairs)
        weights[dropped] = 0
        return float(np.mean([SMALL.target_loss(SMALL.train(weights, seed)) for seed in (0, 1)]))

    assert loss(order[:quarter]) < loss(order[-quarter:])


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_scores_are_linear_in_the_target(name: str, found: dict[str, np.ndarray]) -> None:
    """The score for two halves of the target, each with its own negatives, is the mean of the scores for either."""
    half = SMALL.targets // 2
    rows = (torch.arange(half), torch.arange(half, SMALL.targets))
    parts = [NegativeBatch(inputs=(SMALL.target[0][r], SMALL.target[1][r]), image=r.numpy()) for r in rows]

    def score(target: list[NegativeBatch]) -> np.ndarray:
        return scores(ESTIMATORS[name](), replace(SMALL.problem, target=target), SMALL.cut())

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
    found = scores(ESTIMATORS[name](), SMALL.problem, [replace(whole, inputs=(bad, texts))])
    assert np.isnan(found[3]) == (not np.isfinite(value))
    alone = scores(ESTIMATORS[name](), SMALL.problem, SMALL.cut(None, np.array(good)))
    # a zero is still a pair: it counts in the passes of trak and datainf
    tolerance = 0.05 if value == 0 else 1e-9
    np.testing.assert_allclose(found[good], alone, rtol=tolerance, atol=tolerance * np.abs(alone).max())


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"random"}))
def test_a_target_of_one_pair_is_an_error_for_people(name: str) -> None:
    one = NegativeBatch(inputs=(SMALL.target[0][:1], SMALL.target[1][:1]), image=np.arange(1))
    if name in BLIND_TO_TARGET:
        assert np.isfinite(
            scores(ESTIMATORS[name](), replace(SMALL.problem, target=[one]), SMALL.cut())
        ).all()
        return
    with pytest.raises(InputError, match="the target has 1 pair"):
        scores(ESTIMATORS[name](), replace(SMALL.problem, target=[one]), SMALL.cut())


def test_parameters_that_are_not_finite_are_an_error_for_people() -> None:
    theta = SMALL.problem.space.flatten(SMALL.problem.space.parameters).clone()
    theta[0] = torch.nan
    broken = replace(SMALL.problem, space=space_at(SMALL.problem.space, theta))
    with pytest.raises(InputError, match="gradient of the target loss is not finite"):
        scores(Ecif(), broken, SMALL.cut())
