"""`report.html`: what was kept, whether that helped, and why, on one page that needs no network."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined

from influencespace.data.artifacts import atomic_path, read_manifest
from influencespace.errors import InputError
from influencespace.report import charts, table
from influencespace.report.pictures import BATCH_ROWS, Example, examples
from influencespace.stages.finish import STAGES

REPORT = "report.html"
ROLES = ("pool", "target", "test")

# JSON sorts them by name; any other stage comes last.
IN_ORDER = ("embed", *STAGES)

# Reasons of rejection on the page, and examples of each; the rest is counted.
REASONS_SHOWN = 12
EXAMPLES_SHOWN = 3
MAX_CONFIG = 50_000  # characters

EXPLANATIONS = {
    "harmful": "the pooled influence of its like is below the threshold, by the rule: training on them raises the target loss",
    "over target size": "nothing is wrong with it, but a target size was asked for and others come first",
    "redundant": "a copy, or nearly one, of a pair that is kept: the same picture with the same caption",
}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How many pairs met one fate."""

    reason: str
    pairs: int
    share: float
    meaning: str


@dataclass(frozen=True, kw_only=True)
class RejectedReason:
    """Pairs that could not be read for one reason, and some of them as (file, uid)."""

    reason: str
    pairs: int
    examples: list[tuple[str, str]]


def write_report(run: Path | str) -> Path:
    """Write `report.html` of a finished run from its artifacts, and return its path.

    What an artifact does not hold is left out of the page; the same artifacts give the same page. Raises
    InputError when `summary.json` or `curated.parquet` is missing or damaged.
    """
    run = Path(run)
    path = run / REPORT
    html = environment().get_template("report.html.j2").render(_content(run))
    with atomic_path(path) as aside:
        aside.write_text(html, encoding="utf-8")
    return path


@cache
def environment() -> Environment:
    """The templates of the pages."""
    # Captions come from the open web: everything is escaped unless it is Markup made by ourselves.
    templates = Environment(
        loader=PackageLoader("influencespace.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for show in (table.count, table.percent, table.seconds, table.number, table.signed, table.interval):
        templates.filters[show.__name__] = show
    return templates


def _content(run: Path) -> dict[str, Any]:
    summary = table.read_summary(run)
    curated = run / "curated.parquet"
    if not curated.is_file():
        raise InputError(f"{run} has no curated.parquet: run the same command again to finish the run")
    curate = _best_round(run, summary) / "curate"
    manifest = read_manifest(curate)
    details = manifest.details if manifest else {}
    threshold = float(details.get("threshold") or 0.0)
    caption_control = summary.get("caption_control") or details.get("caption_control") or {}
    rows = table.method_rows(summary)
    try:
        decisions = _decisions(curated)
        pairs = examples(run, threshold, float(details.get("margin") or 0.0))
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{curated} is damaged ({error}): remove it and run again") from None
    return {
        "name": run.resolve().name,
        "title": table.title(summary),
        "findings": table.findings(summary),
        "notices": list(dict.fromkeys([*summary.get("notes", []), *details.get("warnings", [])])),
        "summary": summary,
        "rows": rows,
        "zero_shot": any(row.zero_shot != table.MISSING for row in rows),
        "directions": table.DIRECTIONS,
        "cuts": table.CUTS,
        "recall_chart": charts.recall_chart(summary),
        "decisions": decisions,
        "rule": details.get("rule", ""),
        "strata": _strata(curate / "strata.parquet", threshold),
        "caption_control": caption_control,
        "caption_control_chart": charts.caption_control_chart(caption_control),
        "groups": _groups(pairs),
        "unit": _score_unit(pairs),
        "rejected": _rejected(run, summary.get("rejected_reasons", {})),
        "rejected_pairs": sum(summary.get("rejected", {}).values()),
        "reasons_shown": REASONS_SHOWN,
        "stages": _stages(summary),
        "config": _config(run / "config.yaml"),
    }


def _best_round(run: Path, summary: Mapping[str, Any]) -> Path:
    """The folder of the round whose subset was taken; the first round is the run folder itself."""
    rounds = summary.get("rounds") or []
    best = min(rounds, key=lambda each: each["target_loss"], default=None)
    folder = run / Path(best["folder"]).name if best else run
    return folder if re.fullmatch(r"round-\d+", folder.name) and folder.is_dir() else run


def _decisions(curated: Path) -> list[Decision]:
    counted: Counter[str] = Counter()
    for batch in pq.ParquetFile(curated).iter_batches(BATCH_ROWS, columns=["reason"]):
        for group in pc.value_counts(batch.column("reason")).to_pylist():
            counted[group["values"] or "unknown"] += group["counts"]
    total = counted.total() or 1
    return [
        Decision(reason=reason, pairs=pairs, share=pairs / total, meaning=EXPLANATIONS.get(reason, ""))
        for reason, pairs in sorted(counted.items(), key=lambda item: (item[0] != "kept", -item[1], item[0]))
    ]


def _strata(path: Path, threshold: float) -> dict[str, Any] | None:
    """Charts of the influence by stratum and the numbers behind them; None where there are none."""
    if not path.is_file():
        return None
    strata = pq.read_table(path).to_pydict()
    quantiles = charts.influence_by_quantile(strata)
    if not any(table.is_number(q.influence) for q in quantiles):
        return None
    clusters = len(set(strata["cluster"]))
    return {
        "quantiles": quantiles,
        "unit": charts.Unit.of([q.influence for q in quantiles]),
        "chart": charts.influence_chart(quantiles, threshold),
        "map": charts.influence_map(strata, threshold),
        "clusters": clusters,
        "clusters_shown": min(clusters, charts.MAP_CLUSTERS),
    }


def _groups(pairs: Mapping[str, list[Example]]) -> list[dict[str, Any]]:
    titles = {
        "best": ("Best", "Kept pairs of the highest score."),
        "borderline": ("Borderline", "Pairs nearest to the decision: a coin toss."),
        "worst": ("Worst", "Pairs of the lowest score."),
    }
    return [
        {"name": name, "title": title, "told": told, "pairs": pairs[name]}
        for name, (title, told) in titles.items()
        if pairs[name]
    ]


def _score_unit(pairs: Mapping[str, list[Example]]) -> charts.Unit:
    return charts.Unit.of([pair.score for group in pairs.values() for pair in group])


def _rejected(run: Path, reasons: Mapping[str, int]) -> list[RejectedReason]:
    """The reasons by their counts, with examples from the lists of rejected pairs."""
    found: dict[str, list[tuple[str, str]]] = {reason: [] for reason in reasons}
    for role in ROLES:
        path = run / "embed" / role / "rejected.parquet"
        if not reasons or not path.is_file():
            continue
        for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=["shard", "uid", "reason"]):
            for row in batch.to_pylist():
                listed = found.get(row["reason"])
                if listed is not None and len(listed) < EXAMPLES_SHOWN:
                    listed.append((row["shard"].rpartition("/")[2], row["uid"]))
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return [RejectedReason(reason=name, pairs=pairs, examples=found[name]) for name, pairs in ordered]


def _stages(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Time and rows of each stage, in the order of the work; `share` of the longest one."""
    stages = dict(sorted(summary.get("stages", {}).items(), key=_stage_order))
    longest = max((stage.get("seconds") or 0.0 for stage in stages.values()), default=0.0) or 1.0
    return [
        {
            "name": name,
            "seconds": stage.get("seconds"),
            "share": (stage.get("seconds") or 0.0) / longest,
            "rows_in": stage.get("rows_in"),
            "rows_out": stage.get("rows_out"),
            "rejected": stage.get("rejected"),
        }
        for name, stage in stages.items()
    ]


def _stage_order(item: tuple[str, Any]) -> tuple[int, int, str]:
    """By round, then by place in IN_ORDER: names are like `embed pool`, `proxy`, `proxy (round 2)`."""
    name = item[0]
    stage = name.partition(" ")[0]
    number = re.search(r"\(round (\d+)\)$", name)
    return (
        int(number[1]) if number else 1,
        IN_ORDER.index(stage) if stage in IN_ORDER else len(IN_ORDER),
        name,
    )


def _config(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return "".join(islice(file, 2_000))[:MAX_CONFIG]
