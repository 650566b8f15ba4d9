"""Columns in ranges: their moments merge, and a search finds the very place where the sorted column is cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from whole_decision import looped

from influencespace.core import histogram
from influencespace.core.histogram import (
    EVERYTHING,
    NOTHING,
    Column,
    Cut,
    Goal,
    Moments,
    order_keys,
    place_among,
    search,
)

anything = st.floats(allow_nan=True, allow_infinity=True)
columns = arrays(np.float64, st.integers(1, 60), elements=anything | st.sampled_from([0.0, -0.0, 1.0]))
how = pytest.mark.parametrize("collected", [10**6, 9, 0], ids=["collected", "few collected", "counted"])


def parts_of(column: Column, size: int) -> list[Column]:
    names = ("value", "row", "part", "weight")
    cut = [
        {
            name: None if vars(column)[name] is None else vars(column)[name][start : start + size]
            for name in names
        }
        for start in range(0, len(column.value), size)
    ]
    return [Column(**one) for one in cut]


def itself(column: Column) -> Column:
    return column


def searched(column: Column, goals: list[Goal], size: int, collected: int) -> list[Cut]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "COLLECTED", collected)
        return looped(search(itself, goals, len(column.value)), parts_of(column, size))


@given(values=arrays(np.float64, st.integers(0, 60), elements=st.floats(-1e6, 1e6)), size=st.integers(1, 60))
def test_moments_of_ranges_merge_to_those_of_all(values: np.ndarray, size: int) -> None:
    merged = Moments()
    for start in range(0, len(values), size):
        merged = merged.merge(Moments.of(np.append(values[start : start + size], np.nan)))
    assert merged.count == len(values)
    if len(values):
        assert merged.mean == pytest.approx(values.mean(), abs=1e-6)
        assert merged.deviation == pytest.approx(values.std(), rel=1e-6, abs=1e-6)
    else:
        assert merged.deviation == 0


@given(values=columns)
def test_keys_are_in_the_order_of_values_and_nan_is_last(values: np.ndarray) -> None:
    keys = order_keys(values)
    np.testing.assert_array_equal(np.argsort(keys, kind="stable"), np.argsort(values, kind="stable"))
    assert len(np.unique(keys)) == len(np.unique(values))


@how
@given(values=columns, size=st.integers(1, 60), data=st.data())
def test_so_many_values_lie_before_a_cut_equal_ones_by_row(
    collected: int, values: np.ndarray, size: int, data: st.DataObject
) -> None:
    n = len(values)
    ranks = data.draw(st.lists(st.integers(0, n + 2), max_size=5))
    row = 10**9 + np.arange(n)
    cuts = searched(Column(values, row), [Goal(rank=rank) for rank in ranks], size, collected)
    place = np.empty(n, int)
    place[np.argsort(values, kind="stable")] = np.arange(n)
    for rank, cut in zip(ranks, cuts, strict=True):
        np.testing.assert_array_equal(cut.below(values, row), place < rank)


@how
@given(values=columns, size=st.integers(1, 60), seed=st.integers(0, 99))
def test_each_part_is_cut_for_itself(collected: int, values: np.ndarray, size: int, seed: int) -> None:
    part = np.random.default_rng(seed).integers(-1, 2, len(values))
    row, goals = np.arange(len(values)), [Goal(rank=3, part=code) for code in (-1, 0, 1, 7)]
    cuts = searched(Column(values, row, part), goals, size, collected)
    for goal, cut in zip(goals, cuts, strict=True):
        mine = part == goal.part
        (alone,) = (
            searched(Column(values[mine], row[mine]), [Goal(rank=3)], size, collected)
            if mine.any()
            else [cut]
        )
        np.testing.assert_array_equal(cut.below(values, row)[mine], alone.below(values, row)[mine])


@how
@given(
    values=arrays(np.float64, st.integers(1, 60), elements=st.integers(-5, 5).map(lambda v: v / 4)),
    size=st.integers(1, 60),
    mean=st.floats(0, 1),
)
def test_a_mean_weight_is_kept_by_as_many_of_the_first_values_as_can(
    collected: int, values: np.ndarray, size: int, mean: float
) -> None:
    weight = np.clip((values + 1) / 2, 0, 1)  # rises with the value
    (cut,) = searched(
        Column(values, np.arange(len(values)), None, weight), [Goal(mean=mean)], size, collected
    )
    before = cut.below(values, np.arange(len(values)))
    beyond = values[~before].min(initial=np.inf)
    assert values[before].max(initial=-np.inf) < beyond  # equal values lie on one side
    assert weight[before].mean() <= mean + 1e-9 if before.any() else True
    if len(values[~before]):
        assert weight[values <= beyond].mean() > mean - 1e-9


def test_nothing_and_everything() -> None:
    values = np.array([-np.inf, 0.0, np.inf, np.nan])
    assert not NOTHING.below(values, np.arange(4)).any()
    assert EVERYTHING.below(values, np.arange(4)).all()


def test_quantiles_of_many_values_take_few_passes_and_small_states() -> None:
    """A million values, ten ranges: three passes."""
    values = np.random.default_rng(0).normal(size=1_000_000)
    column = Column(values, np.arange(len(values)))
    passes = search(itself, [Goal(rank=25_000 * q) for q in range(1, 40)], len(values))
    sizes = []

    def run(statistic: histogram.Statistic) -> object:
        state = statistic.observe(column)
        sizes.append(
            sum(a.nbytes for a in state)
            if isinstance(state, np.ndarray)
            else sum(a.nbytes for t in state for a in t)
        )
        return state

    cuts = histogram.carried_out(passes, run)
    assert len(sizes) == 3
    assert max(sizes) < 39 * 65_536 + 1
    ordered = np.sort(values)
    for q, cut in enumerate(cuts, 1):
        assert cut.below(values, column.row).sum() == 25_000 * q
        assert cut.key == order_keys(ordered[25_000 * q : 25_000 * q + 1])[0]


@given(values=columns, ranks=st.lists(st.integers(0, 60), max_size=6).map(sorted))
def test_a_value_has_its_place_among_cuts(values: np.ndarray, ranks: list[int]) -> None:
    row = np.arange(len(values))
    cuts = searched(Column(values, row), [Goal(rank=rank) for rank in ranks], 60, 10**6)
    expected = (
        sum((~cut.below(values, row)).astype(int) for cut in cuts) if cuts else np.zeros(len(values), int)
    )
    np.testing.assert_array_equal(place_among(cuts, values, row), expected)
