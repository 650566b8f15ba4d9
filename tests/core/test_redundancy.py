"""Laws of duplicate groups: a partition, near its leaders in both modalities, that no block size and no order of rows changes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from influencespace.core import redundancy
from influencespace.core.kmeans import unit_rows
from influencespace.core.redundancy import (
    ROUNDING,
    exact_leaders,
    joint_mean,
    near_leaders,
)
from influencespace.core.strata import rank_within

seeds = st.integers(0, 10_000)
thresholds = st.floats(-0.5, 0.99)


def rows(n: int, seed: int, d: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit_rows(torch.randn(n, d, generator=generator, dtype=torch.float64))


def pairs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return rows(n, seed), rows(n, seed + 1, d=2)


def on_circle(*degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], 1)


@given(n=st.integers(1, 40), seed=seeds, image=thresholds, text=thresholds)
def test_leaders_are_those_of_one_after_another(n: int, seed: int, image: float, text: float) -> None:
    """The definition, written as a loop; so members are near their leader, and leaders are not near each other."""
    U, T = pairs(n, seed)
    leading: list[int] = []
    for i, leader in enumerate(near_leaders(U, T, image, text)):
        near = [
            j
            for j in leading
            if float(U[i] @ U[j]) >= image - ROUNDING and float(T[i] @ T[j]) >= text - ROUNDING
        ]
        assert leader == (near[0] if near else i)
        leading += [] if near else [i]


@given(n=st.integers(1, 40), seed=seeds, text=thresholds, block=st.integers(1, 12))
def test_no_bucket_size_changes_the_groups(n: int, seed: int, text: float, block: int) -> None:
    U, T = pairs(n, seed)
    whole = near_leaders(U, T, 0.5, text)
    np.testing.assert_array_equal(near_leaders(U, T, 0.5, text, block), whole)


@given(n=st.integers(1, 40), seed=seeds)
def test_it_does_not_matter_how_many_captions_are_alike(n: int, seed: int) -> None:
    """Images are compared all at once where many captions are alike, else one by one: alike."""
    U, T = pairs(n, seed)
    whole = near_leaders(U, T, 0.5, 0.5)
    for few in (-1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(redundancy, "FEW", few)
            np.testing.assert_array_equal(near_leaders(U, T, 0.5, 0.5, block=7), whole)


@given(n=st.integers(1, 40), seed=seeds)
def test_at_threshold_one_only_equal_pairs_are_copies(n: int, seed: int) -> None:
    U, T = (X.float().repeat(2, 1) for X in pairs(n, seed))
    np.testing.assert_array_equal(near_leaders(U, T, 1.0, 1.0), np.tile(np.arange(n), 2))


def test_a_copy_needs_both_modalities() -> None:
    """The same picture with another caption is no copy, nor is the same caption with another picture."""
    U, T = on_circle(0, 1, 0, 90), on_circle(0, 1, 90, 0)
    assert near_leaders(U, T, 0.9, 0.9).tolist() == [0, 0, 2, 3]


def test_gradual_changes_do_not_chain() -> None:
    """Steps of ten degrees, each within the threshold of the next, never join ends that differ by more."""
    U = on_circle(*range(0, 360, 10))
    leader = near_leaders(U, U, 0.95, 0.95)
    assert len(np.unique(leader)) >= 360 / 40
    assert ((U * U[leader]).sum(1) >= 0.95 - ROUNDING).all()


@given(
    copies=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30),
    seed=seeds,
)
def test_exact_copies_are_always_grouped(copies: list[tuple[int, int]], seed: int) -> None:
    """A partition by image and caption, led by the best, whatever the order of the rows."""
    image, text = np.array(copies).T
    generator = np.random.default_rng(seed)
    worth = generator.normal(size=len(image))
    leader = exact_leaders(image, text, worth)
    for i, own in enumerate(leader):
        same = np.flatnonzero((image == image[i]) & (text == text[i]))
        assert own == same[worth[same].argmax()]
    order = generator.permutation(len(image))
    shuffled = exact_leaders(image[order], text[order], worth[order])
    np.testing.assert_array_equal(order[shuffled], leader[order])


def test_the_first_of_equal_copies_leads() -> None:
    same = np.zeros(3, np.int64)
    assert exact_leaders(same, same, np.array([1.0, 2.0, 2.0])).tolist() == [1, 1, 1]


@pytest.mark.parametrize("leader", [[0, 0, 2, 0], [0, 1, 2, 3], [3, 3, 3, 3]])
def test_a_group_has_the_mean_of_its_members(leader: list[int]) -> None:
    values = np.array([1.0, 2.0, 5.0, 6.0])
    found = joint_mean(values, np.array(leader))
    for i, own in enumerate(leader):
        assert found[i] == pytest.approx(values[np.array(leader) == own].mean())


@given(value=st.lists(st.integers(0, 3).map(float), min_size=1, max_size=20).map(np.array), seed=seeds)
def test_ranks_count_the_better_of_a_group(value: np.ndarray, seed: int) -> None:
    group = np.random.default_rng(seed).integers(0, 4, len(value))
    rank = rank_within(group, value)
    for i in range(len(value)):
        others = np.flatnonzero(group == group[i])
        assert rank[i] == sum(value[j] > value[i] or (value[j] == value[i] and j < i) for j in others)
