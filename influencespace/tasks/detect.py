"""Detect misaligned pairs: a ranking, a page of the first ones, and how right it is where the truth is known."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from influencespace.core.arrays import BoolArray, FloatArray
from influencespace.core.metrics import auroc, average_precision, precision_recall_at
from influencespace.data.artifacts import atomic_path, write_json
from influencespace.data.buckets import read_rows
from influencespace.data.mirror import here
from influencespace.data.results import CURATED, check_result
from influencespace.data.sorting import sorted_tables
from influencespace.engine.local import Engine
from influencespace.errors import InputError
from influencespace.report.sheet import Section, cards, write_sheet
from influencespace.run import Run, Stage
from influencespace.stages.passes import RANGE
from influencespace.tasks.score import score_run, scoring_stage

POOLED = "pooled"
"""The run's own score, for which no work is left."""
MAX_SHOWN = 60
FILES = ("ranking.parquet", "detect.html", "detect.json")
# CSV says nothing of types: a uid of digits would lose its zeros, and any word would be true.
TRUTH = csv.ConvertOptions(column_types={"uid": pa.string(), "wrong": pa.bool_()})
RANKING = pa.schema([("rank", pa.int64()), ("uid", pa.large_string()), ("score", pa.float64())])
"""Columns of ranking.parquet."""
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
    Pairs are sorted on disk, range by range; in memory are the truth and the scores of the pairs that it knows.
    """
    name = POOLED if stage is None else stage.name.removeprefix("scores/")
    if stage is None:
        run.summary()
        if run.config.selection.unit == "cluster":
            raise InputError(
                "this run judged whole clusters (selection.unit), whose score does not say which pairs are misaligned: give "
                "--estimator, such as ecif"
            )
        scores = check_result(run.folder, CURATED)
    else:
        scores = score_run(run, stage, engine)[0]
    out = run.at("detect") / name
    pairs = write_ranking(scores, out / "ranking.parquet")
    result: dict[str, Any] = {"estimator": name, "pairs": pairs}
    sentences = [
        f"Pairs of lowest score by the estimator {name}: they lower the target loss least, or raise it."
    ]
    if truth is not None:
        result |= judged(*known_scores(scores, truth), pairs)
        sentences.append(
            f"AUROC {result['auroc']:.3f}, average precision {result['average_precision']:.3f} "
            f"(base rate {result['base_rate']:.3f}) for {result['wrong']:,} wrong pairs among {result['known']:,}."
        )
    write_json(out / "detect.json", result)
    first = read_rows(out / "ranking.parquet", slice(0, MAX_SHOWN), "uid", "score")
    shown = [
        (str(uid), f"{rank} · score {score:.3g}")
        for rank, (uid, score) in enumerate(zip(first["uid"], first["score"], strict=True), 1)
        if np.isfinite(score)
    ]
    sections = [Section(cards=cards(run.pool.folder, shown))]
    write_sheet(out / "detect.html", "Pairs that look misaligned", sentences, sections)
    return result | {"paths": {name: str(out / name) for name in FILES}}


def scored_pairs(scores: Path) -> Iterator[pa.Table]:
    """`uid` and `score` of all pairs, in ranges of their order."""
    with pq.ParquetFile(here(scores)) as file:
        for batch in file.iter_batches(RANGE, columns=["uid", "score"]):
            uid, score = batch["uid"].cast(pa.large_string()), batch["score"].cast(pa.float64())
            yield pa.table({"uid": uid, "score": score})


def write_ranking(scores: Path, path: Path) -> int:
    """Write the pairs in rising order of their scores, nan, which no batch could judge, last; how many they are."""
    count = 0
    with atomic_path(path) as aside, pq.ParquetWriter(aside, RANKING) as writer:
        for table in sorted_tables(scored_pairs(scores), "score", RANGE):
            rank = np.arange(count + 1, count + len(table) + 1)
            writer.write_table(pa.table([rank, table["uid"], table["score"]], schema=RANKING))
            count += len(table)
    return count


def known_scores(scores: Path, truth: Mapping[str, bool]) -> tuple[FloatArray, BoolArray]:
    """Scores of the pairs that the truth knows and a batch could judge, and which of them are wrong: (k,), (k,)."""
    score, wrong = [np.empty(0)], [np.empty(0, bool)]
    for table in scored_pairs(scores):
        values, answers = table["score"].to_numpy(), [truth.get(uid) for uid in table["uid"].to_pylist()]
        known = np.array([answer is not None for answer in answers], bool) & np.isfinite(values)
        score.append(values[known])
        wrong.append(np.array([bool(answer) for answer in answers])[known])
    return np.concatenate(score), np.concatenate(wrong)


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


def judged(score: FloatArray, wrong: BoolArray, pairs: int) -> dict[str, Any]:
    """Scores (k,) against the truth (k,) that is known of so many pairs; raises InputError where it knows too few."""
    if not wrong.any() or wrong.all():
        raise InputError(
            f"the truth file knows {len(wrong)} of the {pairs} scored pairs, {int(wrong.sum())} of them wrong: "
            "wrong and right ones are needed; do its uids match those of curated.parquet?"
        )
    suspicion = -score
    at = {f"{share:g}": precision_recall_at(suspicion, wrong, share) for share in PRECISION_AT}
    return {
        "known": len(wrong),
        "unknown": pairs - len(wrong),
        "wrong": int(wrong.sum()),
        "base_rate": float(wrong.mean()),
        "auroc": auroc(suspicion, wrong),
        "average_precision": average_precision(suspicion, wrong),
        "precision_at": {share: precision for share, (precision, _) in at.items()},
        "recall_at": {share: recall for share, (_, recall) in at.items()},
    }
