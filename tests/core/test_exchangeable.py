"""A target that the encoder knows better than the pool is told from one that is drawn like the pool."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from influencespace.core.exchangeable import BATCH, Exchangeability, Known
from influencespace.core.kmeans import unit_rows


def pairs(count: int, agreement: float, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows whose captions have about this cosine with their images."""
    generator = torch.Generator().manual_seed(seed)
    images = unit_rows(torch.randn(count, 32, generator=generator))
    noise = unit_rows(torch.randn(count, 32, generator=generator))
    return images, unit_rows(agreement * images + (1 - agreement**2) ** 0.5 * noise)


def compared(target: tuple[Tensor, Tensor], pool: tuple[Tensor, Tensor]) -> Exchangeability:
    return Exchangeability.of(Known.of(*target), Known.of(*pool))


@given(seed=st.integers(0, 50), count=st.integers(60, 600))
def test_a_target_drawn_like_the_pool_is_not_known_better(seed: int, count: int) -> None:
    assert not compared(pairs(count, 0.3, 2 * seed), pairs(2000, 0.3, 2 * seed + 1)).known_better


@pytest.mark.parametrize("seed", range(5))
def test_pairs_that_agree_more_are_known_better(seed: int) -> None:
    known, other = pairs(500, 0.4, seed), pairs(2000, 0.3, seed + 100)
    found = compared(known, other)
    assert found.known_better
    assert found.cosine_gap == pytest.approx(0.1 / (0.95 / 32**0.5), rel=0.25)
    assert not compared(other, known).known_better


def test_a_target_that_the_encoder_chose_is_known_better() -> None:
    alike = Known.of(*pairs(500, 0.3, 0)), Known.of(*pairs(2000, 0.3, 1))
    assert Exchangeability.of(*alike, chosen_by_encoder=True).known_better
    assert not Exchangeability.of(*alike).known_better


def test_few_pairs_do_not_say_it() -> None:
    assert not compared(pairs(16, 0.36, 0), pairs(2000, 0.3, 1)).known_better


def test_cosines_alone_do_not_say_it() -> None:
    """A shift of all captions towards all images raises cosines, and no partner is found more easily."""
    pool = pairs(2000, 0.3, 0)
    near = (
        torch.nn.functional.pad(pool[0] * 0.8, (0, 1), value=0.6),
        torch.nn.functional.pad(pool[1] * 0.8, (0, 1), value=0.6),
    )
    found = compared(near, pool)
    assert found.cosine_gap > 0.5
    assert found.found_gap == pytest.approx(0)
    assert not found.known_better


def test_partners_are_looked_for_in_whole_batches() -> None:
    known = Known.of(*pairs(2 * BATCH + 5, 0.9, 0))
    assert (len(known.cosine), len(known.found)) == (2 * BATCH + 5, 2 * BATCH)
    assert known.found.mean() == 1
    few = Known.of(*pairs(7, 0.9, 0))
    assert len(few.found) == 7
    mirrored = Known.of(*pairs(BATCH, -0.9, 0))
    assert mirrored.found.mean() == 0
    assert np.all(mirrored.cosine < 0)
