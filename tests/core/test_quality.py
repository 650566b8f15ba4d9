"""The quality axis weighs both scores alike, whatever their units."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core.quality import quality_axis


@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_units_do_not_matter(seed: int, scale: float, shift: float) -> None:
    generator = np.random.default_rng(seed)
    seen, held_out = generator.normal(size=(2, 20))
    axis = quality_axis(seen, held_out)
    np.testing.assert_allclose(axis, quality_axis(scale * seen + shift, held_out), atol=1e-8)
    np.testing.assert_allclose(axis, quality_axis(held_out, seen))
    assert axis.mean() == pytest.approx(0, abs=1e-9)


def test_two_equal_scores_are_that_score_standardised() -> None:
    score = np.random.default_rng(0).normal(3, 2, 50)
    np.testing.assert_allclose(quality_axis(score, score), (score - score.mean()) / score.std())


def test_a_score_without_spread_says_nothing() -> None:
    score = np.random.default_rng(0).normal(size=50)
    np.testing.assert_allclose(
        quality_axis(np.full(50, 4.0), score), quality_axis(score, score) / 2, atol=1e-12
    )
