"""The estimated share is the planted share of wrong pairs."""

import numpy as np
import pytest

from influencespace.core.caption_control import caption_control


def influences(wrong: float, n: int = 40_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noisy influences (mean 1 if right, -2 if wrong), a quality that tells them apart, and permuted pairs."""
    generator = np.random.default_rng(0)
    is_wrong = generator.random(n) < wrong
    out_of_fold = np.where(is_wrong, -2.0, 1.0) + 3 * generator.normal(size=n)
    quality = generator.normal(size=n) - 8 * is_wrong
    return out_of_fold, quality, -2 + 3 * generator.normal(size=n)


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.3, 0.45])
def test_a_planted_share_is_recovered(wrong: float) -> None:
    check = caption_control(*influences(wrong))
    assert check.estimated_wrong_share == pytest.approx(wrong, abs=0.03)
    assert check.influence_top_half == pytest.approx(1, abs=0.1)
    assert check.influence_permuted == pytest.approx(-2, abs=0.1)
    assert check.influence_mean == pytest.approx(1 - 3 * wrong, abs=0.1)


def test_the_share_stays_a_share() -> None:
    quality = np.array([0.0, 0.0, 1.0, 1.0])
    low = caption_control(np.array([-9.0, -9.0, 1.0, 1.0]), quality, np.array([0.0]))
    assert low.estimated_wrong_share == 1.0
    high = caption_control(np.array([5.0, 5.0, 1.0, 1.0]), quality, np.array([0.0]))
    assert high.estimated_wrong_share == 0.0


def test_a_caption_control_that_is_no_worse_says_nothing() -> None:
    out_of_fold, quality, permuted = influences(0.1, n=100)
    assert caption_control(out_of_fold, quality, permuted + 100).estimated_wrong_share is None
    without = caption_control(out_of_fold, quality, permuted[:0])
    assert without.estimated_wrong_share is without.influence_permuted is None
