"""Detect misaligned pairs: a ranking, a page of the first ones, and how right it is where the truth is known."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from influencespace.core.arrays import FloatArray
from influencespace.core.metrics import auroc, average_precision, precision_recall_at
from influencespace.data.artifacts import atomic_path, write_json
from influencespace.data.results import CURATED, check_result
from influencespace.engine.local import Engine
from influencespace.errors import InputError
from influencespace.report.sheet import Section, cards, write_sheet
from influencespace.run import Run, Stage
from influencespace.tasks.score import score_run, scoring_stage

POOLED = "pooled"
"""The run's own score, for which no work is left."""
MAX_SHOWN = 60
FILES = ("ranking.parquet", "detect.html", "detect.json")
# CSV says nothing of types: a uid of digits would lose its zeros, and any word would be true.
TRUTH = csv.ConvertOptions(column_types={"uid": pa.string(), "wrong": pa.bool_()})
PRECISION_AT = (0.01, 0.05, 0.1, 0.2, 0.3)


def ranking_stage(estimator: str, options: Mapping[str, Any]) -> Stage | None:
    """The stage whose scores rank, None for the run's own; raises InputError for an estimator or options that there are not."""
    if estimator != POOLED:
        return scoring_stage(estimator, options)
    if options:
        raise InputError(f"the run's own score takes no options: leave {', '.join(options)} out")
    return None


def detect_run(
    run: Run, stage: Stage | None, truth: dict[str, bool] | None, engine: Engine
) -> dict[str, Any]:
    """Rank the pairs of a finished run by how misaligned they seem: the lowest score first.

    By the scores of a `ranking_stage`. Writes ranking.parquet
    (rank, uid, score), detect.html with the first pairs, and detect.json; with the truth (whether each uid is wrong) also
    AUROC, average precision with the base rate, precision and recall. Returns detect.json and the paths of the files.
    A ranking is of all pairs at once: uids, scores and their order are in memory, some 100 bytes a pair.
    """
    name = POOLED if stage is None else stage.name.removeprefix("scores/")
    if stage is None:
        run.summary()
        scores = check_result(run.folder, CURATED)
    else:
        scores = score_run(run, stage, engine)[0]
    table = pq.read_table(scores, columns=["uid", "score"])
    uids, score = table["uid"].cast(pa.large_string()), table["score"].to_numpy().astype(np.float64)
    order = np.argsort(score, kind="stable")  # nan, which no batch could judge, comes last
    out = run.at("detect") / name
    ranking = {"rank": np.arange(1, len(order) + 1), "uid": uids.take(order), "score": score[order]}
    with atomic_path(out / "ranking.parquet") as aside:
        pq.write_table(pa.table(ranking), aside)
    result: dict[str, Any] = {"estimator": name, "pairs": len(uids)}
    sentences = [
        f"Pairs of lowest score by the estimator {name}: they lower the target loss least, or raise it."
    ]
    if truth is not None:
        result |= judged(uids.to_pylist(), score, truth)
        sentences.append(
            f"AUROC {result['auroc']:.3f}, average precision {result['average_precision']:.3f} "
            f"(base rate {result['base_rate']:.3f}) for {result['wrong']:,} wrong pairs among {result['known']:,}."
        )
    write_json(out / "detect.json", result)
    first = [
        (uids[int(i)].as_py(), f"{rank} · score {score[i]:.3g}")
        for rank, i in enumerate(order[:MAX_SHOWN], 1)
    ]
    known = first[: int(np.isfinite(score).sum())]
    shown = Section(cards=cards(run.pool.folder, known))
    write_sheet(out / "detect.html", "Pairs that look misaligned", sentences, [shown])
    return result | {"paths": {name: str(out / name) for name in FILES}}


def read_truth(path: Path) -> dict[str, bool]:
    """Which uids are wrong, from a Parquet or CSV file with the columns uid and wrong; raises InputError."""
    if path.is_dir() and not any(path.glob("*.parquet")):
        raise InputError(
            f"truth file {path} is a folder without Parquet files: give a Parquet or CSV file with the columns uid and wrong"
        )
    try:
        table = csv.read_csv(path, convert_options=TRUTH) if path.suffix == ".csv" else pq.read_table(path)
        columns = [table[name].to_pylist() for name in ("uid", "wrong")]
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"truth file {path} cannot be read: {str(error).splitlines()[0]}") from None
    except KeyError:
        raise InputError(
            f"truth file {path} has the columns {', '.join(table.column_names)}; uid and wrong (true or false) are needed"
        ) from None
    unknown = [value for value in columns[1] if not isinstance(value, bool) and value not in (0, 1)]
    if unknown:
        raise InputError(
            f"truth file {path} has {unknown[0]!r} in its column wrong; true or false are needed"
        )
    return {str(uid): bool(wrong) for uid, wrong in zip(*columns)}


def judged(uids: list[str], score: FloatArray, truth: dict[str, bool]) -> dict[str, Any]:
    """Scores against the truth of the uids that it knows; raises InputError where it knows too few."""
    known = np.array([uid in truth for uid in uids]) & np.isfinite(score)
    wrong = np.array([truth.get(uid, False) for uid in uids])[known]
    if not wrong.any() or wrong.all():
        raise InputError(
            f"the truth file knows {int(known.sum())} of the {len(uids)} scored pairs, {int(wrong.sum())} of them wrong: "
            "wrong and right ones are needed; do its uids match those of curated.parquet?"
        )
    suspicion = -score[known]
    at = {f"{share:g}": precision_recall_at(suspicion, wrong, share) for share in PRECISION_AT}
    return {
        "known": int(known.sum()),
        "unknown": int(len(uids) - known.sum()),
        "wrong": int(wrong.sum()),
        "base_rate": float(wrong.mean()),
        "auroc": auroc(suspicion, wrong),
        "average_precision": average_precision(suspicion, wrong),
        "precision_at": {share: precision for share, (precision, _) in at.items()},
        "recall_at": {share: recall for share, (_, recall) in at.items()},
    }
