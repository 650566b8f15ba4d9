"""Figures of the documents, drawn by matplotlib from the benchmarks' JSON; None where the rows are missing or withdrawn."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

GREEN, RED, AMBER, GREY = "#0b6e4f", "#b3261e", "#d98e04", "#6b7480"
LABELS = {
    "curated": "curated (InfluenceSpace)",
    "oracle": "only the right pairs (oracle)",
    "clip_score": "CLIP score, pretrained encoder",
    "proxy_clip_score": "CLIP score, proxy",
    "proxy_neg_clip_loss": "negCLIPLoss, proxy",
    "neg_clip_loss": "negCLIPLoss",
}
WEIGHTS = {0.0: RED, 0.5: AMBER, 2.0: GREEN}  # colour of each weight of a stratum
SERIES = {
    "single_pairs": (RED, "single pairs"),
    "strata": (AMBER, "means of strata"),
    "quality_alone": (GREY, "curve along quality"),
    "all_axes": (GREEN, "all axes (default)"),
}


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same for the same rows."""
    with matplotlib.rc_context({"svg.hashsalt": "influencespace", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def recall(result: dict[str, Any]) -> Figure | None:
    """Mean recall of every method with its interval, the best on top."""
    rows = sorted(of_part(result, "recall"), key=lambda row: float(row["mean_recall"]))
    if not rows:
        return None
    figure = Figure(figsize=(7.2, 0.8 + 0.35 * len(rows)))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        colour, value = GREEN if row["method"] == "curated" else GREY, row["mean_recall"]
        around = [[value - row["interval"][0]], [row["interval"][1] - value]]
        axes.errorbar(value, y, xerr=around, fmt="o", color=colour)
        axes.annotate(
            f"{value:.1f}", (row["interval"][1], y), (6, -4), textcoords="offset points", color=colour
        )
    axes.set_yticks(range(len(rows)), [LABELS.get(row["method"], row["method"]) for row in rows])
    axes.set_title(
        f"Mean recall, %, at equal steps ({len(result['seeds'])} seeds, 95 % CI over images)", fontsize=11
    )
    return figure


def calibration(result: dict[str, Any]) -> Figure | None:
    """Predicted against real change of the target loss: a dot a stratum and weight, a panel an estimator."""
    rows = [row for row in of_part(result, "points") if row["truth"] == "sampling_weights"]
    if not rows:
        return None
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    figure = Figure(figsize=(4 * len(names), 4.2))
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names):
        for row in (row for row in rows if row["estimator"] == name):
            label = f"weight {row['weight']:g}"
            axes.scatter(
                row["predicted"], row["real"], s=14, color=WEIGHTS[row["weight"]], label=label, alpha=0.75
            )
        axes.axline((0, 0), slope=1, linestyle="--", color=GREY)
        axes.set(title=name, xlabel="predicted", ylabel="real", aspect="equal")
    panels[0].legend()
    figure.suptitle("Change of the target loss when a stratum is weighted anew")
    return figure


def ablations(result: dict[str, Any], columns: int = 4) -> Figure | None:
    """AUROC against the value of every setting: a panel a setting, a line for each way to pool."""
    rows = [row for row in result["table"] if "setting" in row]
    if not rows:
        return None
    names = list(dict.fromkeys(row["setting"] for row in rows))
    height = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.4 * height), layout="constrained")
    panels = figure.subplots(height, columns, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, names):
        panel = [row for row in rows if row["setting"] == name]
        values = [str(row["value"]).split("_")[0] for row in panel]
        for series, (colour, label) in SERIES.items():
            axes.plot(
                values, [row[series] for row in panel], marker="o", markersize=3, color=colour, label=label
            )
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.tick_params(labelsize=7)
    for axes in list(panels)[len(names) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SERIES))
    return figure


def of_part(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in result["table"] if row["part"] == part]
