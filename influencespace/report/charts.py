"""The charts of the page: SVG by matplotlib, coloured by the page's style sheet, with a text for each mark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from influencespace.report.findings import Summary, methods
from influencespace.report.numbers import Unit, count, interval, is_number, number, percent
from influencespace.report.strata import map_clusters, records

WIDTH = 720
INK, SOFT, GRID, NEUTRAL, GOOD, BAD = "#1d2329", "#5c6670", "#ebe9e4", "#848d96", "#1f6fb2", "#c4521c"
# The page has these as variables, one set for light and one for dark.
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", NEUTRAL: "neutral", GOOD: "good", BAD: "bad"}
STYLE: dict[str, Any] = {
    **{f"axes.spines.{side}": False for side in ("bottom", "left", "right", "top")},
    **{f"{axis}tick.{part}": 0 for axis in "xy" for part in ("major.size", "minor.size")},
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.labelcolor": SOFT,
    "font.size": 13,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": INK,
}


class Chart:
    """A figure of WIDTH x `height` pixels that becomes an SVG element; `label` says what it shows."""

    def __init__(self, label: str, height: float) -> None:
        self.label = label
        self.figure = Figure((WIDTH / 72, height / 72), dpi=72, facecolor="none", layout="constrained")
        self._titles: list[str] = []

    def mark(self, title: str, *artists: Artist) -> None:
        """Give `artists` the text that a pointer finds."""
        for artist in artists:
            artist.set_gid(f"mark-{len(self._titles)}")
            self._titles.append(title)

    def svg(self) -> Markup:
        """The same text for the same chart."""
        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": self.label}):  # lest charts of a page share ids
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        _, _, body = buffer.getvalue().decode().partition("<defs>")  # size and metadata are before it
        body = re.sub(r' id="[\w.]+_\d+"', "", " ".join(body.split()))  # groups as every figure numbers them
        body = re.sub(r"font-family: [^;\"<]*;? ?", "", body)  # the page has its own
        for colour, name in VARIABLES.items():
            body = body.replace(colour, f"var(--{name})")
        body = re.sub(r'<g id="mark-(\d+)">', lambda match: self._opened(int(match[1])), body)
        box = f"0 0 {WIDTH} {72 * self.figure.get_figheight():g}"
        return Markup(f'<svg viewBox="{box}" role="img" aria-label="{escape(self.label)}"><defs>{body}')

    def _opened(self, mark: int) -> str:
        return f'<g class="mark"><title>{escape(self._titles[mark])}</title>'


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A value with its interval, on a line of its own."""

    label: str
    value: float
    ci: Sequence[float]
    colour: str
    title: str


def _dots(label: str, dots: Sequence[Dot], axis: str) -> tuple[Chart, Axes]:
    """One line for each of `dots`, the first on top."""
    chart = Chart(label, 34 * len(dots) + 52)
    axes = chart.figure.add_subplot(xlabel=axis, ylim=(len(dots) - 0.5, -0.5))
    for y, dot in enumerate(dots):
        line = axes.plot(dot.ci, [y, y], "|-", color=dot.colour, markersize=9, linewidth=1.8)
        point = axes.plot(dot.value, y, "o", color=dot.colour, markersize=11)
        chart.mark(dot.title, *line, *point)
        axes.text(1.02, y, number(dot.value, 1), transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(dots)), [_printable(dot.label) for dot in dots])
    axes.grid(axis="x")
    return chart, axes


@rc_context(STYLE)
def recall_chart(summary: Summary) -> Markup:
    """Mean recall of each method with its interval, on one axis."""
    dots = []
    for method in methods(summary):
        value, ci = method.get("mean_recall"), method.get("mean_recall_ci")
        if not is_number(value):
            continue
        known = ci if ci and all(map(is_number, ci)) else (value, value)
        colour = GOOD if method["name"] == "curated" else NEUTRAL
        title = f"{method['label']}: {number(value)} %, 95 % interval {interval(ci)}"
        dots.append(Dot(label=method["label"], value=value, ci=known, colour=colour, title=title))
    if not dots:
        return Markup()
    return _dots("Mean recall of each method with 95 % intervals", dots, "mean recall, %")[0].svg()


@rc_context(STYLE)
def caption_control_chart(control: Mapping[str, Any]) -> Markup:
    """Where the mean of all pairs lies between captions permuted on purpose and the better half."""
    names = {"permuted captions": "permuted", "all pairs": "mean", "better half": "top_half"}
    values = {label: control.get(f"influence_{name}") for label, name in names.items()}
    known = {label: value for label, value in values.items() if is_number(value)}
    if len(known) < len(names):
        return Markup()
    unit, dots = Unit.of(known.values()), []
    for label, value in known.items():
        x, title = unit.scaled(value), f"{label}: influence {unit.show(value)} ({unit.name})"
        dots.append(Dot(label=label, value=x, ci=(x, x), colour=_side(value, 0.0), title=title))
    label = "The permuted-caption control: three mean influences on one axis"
    chart, axes = _dots(label, dots, f"out-of-fold influence, {unit.name}")
    axes.axvline(0, color=NEUTRAL, zorder=0)
    return chart.svg()


@rc_context(STYLE)
def influence_chart(quantiles: pd.DataFrame, threshold: float = 0.0) -> Markup:
    """A bar for each row of `influence_by_quantile`, error bars of 1.96 SE, and the fraction that is kept."""
    bars = quantiles.dropna(subset="influence")
    if bars.empty:
        return Markup()
    unit = Unit.of([*(bars["influence"].abs() + 1.96 * bars["influence_se"])])
    chart = Chart("Influence by quality quantile with 95 % error bars", 330)
    upper, lower = chart.figure.subplots(2, sharex=True, height_ratios=(14, 1))
    for q in records(quantiles):
        whole, part = lower.bar(q.quantile, 1, color=GRID), lower.bar(q.quantile, q.kept, color=NEUTRAL)
        chart.mark(f"Quantile {q.quantile}: {percent(q.kept)} kept", *whole, *part)
    for q in records(bars):
        value, half = unit.scaled(q.influence), unit.scaled(1.96 * q.influence_se)
        bar = upper.bar(q.quantile, value, color=_side(q.influence, threshold))
        line = upper.plot([q.quantile] * 2, [value - half, value + half], color=INK, linewidth=1.4)
        title = f"Quantile {q.quantile}: influence {_influence(unit, q.influence, q.influence_se)}"
        chart.mark(f"{title}, {_fate(q)}", *bar, *line)
    upper.axhline(0, color=NEUTRAL, linewidth=1)
    if threshold:
        upper.axhline(unit.scaled(threshold), color=INK, linestyle="--", linewidth=1)
    upper.set_ylabel(f"influence, {unit.name}")
    upper.grid(axis="y")
    lower.set(yticks=[0.5], yticklabels=["kept"], ylim=(0, 1))
    _quantile_axis(lower)
    return chart.svg()


@rc_context(STYLE)
def influence_map(strata: pd.DataFrame, threshold: float = 0.0) -> Markup:
    """Pooled influence of each stratum, cluster by quantile; removed strata are crossed out, empty ones blank."""
    row = {cluster: place for place, cluster in enumerate(map_clusters(strata))}
    known = strata[strata["pairs"] > 0].dropna(subset="pooled")
    unit, strongest = Unit.of(known["pooled"]), float((known["pooled"] - threshold).abs().max()) or 1.0
    chart = Chart("Pooled influence of each stratum, cluster by quality quantile", 18 * len(row) + 52)
    axes = chart.figure.add_subplot(ylim=(len(row) - 0.5, -0.5))
    for cell in records(known[known["cluster"].isin(row)]):
        x, y = cell.quantile, row[cell.cluster]
        alpha = round(0.12 + 0.88 * (abs(cell.pooled - threshold) / strongest) ** 0.5, 2)
        box = axes.barh(y, 0.94, 0.94, x - 0.47, color=_side(cell.pooled, threshold), alpha=alpha)
        cross = axes.plot([x - 0.4, x + 0.4], [y + 0.3, y - 0.3], color=INK) if cell.kept == 0 else []
        title = f"Cluster {cell.cluster}, quantile {x}: pooled influence"
        chart.mark(f"{title} {_influence(unit, cell.pooled, cell.pooled_se)}, {_fate(cell)}", *box, *cross)
    names = dict(zip(strata["cluster"], strata["stratum"].str.partition("/")[0]))
    axes.set_yticks(range(len(row)), [_printable(names[cluster]) for cluster in row])
    _quantile_axis(axes)
    return chart.svg()


def _influence(unit: Unit, value: float, se: float) -> str:
    return f"{unit.show(value)} ± {unit.show(1.96 * se)} ({unit.name})"


def _fate(strata: Any) -> str:
    return f"{count(strata.pairs)} pairs, {percent(strata.kept)} kept"


def _quantile_axis(axes: Axes) -> None:
    axes.set_xlabel("quality quantile, worst to best")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))


def _side(value: float, threshold: float) -> str:
    return BAD if value < threshold else GOOD


def _printable(text: str) -> str:
    """Without characters that no SVG may hold."""
    return "".join(character for character in text if character.isprintable())
