"""Score a finished run's pool by any estimator of the table."""

from pathlib import Path
from typing import Any

from influencespace.config import RunConfig, load_config
from influencespace.data.artifacts import Manifest
from influencespace.report.table import read_summary
from influencespace.stages.finish import stage_of
from influencespace.stages.runtime import Runtime
from influencespace.stages.score import ScoreConfig, Valued, make_estimator, score
from influencespace.stages.split import pair_sets

POOLED = "pooled"
"""The run's own score, for which no work is left."""


def valued(run: Path | str) -> tuple[Valued, dict[str, str]]:
    """What estimators are given, from a finished run, and the fingerprints of what it depends on."""
    run = Path(run).expanduser().absolute()
    inputs = {stage: stage_of(run, stage).fingerprint for stage in ("split", "student")}
    config: RunConfig = load_config(run / "config.yaml", {})
    sets = pair_sets(run / "split", stage_of(run, "split"))
    return (
        Valued(
            pool=sets["pool"],
            target=sets["target"],
            students=config.student,
            curvature=config.curvature,
            student_folder=run / "student",
        ),
        inputs,
    )


def check_estimator(run: Path, estimator: str, options: dict[str, Any]) -> None:
    """Refuse a run that is not finished or an estimator that there is not, before anything starts."""
    if estimator != POOLED:
        make_estimator(estimator, options)
    read_summary(run)  # without one the stages may be of two configs


def score_run(run: Path, estimator: str, options: dict[str, Any], runtime: Runtime) -> tuple[Path, Manifest]:
    """Score the pool of a finished run by an estimator; returns scores.parquet and the manifest."""
    given, inputs = valued(run)
    out = run.expanduser().absolute() / "scores" / estimator
    manifest = score(given, inputs, ScoreConfig(estimator=estimator, options=options), out, runtime)
    return out / "scores.parquet", manifest
