"""Axes of quality: blind to units, equal to what plain loops count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.core.histogram import Moments
from influencespace.core.quality import (
    FitAxis,
    Scores,
    agreement,
    caption_images,
    shared_captions,
    standardised,
)


def quality_axis(in_sample: np.ndarray, out_of_fold: np.ndarray, cut: int = 7) -> np.ndarray:
    """The axis as stages fit it: ranges one by one, merged."""
    fit, row = FitAxis(), np.arange(len(in_sample))
    parts = [Scores(row[some], in_sample[some], out_of_fold[some]) for some in (row < cut, row >= cut)]
    return fit.merge(*map(fit.observe, parts))(in_sample, out_of_fold)


@given(seed=st.integers(0, 2**31), cut=st.integers(0, 20))
def test_the_axis_is_the_mean_of_both_scores_in_units_of_their_spread(seed: int, cut: int) -> None:
    both = np.random.default_rng(seed).normal(3, 2, size=(2, 20))
    plain = ((both - both.mean(1, keepdims=True)) / both.std(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(quality_axis(*both, cut), plain, atol=1e-9)


@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_units_do_not_matter(seed: int, scale: float, shift: float) -> None:
    generator = np.random.default_rng(seed)
    in_sample, out_of_fold = generator.normal(size=(2, 20))
    axis = quality_axis(in_sample, out_of_fold)
    np.testing.assert_allclose(axis, quality_axis(scale * in_sample + shift, out_of_fold), atol=1e-8)
    np.testing.assert_allclose(axis, quality_axis(out_of_fold, in_sample))
    assert axis.mean() == pytest.approx(0, abs=1e-9)


def test_two_equal_scores_are_that_score_standardised() -> None:
    score = np.random.default_rng(0).normal(3, 2, 50)
    np.testing.assert_allclose(quality_axis(score, score), (score - score.mean()) / score.std())


def test_a_score_without_spread_says_nothing() -> None:
    score = np.random.default_rng(0).normal(size=50)
    np.testing.assert_allclose(
        quality_axis(np.full(50, 4.0), score), quality_axis(score, score) / 2, atol=1e-12
    )


def test_values_that_are_all_alike_have_no_units() -> None:
    np.testing.assert_array_equal(standardised(np.full(5, 3.0), Moments.of(np.full(5, 3.0))), np.zeros(5))


@given(seed=st.integers(0, 2**31))
def test_captions_and_their_agreement_are_what_loops_find(seed: int) -> None:
    generator = np.random.default_rng(seed)
    image, text = generator.integers(0, 6, 20), generator.integers(0, 9, 20)
    images = [len({i for i, t in zip(image, text) if t == own}) for own in text]
    np.testing.assert_allclose(caption_images(image, text), np.log(images))
    T = generator.normal(size=(20, 4)).astype(np.float32)
    T /= np.linalg.norm(T, axis=1, keepdims=True)
    expected = [
        np.mean([T[n] @ T[m] for m in range(20) if m != n and image[m] == image[n]])
        if (image == image[n]).sum() > 1
        else np.nan
        for n in range(20)
    ]
    np.testing.assert_allclose(agreement(T, image), expected, atol=1e-6)


def test_names_of_classes_are_no_axis() -> None:
    image, text = np.arange(30), np.arange(30) % 3
    assert shared_captions(image, text) == 1
    mostly_own = np.where(np.arange(30) < 12, 0, np.arange(30))
    assert shared_captions(image, mostly_own) == 0.4
