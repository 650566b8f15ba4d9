"""Measures against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core import metrics


@given(
    scores=st.lists(st.sampled_from([-np.inf, -1.5, 0.0, 2.0, 1e300, np.inf]), min_size=4, max_size=40),
    flags=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_auroc_and_average_precision_by_their_definitions(scores: list[float], flags: list[bool]) -> None:
    positive, values = np.array(flags[: len(scores)]), np.array(scores)
    if positive.all() or not positive.any():
        return
    pairs = [np.sign(a - b) if a != b else 0 for a in values[positive] for b in values[~positive]]
    assert metrics.auroc(values, positive) == pytest.approx((1 + np.mean(pairs)) / 2)
    precisions = [positive[values >= value].mean() for value in values[positive]]
    assert metrics.average_precision(values, positive) == pytest.approx(np.mean(precisions))


def test_one_class_has_no_auroc() -> None:
    assert np.isnan(metrics.auroc(np.ones(3), np.ones(3, bool)))
    assert np.isnan(metrics.auroc(np.ones(3), np.zeros(3, bool)))
    assert np.isnan(metrics.average_precision(np.ones(3), np.zeros(3, bool)))
    assert metrics.average_precision(np.ones(3), np.ones(3, bool)) == 1


@given(seed=st.integers(0, 1000), block=st.sampled_from([1, 3, 100]))
def test_ranks_are_those_of_a_sort(seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(7, 4, generator=generator, dtype=torch.float64), dim=-1)
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6])
    t = torch.nn.functional.normalize(torch.randn(10, 4, generator=generator, dtype=torch.float64), dim=-1)
    image_ranks, text_ranks = metrics.retrieval_ranks(u, t, image_of_text, block)
    S = u @ t.T
    for j in range(10):
        assert text_ranks[j] == (S[:, j] > S[image_of_text[j], j]).sum()
    for i in range(7):
        own = image_of_text == i
        assert image_ranks[i] == (S[i][~own] > S[i][own].max()).sum()


def test_a_constant_encoder_scores_as_chance_does() -> None:
    u = torch.ones(10, 2) / 2**0.5
    image_ranks, text_ranks = metrics.retrieval_ranks(u, u, torch.arange(10))
    assert (image_ranks == 4.5).all()
    assert (text_ranks == 4.5).all()


@pytest.mark.parametrize("dimension", [64, 256, 768])
def test_equal_similarities_tie_whatever_rounding_does(dimension: int) -> None:
    """One vector for everything; and ten captions that are shared, as names of classes are."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        one = torch.nn.functional.normalize(torch.randn(1, dimension, generator=generator), dim=-1)
        for ranks in metrics.retrieval_ranks(one.expand(301, -1), one.expand(301, -1), torch.arange(301)):
            assert (ranks == 150).all()
        u = torch.nn.functional.normalize(torch.randn(300, dimension, generator=generator), dim=-1)
        names = torch.nn.functional.normalize(torch.randn(10, dimension, generator=generator), dim=-1)
        image_ranks, _ = metrics.retrieval_ranks(u, names.repeat(30, 1), torch.arange(300), 64)
        assert ((image_ranks - 14.5) % 30 == 0).all()  # behind 30 of every better name, and half of its own


@pytest.mark.parametrize("side", ["images", "texts"])
def test_a_broken_encoder_scores_as_chance_does(side: str) -> None:
    rows, nothing = torch.eye(6), torch.full((6, 6), torch.nan)
    u, t = (nothing, rows) if side == "images" else (rows, nothing)
    for ranks in metrics.retrieval_ranks(u, t, torch.arange(6)):
        assert ranks.tolist() == [2.5] * 6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_embedding_costs_itself_alone(value: float) -> None:
    u, t = torch.eye(6), torch.eye(6)[[0, 0, 1, 2, 3, 4, 5]]
    t[0] = value
    image_ranks, text_ranks = metrics.retrieval_ranks(u, t, torch.tensor([0, 0, 1, 2, 3, 4, 5]))
    assert image_ranks.tolist() == [0] * 6
    assert text_ranks[0] > 0
    assert text_ranks[1:].tolist() == [0] * 6


def test_shares_by_image_average_to_the_mean_recall() -> None:
    image_of_text = torch.tensor([0, 0, 0, 1, 2])
    image_ranks, text_ranks = torch.tensor([0.0, 7, 3]), torch.tensor([0.0, 20, 4, 0, 9])
    image_side = np.mean([[(r < k) for r in image_ranks] for k in (1, 5, 10)])
    text_side = np.mean([[(r < k) for r in text_ranks] for k in (1, 5, 10)])
    shares = metrics.mean_recall_by_image(image_ranks, text_ranks, image_of_text)
    assert float(shares.mean()) == pytest.approx(100 * (image_side + text_side) / 2)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        values = generator.normal(1.0, 1.0, (1, 60))
        low, high = metrics.interval(metrics.bootstrap_means(values, seed=i, draws=300))
        covered += low <= 1.0 <= high
    assert 180 <= covered <= 200


def test_three_seeds_make_an_interval_as_wide_as_their_spread() -> None:
    generator = np.random.default_rng(0)
    found = []
    for i in range(200):
        values = np.repeat(generator.normal(size=(3, 1)), 50, 1)
        found.append(metrics.bootstrap_means(values, seed=i, draws=300).var())
    assert np.mean(found) == pytest.approx(1 / 3, rel=0.2)


def test_equal_methods_differ_by_nothing_in_a_paired_bootstrap() -> None:
    values = np.random.default_rng(0).normal(size=(3, 50))
    shifted = metrics.bootstrap_means(values + 2, seed=4) - metrics.bootstrap_means(values, seed=4)
    np.testing.assert_allclose(shifted, 2)


def test_precision_and_recall_of_the_first() -> None:
    positive = np.array([True, False, True, False])
    scores = np.array([4.0, 3.0, 2.0, 1.0])
    assert metrics.precision_recall_at(scores, positive, 0.25) == (1.0, 0.5)
    assert metrics.precision_recall_at(scores, positive, 0.75) == (2 / 3, 1.0)
    assert metrics.precision_recall_at(scores, positive, 0.01) == (1.0, 0.5)  # one at least
    assert metrics.precision_recall_at(-scores, positive, 0.5) == (0.5, 0.5)
    assert metrics.precision_recall_at(scores, np.zeros(4, bool), 0.5) == (0.0, 0.0)
