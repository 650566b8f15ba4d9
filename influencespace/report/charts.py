"""The charts of the page as SVG: drawn here, coloured by the page's style sheet, with a text for each mark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from influencespace.report.table import LABELS, MISSING, Summary, count, interval, is_number, number, percent

WIDTH = 720
# Rows of the map; more clusters than that are told apart by nobody.
MAP_CLUSTERS = 40
# Anything below is zero but for rounding.
SMALLEST = 1e-30

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """Influence of one quality quantile, pooled over clusters; nan where nothing was scored."""

    index: int
    pairs: int
    scored: int
    quality: float
    influence: float
    se: float
    kept: float
    """Fraction of its pairs."""


@dataclass(frozen=True)
class Axis:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> "Axis":
        """An axis that shows all finite `values` with a little room."""
        finite = [value for value in values if is_number(value)] or [0.0]
        low, high = min(finite), max(finite)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, wanted: int = 6) -> list[float]:
        """Round values inside the axis, about `wanted` of them."""
        rough = (self.high - self.low) / wanted
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Unit:
    """A power of ten that makes small numbers readable."""

    exponent: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Unit":
        largest = max((abs(value) for value in values if is_number(value)), default=0.0)
        return cls(0 if largest < SMALLEST else 3 * math.floor(math.log10(largest) / 3))

    def show(self, value: float | None) -> str:
        """About three digits, with a real minus."""
        if value is None or not is_number(value):
            return MISSING
        scaled = value / 10**self.exponent
        digits = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
        return number(scaled, digits).replace("-", "−")

    def tick(self, value: float) -> str:
        """A round value, without needless zeros."""
        return f"{value / 10**self.exponent:.6g}".replace("-", "−")

    @property
    def name(self) -> str:
        return "target loss" if not self.exponent else f"10{self.power} of target loss"

    @property
    def power(self) -> str:
        return str(self.exponent).translate(_SUPERSCRIPTS)


def recall_chart(summary: Summary) -> Markup:
    """Mean recall of each method with its interval, on one axis."""
    shown = {
        name: method
        for name, method in sorted(summary.get("methods", {}).items(), key=_order)
        if is_number(method.get("mean_recall"))
    }
    if not shown:
        return Markup()
    bounds = {name: _bounds(method) for name, method in shown.items()}
    height = 34 * len(shown) + 52
    axis = Axis.over([bound for pair in bounds.values() for bound in pair], 130, WIDTH - 70)
    parts = [
        _element("line", x1=axis(tick), x2=axis(tick), y1=8, y2=height - 44, class_="grid")
        + _text(f"{tick:g}", axis(tick), height - 26, "middle", "small")
        for tick in axis.ticks()
    ]
    for row, (name, method) in enumerate(shown.items()):
        y, value = 24 + 34 * row, method["mean_recall"]
        low, high = bounds[name]
        marks = [
            _element("line", x1=axis(low), x2=axis(high), y1=y, y2=y, class_="whisker"),
            *(
                _element("line", x1=axis(x), x2=axis(x), y1=y - 5, y2=y + 5, class_="whisker")
                for x in (low, high)
            ),
            _element("circle", cx=axis(value), cy=y, r=6, class_="dot"),
        ]
        told = f"{_label(name)}: {number(value)} %, 95 % interval {interval(method.get('mean_recall_ci'))}"
        parts += [
            _text(_label(name), 120, y + 5, "end", "strong" if name == "curated" else ""),
            _group(told, marks, "curated" if name == "curated" else "baseline"),
            _text(number(value, 1), WIDTH - 8, y + 5, "end", "strong" if name == "curated" else ""),
        ]
    parts.append(_text("mean recall, %", (axis.start + axis.end) / 2, height - 6, "middle", "small"))
    return _svg(height, "Mean recall of each method with 95 % intervals", parts)


def influence_by_quantile(strata: Mapping[str, Sequence[Any]]) -> list[Quantile]:
    """Means over the clusters of each quality quantile, weighted by pairs; strata are taken as independent.

    Strata in which nothing was scored count for `pairs` and `kept` alone.
    """
    columns = {name: np.asarray(values, float) for name, values in strata.items() if name != "stratum"}
    found = []
    for index in np.unique(columns["quantile"]):
        rows = columns["quantile"] == index
        pairs, influence, se = (columns[name][rows] for name in ("pairs", "influence", "influence_se"))
        known = np.isfinite(influence) & (pairs > 0)
        weight = np.where(known, pairs, 0.0)
        total = weight.sum() or math.nan
        spread = np.where(known & np.isfinite(se), weight * se, 0.0)
        everything = pairs.sum() or math.nan
        found.append(
            Quantile(
                index=int(index),
                pairs=int(pairs.sum()),
                scored=int(columns["scored"][rows].sum()),
                quality=float(np.nansum(pairs * columns["quality"][rows]) / everything),
                influence=float(np.where(known, weight * influence, 0.0).sum() / total),
                se=float(np.sqrt((spread**2).sum()) / total),
                kept=float(np.nansum(pairs * columns["kept"][rows]) / everything),
            )
        )
    return found


def influence_chart(quantiles: Sequence[Quantile], threshold: float = 0.0) -> Markup:
    """A bar for each quality quantile from zero to its influence, error bars of 1.96 SE, and what is kept."""
    bars = [q for q in quantiles if is_number(q.influence)]
    if not bars:
        return Markup()
    ends = [q.influence + sign * 1.96 * q.se for q in bars for sign in (-1, 1)]
    unit = Unit.of(ends)
    height, bottom = 330, 262
    x = Axis(-0.5, len(quantiles) - 0.5, 62, WIDTH - 12)
    y = Axis.over([*ends, 0.0, threshold], bottom, 14)
    width = min(34.0, 0.72 * (x(1) - x(0)))
    parts = [
        _element("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), class_="zero" if tick == 0 else "grid")
        + _text(unit.tick(tick), x.start - 8, y(tick) + 4, "end", "small")
        for tick in y.ticks()
    ]
    every = 1 if len(quantiles) <= 20 else 5
    for place, q in enumerate(quantiles):
        parts.append(_strip(x(place) - width / 2, bottom + 8, width, 8, q))
        if place % every == 0:
            parts.append(_text(str(q.index), x(place), bottom + 34, "middle", "small"))
        if not is_number(q.influence):
            continue
        top, base = sorted((y(q.influence), y(0.0)))
        low, high = (y(q.influence + sign * 1.96 * q.se) for sign in (-1, 1))
        told = (
            f"Quantile {q.index}: influence {unit.show(q.influence)} ± {unit.show(1.96 * q.se)} "
            f"({unit.name}), {count(q.pairs)} pairs, {percent(q.kept)} kept"
        )
        bar = _element(
            "rect",
            x=round(x(place) - width / 2, 1),
            y=top,
            width=round(width, 1),
            height=round(max(base - top, 1.0), 1),
            rx=2,
            class_=_side(q.influence, threshold),
        )
        whisker = _element("line", x1=x(place), x2=x(place), y1=low, y2=high, class_="whisker")
        parts.append(_group(told, [bar, whisker]))
    if threshold:
        parts.append(
            _element("line", x1=x.start, x2=x.end, y1=y(threshold), y2=y(threshold), class_="threshold")
        )
    middle = (bottom + y.end) / 2
    turned = _text(
        f"influence, {unit.name}", 14, middle, "middle", "small", transform=f"rotate(-90 14 {middle})"
    )
    parts += [
        turned,
        _text("kept", x.start - 8, bottom + 16, "end", "small"),
        _text("quality quantile, worst to best", (x.start + x.end) / 2, height - 8, "middle", "small"),
    ]
    return _svg(height, "Influence by quality quantile with 95 % error bars", parts)


def map_clusters(strata: Mapping[str, Sequence[Any]]) -> list[int]:
    """The clusters that the map shows: the MAP_CLUSTERS largest, those of lowest mean influence first."""
    cluster, pairs, pooled = (np.asarray(strata[name], float) for name in ("cluster", "pairs", "pooled"))
    sizes = {int(c): pairs[cluster == c].sum() for c in np.unique(cluster)}
    largest = sorted(sizes, key=lambda c: (-sizes[c], c))[:MAP_CLUSTERS]

    def mean(c: int) -> float:
        rows = (cluster == c) & np.isfinite(pooled)
        return float((pairs * pooled)[rows].sum() / max(pairs[rows].sum(), 1.0))

    return sorted(largest, key=lambda c: (mean(c), c))


def influence_map(strata: Mapping[str, Sequence[Any]], threshold: float = 0.0) -> Markup:
    """Pooled influence of each stratum, cluster by quantile; pruned strata are crossed out, empty ones blank."""
    clusters = map_clusters(strata)
    quantiles = sorted({int(q) for q in strata["quantile"]})
    if not clusters or not quantiles:
        return Markup()
    values = [float(v) for v in strata["pooled"] if v is not None and is_number(v)]
    unit = Unit.of(values)
    strongest = max((abs(v - threshold) for v in values), default=0.0) or 1.0
    named = {int(c): str(name).partition("/")[0] for c, name in zip(strata["cluster"], strata["stratum"])}
    row_of, place_of = ({key: i for i, key in enumerate(keys)} for keys in (clusters, quantiles))
    left, cell_height = 62, 18
    cell = (WIDTH - left - 8) / len(quantiles)
    height = cell_height * len(clusters) + 52
    parts = [
        _text(named[cluster], left - 8, 13 + cell_height * row, "end", "small")
        for cluster, row in row_of.items()
    ]
    every = 1 if len(quantiles) <= 20 else 5
    parts += [
        _text(str(q), left + cell * (place + 0.5), height - 28, "middle", "small")
        for q, place in place_of.items()
        if place % every == 0
    ]
    columns = ("cluster", "quantile", "pairs", "pooled", "pooled_se", "kept")
    for cluster, q, pairs, pooled, se, kept in zip(*(strata[name] for name in columns), strict=True):
        if int(cluster) not in row_of or not pairs or pooled is None or not is_number(float(pooled)):
            continue
        x, y = left + cell * place_of[int(q)], cell_height * row_of[int(cluster)]
        strength = abs(float(pooled) - threshold) / strongest
        marks = [
            _element(
                "rect",
                x=round(x, 1),
                y=y,
                width=round(cell - 1, 1),
                height=cell_height - 1,
                class_=_side(float(pooled), threshold),
                fill_opacity=round(0.12 + 0.88 * math.sqrt(strength), 2),
            )
        ]
        if kept == 0:
            path = f"M{x + 2:.1f} {y + cell_height - 3}L{x + cell - 3:.1f} {y + 2}"
            marks.append(_element("path", d=path, class_="cross"))
        told = (
            f"Cluster {int(cluster)}, quantile {int(q)}: pooled influence {unit.show(float(pooled))} "
            f"± {unit.show(None if se is None else 1.96 * float(se))} ({unit.name}), "
            f"{count(pairs)} pairs, {percent(kept)} kept"
        )
        parts.append(_group(told, marks))
    parts.append(_text("quality quantile, worst to best", (left + WIDTH) / 2, height - 8, "middle", "small"))
    return _svg(height, "Pooled influence of each stratum, cluster by quality quantile", parts)


def caption_control_chart(caption_control: Mapping[str, Any]) -> Markup:
    """Where the mean of all pairs lies between captions swapped on purpose and the better half."""
    points = {
        "swapped on purpose": caption_control.get("influence_permuted"),
        "all pairs": caption_control.get("influence_mean"),
        "better half": caption_control.get("influence_top_half"),
    }
    values = [value for value in points.values() if value is not None and is_number(value)]
    if len(values) < len(points):
        return Markup()
    unit = Unit.of(values)
    height, line = 116, 56
    axis = Axis.over([*values, 0.0], 40, WIDTH - 40)
    parts = [
        _element("line", x1=axis.start, x2=axis.end, y1=line, y2=line, class_="zero"),
        *(
            _element("line", x1=axis(tick), x2=axis(tick), y1=line - 4, y2=line + 4, class_="zero")
            + _text(unit.tick(tick), axis(tick), height - 36, "middle", "small")
            for tick in axis.ticks()
        ),
    ]
    for (name, _), value, above in zip(points.items(), values, (34, 16, 34)):
        told = f"{name}: influence {unit.show(value)} ({unit.name})"
        marks = [
            _element("line", x1=axis(value), x2=axis(value), y1=above + 6, y2=line - 7, class_="grid"),
            _element("circle", cx=axis(value), cy=line, r=6, class_=f"dot {_side(value, 0.0)}"),
        ]
        anchor = "start" if axis(value) < 140 else "end" if axis(value) > WIDTH - 140 else "middle"
        parts += [_group(told, marks), _text(name, axis(value), above, anchor, "")]
    parts.append(_text(f"held-out influence, {unit.name}", WIDTH / 2, height - 8, "middle", "small"))
    return _svg(height, "The caption_control check: three mean influences on one axis", parts)


def _strip(x: float, y: float, width: float, height: float, q: Quantile) -> Markup:
    """A small gauge of the fraction kept."""

    def bar(fraction: float, class_: str) -> Markup:
        length = round(width * fraction, 1)
        return _element("rect", x=round(x, 1), y=y, width=length, height=height, rx=2, class_=class_)

    kept = q.kept if is_number(q.kept) else 0.0
    return _group(f"Quantile {q.index}: {percent(q.kept)} kept", [bar(1.0, "empty"), bar(kept, "full")])


def _side(value: float, threshold: float) -> str:
    return "bad" if value < threshold else "good"


def _bounds(method: Mapping[str, Any]) -> tuple[float, float]:
    low, high = method.get("mean_recall_ci") or (method["mean_recall"],) * 2
    return low, high


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    names = list(LABELS)
    return (names.index(item[0]) if item[0] in names else len(names), item[0])


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _element(tag: str, inner: Markup | None = None, **attributes: object) -> Markup:
    """An SVG element; a trailing underscore of an attribute's name is dropped, others become hyphens."""
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), value)
        for name, value in attributes.items()
    )
    opening = Markup("<") + tag + written
    return opening + Markup("/>") if inner is None else opening + Markup(">") + inner + Markup(f"</{tag}>")


def _text(text: str, x: float, y: float, anchor: str, class_: str, **attributes: object) -> Markup:
    return _element("text", escape(text), x=round(x, 1), y=y, text_anchor=anchor, class_=class_, **attributes)


def _group(told: str, marks: Sequence[Markup], class_: str = "mark") -> Markup:
    """Marks that belong together, with the text that a pointer or a screen reader finds."""
    return _element("g", _element("title", escape(told)) + Markup("").join(marks), class_=class_)


def _svg(height: float, told: str, parts: Sequence[Markup]) -> Markup:
    return _element(
        "svg",
        Markup("").join(parts),
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=told,
    )
