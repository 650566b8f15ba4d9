"""Scores without gradients against their definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from influencespace.estimators.filters import clip_score, neg_clip_loss, random_score

SCALE = 9.0


def unit(n: int, seed: int, d: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)


def test_the_clip_score_is_the_cosine() -> None:
    u, t = unit(6, 0), unit(6, 1)
    np.testing.assert_allclose(clip_score(u, t), F.cosine_similarity(u, t))
    np.testing.assert_allclose(clip_score(u, u), 1)


def test_neg_clip_loss_is_the_cosine_less_the_negative_batch() -> None:
    u, t = unit(4, 0), unit(4, 1)
    recorded_batches = [(unit(7, 2), unit(7, 3), np.arange(7)), (unit(5, 4), unit(5, 5), np.arange(5))]
    found = neg_clip_loss(u, t, np.arange(100, 104), recorded_batches, SCALE)
    for i in range(4):
        losses = []
        for images, texts, _ in recorded_batches:
            as_image = math.log(sum(math.exp(SCALE * float(u[i] @ other)) for other in texts))
            as_text = math.log(sum(math.exp(SCALE * float(t[i] @ other)) for other in images))
            losses.append((as_image + as_text) / 2 - SCALE * float(u[i] @ t[i]))
        assert found[i] == pytest.approx(-np.mean(losses))


def test_neg_clip_loss_prefers_what_the_negative_batch_does_not_resemble() -> None:
    u = unit(2, 0)
    near, far = u[:1].repeat(6, 1), -u[:1].repeat(6, 1)
    image, others = np.array([9]), np.arange(6)
    crowded = neg_clip_loss(u[:1], u[:1], image, [(near, near, others)], SCALE)
    rare = neg_clip_loss(u[:1], u[:1], image, [(far, far, others)], SCALE)
    assert rare[0] - crowded[0] == pytest.approx(2 * SCALE)


def test_neg_clip_loss_uses_no_negative_batch_that_holds_the_pairs_image() -> None:
    recorded_batches = [(unit(7, 2), unit(7, 3), np.arange(7)), (unit(5, 4), unit(5, 5), np.arange(10, 15))]
    (u, t, image), other = recorded_batches
    np.testing.assert_array_equal(
        neg_clip_loss(u, t, image, recorded_batches, SCALE), neg_clip_loss(u, t, image, [other], SCALE)
    )
    assert np.isnan(neg_clip_loss(u, t, image, recorded_batches[:1], SCALE)).all()


@given(
    uids=st.lists(st.text(max_size=8), min_size=1, max_size=20, unique=True),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_random_depends_on_uid_and_seed_alone(uids: list[str], seed: int, data: st.DataObject) -> None:
    scores = dict(zip(uids, random_score(uids, seed), strict=True))
    shuffled = data.draw(st.permutations(uids))[: data.draw(st.integers(1, len(uids)))]
    np.testing.assert_array_equal(random_score(shuffled, seed), [scores[uid] for uid in shuffled])
    assert all(0 <= score < 1 for score in scores.values())
    assert not np.array_equal(random_score(uids, seed), random_score(uids, seed + 1))


def test_random_is_uniform() -> None:
    scores = random_score([f"pair {i}" for i in range(20_000)])
    counts = np.histogram(scores, bins=10, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 30  # chi squared with nine degrees of freedom
