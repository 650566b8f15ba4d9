"""The charts: means agree with a plain loop, axes hold what they show, and no mark is lost or undefined."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.report import charts
from influencespace.report.charts import Axis, Quantile, Unit, influence_by_quantile

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)
LEAF = st.tuples(
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 50),
    st.one_of(st.just(math.nan), st.floats(-1, 1)),
    st.floats(0, 1),
)


def table(leaves: list[tuple[int, int, int, float, float]]) -> dict[str, list[Any]]:
    """Strata from (cluster, quantile, pairs, influence, kept)."""
    clusters, quantiles, pairs, influence, kept = ([leaf[i] for leaf in leaves] for i in range(5))
    return {
        "stratum": [f"c{c:02d}/q{q:02d}" for c, q in zip(clusters, quantiles)],
        "cluster": clusters,
        "quantile": quantiles,
        "pairs": pairs,
        "scored": pairs,
        "quality": [0.5] * len(leaves),
        "influence": influence,
        "influence_se": [0.1] * len(leaves),
        "pooled": influence,
        "pooled_se": [0.1] * len(leaves),
        "kept": kept,
    }


@given(st.lists(FINITE, min_size=1, max_size=20))
def test_an_axis_holds_its_values_and_its_ticks(values: list[float]) -> None:
    axis = Axis.over(values, 10, 200)
    assert all(10 <= axis(value) <= 200 for value in values)
    ticks = axis.ticks()
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 8
    assert all(9.9 <= axis(tick) <= 200.1 for tick in ticks)


@given(st.lists(LEAF, min_size=1, max_size=30, unique_by=lambda leaf: leaf[:2]))
def test_means_over_clusters_are_weighted_by_pairs(leaves: list[tuple[int, int, int, float, float]]) -> None:
    for q in influence_by_quantile(table(leaves)):
        mine = [leaf for leaf in leaves if leaf[1] == q.index]
        known = [leaf for leaf in mine if leaf[2] and not math.isnan(leaf[3])]
        assert q.pairs == sum(leaf[2] for leaf in mine)
        weights = sum(leaf[2] for leaf in known)
        if not weights:
            assert math.isnan(q.influence)
            continue
        assert q.influence == pytest.approx(sum(leaf[2] * leaf[3] for leaf in known) / weights)
        assert q.se == pytest.approx(math.hypot(*(leaf[2] * 0.1 for leaf in known)) / weights)
        assert q.kept == pytest.approx(sum(leaf[2] * leaf[4] for leaf in mine) / q.pairs)


@given(st.lists(LEAF, min_size=1, max_size=30, unique_by=lambda leaf: leaf[:2]), st.floats(-1, 1))
def test_every_chart_is_defined(leaves: list[tuple[int, int, int, float, float]], threshold: float) -> None:
    strata = table(leaves)
    known = [leaf for leaf in leaves if leaf[2] and not math.isnan(leaf[3])]
    chart = charts.influence_chart(influence_by_quantile(strata), threshold)
    heat = charts.influence_map(strata, threshold)
    for drawn in (chart, heat):
        assert not re.search(r"\b(nan|inf)\b", drawn)
        assert not re.findall(r'(?:width|height)="-', drawn)
    assert heat.count("<rect") == len(known)
    assert heat.count('class="cross"') == sum(leaf[4] == 0 for leaf in known)


def test_signs_have_their_colours() -> None:
    strata = table([(0, 0, 5, -1.0, 0.0), (0, 1, 5, 1.0, 1.0)])
    quantiles = influence_by_quantile(strata)
    assert charts.influence_chart(quantiles).count('class="bad"') == 1
    assert charts.influence_chart(quantiles, threshold=-2.0).count('class="bad"') == 0
    assert charts.influence_map(strata).count('class="bad"') == 1


def test_the_map_shows_the_largest_clusters_worst_first() -> None:
    leaves = [(c, 0, 100 - c, float(c % 7), 1.0) for c in range(60)]
    shown = charts.map_clusters(table(leaves))
    assert sorted(shown) == list(range(charts.MAP_CLUSTERS))
    assert [c % 7 for c in shown] == sorted(c % 7 for c in shown)


def test_nothing_to_draw_draws_nothing() -> None:
    empty = Quantile(index=0, pairs=3, scored=0, quality=0.1, influence=math.nan, se=math.nan, kept=1.0)
    assert charts.influence_chart([empty]) == ""
    assert charts.recall_chart({}) == ""
    assert charts.recall_chart({"methods": {"curated": {"mean_recall": None}}}) == ""
    assert charts.caption_control_chart({"influence_mean": 1.0}) == ""


def test_a_recall_without_interval_is_a_point() -> None:
    chart = charts.recall_chart({"methods": {"<b>": {"mean_recall": 40.0}}})
    assert "&lt;b&gt;: 40.00 %" in chart
    assert "<b>" not in chart


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0, "target loss", "0.00"),
        (-2.5e-5, "10⁻⁶ of target loss", "−25.0"),
        (1234.0, "10³ of target loss", "1.23"),
    ],
)
def test_small_numbers_have_a_readable_unit(value: float, unit: str, shown: str) -> None:
    assert Unit.of([value]).name == unit
    assert Unit.of([value]).show(value) == shown
    assert Unit.of([]).show(math.nan) == "–"
