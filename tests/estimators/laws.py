"""What every estimator and every pass must keep, whatever its idea, and per-sample gradients as dense matrices."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from problems import Small
from torch import Tensor

from influencespace.estimators.influence import InfluenceScorer
from influencespace.estimators.problem import Batch, Estimator, Fold, Problem, Scorer, fitted, scores
from influencespace.models.projected import ReducedSpace

SMALL = Small(pairs=48, batch_size=12, steps=40)
WHOLE = SMALL.cut()


def dense_gradients(problem: Problem, batch: Batch) -> Tensor:
    """Centred gradients of F_z (n, p), one forward-mode direction for each parameter; nan where no context judges."""
    eye = torch.eye(problem.space.size, dtype=torch.float64)
    scorer = InfluenceScorer(problem.space, eye, problem.bank, problem.objective, problem.batch_size)
    return torch.from_numpy(np.nanmean(scorer(batch.inputs, batch.image).by_batch, -1).T)


def projection_matrix(reduced: ReducedSpace) -> Tensor:
    """All blocks' projections as one matrix (p, k)."""
    return torch.block_diag(*(torch.kron(projection.A, projection.B) for projection in reduced.projections))


def order_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(SMALL.pairs)


PARTITIONS: list[tuple[Sequence[int], np.ndarray]] = [
    ([SMALL.pairs], order_of(0)),
    ([1, 20, 27], order_of(1)),
    ([7] * 6 + [6], order_of(2)),
    ([0, 47, 1], np.arange(SMALL.pairs)),
]


def fit(estimator: Estimator, problem: Problem) -> tuple[Scorer, list[tuple[Fold, Any]]]:
    """The scorer of a fit over the whole pool in one batch, and each pass with its result."""
    found: list[tuple[Fold, Any]] = []

    def run(fold: Fold) -> Any:
        state = fold.observe(fold.zero(), WHOLE[0])
        found.append((fold, state))
        return state

    return fitted(estimator.fit(problem), run), found


def passes(estimator: Estimator, problem: Problem) -> list[tuple[Fold, Any]]:
    """Each pass of a fit, with its result."""
    return fit(estimator, problem)[1]


def assert_scores_do_not_depend_on_the_partition(estimator: Estimator, tolerance: float = 1e-9) -> None:
    """Neither on how the pool is cut, nor on the order of its pairs, nor on who scores them."""
    whole = scores(estimator, SMALL.problem, WHOLE)
    assert np.isfinite(whole).all()
    for sizes, order in PARTITIONS:
        found = scores(estimator, SMALL.problem, SMALL.cut(sizes, order))
        np.testing.assert_allclose(found, whole[order], rtol=tolerance, atol=tolerance * np.abs(whole).max())
    sent: Scorer = pickle.loads(pickle.dumps(fit(estimator, SMALL.problem)[0]))
    np.testing.assert_allclose(sent(WHOLE[0]), whole, rtol=1e-12)


def assert_passes_merge(estimator: Estimator) -> None:
    """Any split of the pool, merged either way round and with the empty statistic, gives the statistic of the whole."""
    for fold, whole in passes(estimator, SMALL.problem):
        for sizes, order in PARTITIONS:
            parts = [fold.observe(fold.zero(), batch) for batch in SMALL.cut(sizes, order)]
            for ordered in (parts, parts[::-1]):
                total = fold.zero()
                for part in ordered:
                    total = fold.merge(total, part)
                assert total[0] == whole[0] == SMALL.pairs
                torch.testing.assert_close(
                    total[1], whole[1], rtol=1e-9, atol=1e-9 * float(whole[1].abs().max())
                )


def assert_bad_pairs_are_nan_and_harm_no_other(estimator: Estimator) -> None:
    """A pair without finite inputs, and one of an image that every context holds, score nan in a run that goes on."""
    problem, batch = SMALL.problem, WHOLE[0]
    images = batch.inputs[0].clone()
    images[3, 0] = torch.nan
    image = batch.image.copy()
    image[5] = -7
    bank = [replace(context, image=np.append(context.image, -7)) for context in problem.bank]
    bad = replace(batch, inputs=(images, batch.inputs[1]), image=image)
    good = [i for i in range(SMALL.pairs) if i not in (3, 5)]
    problem = replace(problem, bank=bank)
    found = scores(estimator, problem, [bad])
    assert np.isnan(found[3])
    alone = scores(estimator, problem, SMALL.cut(None, np.array(good)))
    np.testing.assert_allclose(found[good], alone, rtol=1e-9, atol=1e-9 * np.abs(alone).max())
    assert np.isnan(found[5])
