"""The table under SigLIP's loss, by the laws that it keeps under InfoNCE."""

import numpy as np
import pytest
import torch
from problems import Small

from influencespace.core.contrastive import Sigmoid
from influencespace.core.metrics import auroc
from influencespace.errors import InputError
from influencespace.estimators.influence import InfluenceScorer
from influencespace.estimators.problem import per_sample_gradients, scores
from influencespace.estimators.table import TABLE
from influencespace.estimators.unrolled import Unrolled
from influencespace.models.heads import initial_heads
from influencespace.models.training import train_heads

SMALL = Small(loss="sigmoid", temperature=0.1)
INFO_NCE_ONLY = {"ekfac", "trak", "el2n"}
# diff_in, which leaves the first order of an influence out, tells wrong captions from others by no more than chance here
ABLE = sorted(set(TABLE) - INFO_NCE_ONLY - {"random", "norm_sim", "diff_in"})


def test_the_problem_has_the_loss_of_its_proxy() -> None:
    assert SMALL.problem.objective == Sigmoid(scale=10.0, bias=-10.0)


@pytest.mark.parametrize("name", ABLE)
def test_wrong_captions_score_low_by_real_retraining(name: str) -> None:
    found = scores(TABLE[name](), SMALL.problem, SMALL.cut())
    assert np.isfinite(found).all()
    assert auroc(-found, SMALL.wrong) > 0.6
    order, quarter = np.argsort(found), SMALL.pairs // 4

    def loss(dropped: np.ndarray) -> float:
        weights = np.ones(SMALL.pairs)
        weights[dropped] = 0
        return float(np.mean([SMALL.target_loss(SMALL.train(weights, seed)) for seed in (0, 1)]))

    assert loss(order[:quarter]) < loss(order[-quarter:])


@pytest.mark.parametrize("name", ABLE)
def test_any_partition_gives_the_same_scores(name: str) -> None:
    whole = scores(TABLE[name](), SMALL.problem, SMALL.cut())
    order = np.random.default_rng(0).permutation(SMALL.pairs)
    again = np.empty(SMALL.pairs)
    again[order] = scores(TABLE[name](), SMALL.problem, SMALL.cut([13, 40, 43], order))
    np.testing.assert_allclose(again, whole, rtol=0, atol=1e-8 * whole.std())


@pytest.mark.parametrize("name", sorted(INFO_NCE_ONLY))
def test_what_is_for_info_nce_says_so(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is for the InfoNCE loss and the problem's is sigmoid"):
        scores(TABLE[name](), SMALL.problem, SMALL.cut())


def test_per_sample_gradients_are_the_influences_along_every_direction() -> None:
    problem, (batch,) = SMALL.problem, SMALL.cut()
    eye = torch.eye(problem.space.size, dtype=torch.float64)
    scorer = InfluenceScorer(problem.space, eye, problem.bank, problem.objective, problem.batch_size)
    dense = np.nanmean(scorer(batch.inputs, batch.image).by_batch, -1).T
    found = per_sample_gradients(problem, problem.space)(batch.inputs, batch.image)
    np.testing.assert_allclose(found, dense, rtol=1e-9, atol=1e-11)


def test_unrolled_is_leave_one_out_retraining() -> None:
    """Proxies really trained again on the same batches less one pair."""
    small = Small(pairs=40, steps=30, learning_rate=0.01, temperature=0.1, loss="sigmoid")

    def retrained(pair: int) -> float:
        batches = [rows[rows != pair] for rows in small.batches(np.ones(40), 0)]
        heads = initial_heads(6, 6, 4, 0).double()
        return small.target_loss(train_heads(small.rows, batches, heads, small.config).heads)

    whole = retrained(-1)
    truth = np.array([retrained(pair) - whole for pair in range(40)])
    found = scores(Unrolled(form="whole"), small.problem, small.cut())
    assert np.corrcoef(found, truth)[0, 1] > 0.97
    assert 0.8 < np.polyfit(found, truth, 1)[0] < 1.2
