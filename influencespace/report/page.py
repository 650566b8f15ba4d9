"""`report.html`: what was kept, whether that helped, and why, on one page that needs no network."""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined

from influencespace.data.artifacts import atomic_path, read_manifest
from influencespace.data.mirror import here, is_file, is_folder
from influencespace.data.results import read_summary
from influencespace.errors import InputError
from influencespace.report import charts, numbers, strata, table
from influencespace.report.findings import findings, title
from influencespace.report.pictures import BATCH_ROWS, examples

REPORT = "report.html"
ROLES = ("pool", "target", "test")
MAX_REASONS = 12  # of rejections; the others are counted
MAX_EXAMPLES = 3  # of each reason
MAX_CONFIG = 50_000  # characters


def write_report(run: Path | str) -> Path:
    """Write `report.html` of a finished run from its artifacts, and return its path.

    What an artifact does not hold is left out of the page; the same artifacts give the same page. Raises
    InputError when `summary.json` or `curated.parquet` is missing or damaged.
    """
    run = Path(run)
    write_page(run / REPORT, "report", _content(run))
    return run / REPORT


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Fill a template of this folder; every text is escaped."""
    html = _environment().get_template(f"{template}.html.j2").render(content)
    with atomic_path(path) as aside:
        aside.write_text(html, encoding="utf-8")


@cache
def _environment() -> Environment:
    # Captions come from the open web: everything is escaped unless it is Markup made by ourselves.
    templates = Environment(
        loader=PackageLoader("influencespace.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for show in (numbers.count, numbers.percent, numbers.seconds, numbers.number, numbers.gigabytes):
        templates.filters[show.__name__] = show
    return templates


def _content(run: Path) -> dict[str, Any]:
    summary, curated = read_summary(run), run / "curated.parquet"
    if not is_file(curated):
        raise InputError(f"{run} has no curated.parquet: run the same command again to finish the run")
    selection = _best_round(run, summary) / "selection"
    manifest = read_manifest(selection)
    details = manifest.details if manifest else {}
    threshold, margin = (float(details.get(name) or 0.0) for name in ("threshold", "margin"))
    control = summary.get("caption_control") or details.get("caption_control") or {}
    headings, rows = table.rows(summary)
    try:
        decisions, pairs = _decisions(curated), examples(run, threshold, margin)
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{curated} is damaged ({error}): remove it and run again") from None
    return {
        "name": run.resolve().name,
        "title": title(summary),
        "findings": findings(summary),
        "notices": list(dict.fromkeys([*summary.get("notes", []), *details.get("warnings", [])])),
        "summary": summary,
        "headings": headings,
        "rows": rows,
        "methods": {method["name"]: method for method, _ in rows},
        "mean_recall": table.mean_recall,
        "lead": table.lead,
        "recall_chart": charts.recall_chart(summary),
        "decisions": decisions,
        "rule": details.get("rule", ""),
        "strata": _strata(selection / "strata.parquet", threshold),
        "caption_control": control,
        "caption_control_chart": charts.caption_control_chart(control),
        "pairs": pairs,
        "unit": numbers.Unit.of(pair.decision.score for group in pairs.values() for pair in group),
        "rejected": _rejected(run, summary.get("rejected_reasons", {})),
        "max_reasons": MAX_REASONS,
        "config": _config(run / "config.yaml"),
    }


def _best_round(run: Path, summary: Mapping[str, Any]) -> Path:
    """The folder of the round whose subset was taken; the first round is the run folder itself."""
    best = min(summary.get("rounds") or [], key=lambda each: each["target_loss"], default=None)
    folder = run / Path(best["folder"]).name if best else run
    return folder if re.fullmatch(r"round-\d+", folder.name) and is_folder(folder) else run


def _decisions(curated: Path) -> dict[str, int]:
    """Pairs by the reason of their decision: `kept` first, then the most frequent."""
    counts: Counter[str] = Counter()
    for batch in pq.ParquetFile(here(curated)).iter_batches(BATCH_ROWS, columns=["reason"]):
        for group in pc.value_counts(batch.column("reason")).to_pylist():
            counts[group["values"] or "unknown"] += group["counts"]
    return dict(sorted(counts.items(), key=lambda item: (item[0] != "kept", -item[1], item[0])))


def _strata(path: Path, threshold: float) -> dict[str, Any] | None:
    """Charts of the influence by stratum and the numbers behind them; None where there are none."""
    rows = pd.read_parquet(here(path)) if is_file(path) else None
    quantiles = None if rows is None else strata.influence_by_quantile(rows)
    if rows is None or quantiles is None or quantiles["influence"].isna().all():
        return None
    return {
        "quantiles": list(strata.records(quantiles)),
        "unit": numbers.Unit.of(quantiles["influence"]),
        "chart": charts.influence_chart(quantiles, threshold),
        "map": charts.influence_map(rows, threshold),
        "clusters": rows["cluster"].nunique(),
        "max_clusters": strata.MAX_CLUSTERS,
    }


def _rejected(run: Path, reasons: Mapping[str, int]) -> list[tuple[str, int, list[tuple[str, str]]]]:
    """The reasons by their counts, with examples as (file, uid) from the lists of rejected pairs."""
    listed: dict[str, list[tuple[str, str]]] = {reason: [] for reason in reasons}
    for path in (run / "embed" / role / "rejected.parquet" for role in ROLES if reasons):
        for batch in pq.ParquetFile(here(path)).iter_batches(BATCH_ROWS) if is_file(path) else ():
            for row in batch.to_pylist():
                if len(listed.get(row["reason"], [None] * MAX_EXAMPLES)) < MAX_EXAMPLES:
                    listed[row["reason"]].append((row["shard"].rpartition("/")[2], row["uid"]))
    by_count = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return [(reason, pairs, listed[reason]) for reason, pairs in by_count]


def _config(path: Path) -> str:
    if not is_file(path):
        return ""
    with here(path).open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_CONFIG)
