"""The charts: means agree with a plain loop, no mark is lost or undefined, and texts stay texts."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influencespace.report import charts
from influencespace.report.numbers import Unit
from influencespace.report.strata import MAX_CLUSTERS, influence_by_quantile, map_clusters, records

Leaf = tuple[int, int, int, float, float]
LEAVES = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 3),
        st.integers(0, 50),
        st.one_of(st.just(math.nan), st.floats(-1, 1)),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda leaf: leaf[:2],
)


def table(leaves: list[Leaf]) -> pd.DataFrame:
    """Strata from (cluster, quantile, pairs, influence, kept)."""
    frame = pd.DataFrame(leaves, columns=["cluster", "quantile", "pairs", "influence", "kept"])
    names = [f"c{c:02d}/q{q:02d}" for c, q in zip(frame["cluster"], frame["quantile"])]
    return frame.assign(
        stratum=names,
        scored=frame["pairs"],
        quality=0.5,
        influence_se=0.1,
        pooled=frame["influence"],
        pooled_se=0.1,
    )


def titles(chart: str) -> list[str]:
    """The text of each mark, in order; the same mark may consist of several shapes."""
    return list(dict.fromkeys(re.findall(r"<title>(.*?)</title>", chart)))


@given(LEAVES)
def test_means_over_clusters_are_weighted_by_pairs(leaves: list[Leaf]) -> None:
    for q in records(influence_by_quantile(table(leaves))):
        mine = [leaf for leaf in leaves if leaf[1] == q.quantile]
        known = [leaf for leaf in mine if leaf[2] and not math.isnan(leaf[3])]
        pairs, weights = sum(leaf[2] for leaf in mine), sum(leaf[2] for leaf in known)
        assert q.pairs == pairs
        assert math.isnan(q.kept) == (not pairs)
        assert math.isnan(q.influence) == (not weights)
        if pairs:
            assert q.kept == pytest.approx(sum(leaf[2] * leaf[4] for leaf in mine) / pairs)
        if weights:
            assert q.influence == pytest.approx(sum(leaf[2] * leaf[3] for leaf in known) / weights)
            assert q.influence_se == pytest.approx(math.hypot(*(leaf[2] * 0.1 for leaf in known)) / weights)


@settings(max_examples=10)
@given(LEAVES, st.floats(-1, 1))
def test_every_stratum_has_a_mark_and_every_chart_is_defined(leaves: list[Leaf], threshold: float) -> None:
    strata = table(leaves)
    known = [leaf for leaf in leaves if leaf[2] and not math.isnan(leaf[3])]
    quantiles = influence_by_quantile(strata)
    chart, heat = charts.influence_chart(quantiles, threshold), charts.influence_map(strata, threshold)
    assert len([title for title in titles(chart) if "influence" in title]) == len({q for _, q, *_ in known})
    assert len(titles(heat)) == len(known)
    assert heat.count("<title>") == len(known) + sum(leaf[4] == 0 for leaf in known)  # a box, and a cross
    for drawn in (chart, heat):
        assert not re.search(r"\b(nan|inf)\b", drawn)
        HTMLParser().feed(drawn)


def test_signs_have_their_colours() -> None:
    strata = table([(0, 0, 5, -1.0, 0.0), (0, 1, 5, 1.0, 1.0)])
    quantiles = influence_by_quantile(strata)
    assert charts.influence_chart(quantiles).count("var(--bad)") == 1
    assert charts.influence_chart(quantiles, threshold=-2.0).count("var(--bad)") == 0
    assert charts.influence_map(strata).count("var(--bad)") == 1


def test_the_map_shows_the_largest_clusters_worst_first() -> None:
    shown = map_clusters(table([(c, 0, 100 - c, float(c % 7), 1.0) for c in range(60)]))
    assert sorted(shown) == list(range(MAX_CLUSTERS))
    assert [c % 7 for c in shown] == sorted(c % 7 for c in shown)


def test_nothing_to_draw_draws_nothing() -> None:
    empty = influence_by_quantile(table([(0, 0, 3, math.nan, 1.0)]))
    assert charts.influence_chart(empty) == ""
    assert charts.recall_chart({}) == ""
    assert charts.recall_chart({"methods": {"curated": {"mean_recall": None}}}) == ""
    assert charts.caption_control_chart({"influence_mean": 1.0}) == ""


@pytest.mark.parametrize("name", ["<b>", "$\\frac{", '"><script>', "\x00\n", 'font-family: " id="x_1"'])
def test_names_stay_text_and_a_recall_without_interval_is_a_point(name: str) -> None:
    texts: list[str] = []
    tags: list[str] = []

    class Parser(HTMLParser):
        def handle_data(self, data: str) -> None:
            texts.append(data)

        def handle_starttag(self, tag: str, attributes: Any) -> None:
            tags.append(tag)

    Parser().feed(charts.recall_chart({"methods": {name: {"mean_recall": 40.0}}}))
    assert f"{name}: 40.00 %, 95 % interval –" in texts
    assert set(tags) <= {"svg", "defs", "style", "g", "path", "text", "title", "use", "clippath", "rect"}


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
