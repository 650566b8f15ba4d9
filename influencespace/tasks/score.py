"""Score a finished run's pool by any estimator of the table, in the proxy's heads or through the towers."""

import re
from pathlib import Path
from typing import Any

from influencespace.config import RunConfig, load_config
from influencespace.data.artifacts import Manifest
from influencespace.engine.local import Engine
from influencespace.errors import InputError
from influencespace.report.table import read_summary
from influencespace.stages.finish import stage_of
from influencespace.stages.ingest.split import pair_sets
from influencespace.stages.scoring.score import ScoreConfig, ScoringInputs, make_estimator, score
from influencespace.stages.scoring.tower_score import check_tower_estimator, score_through_towers

POOLED = "pooled"
"""The run's own score, for which no work is left."""
HEADS = "heads"


def valued(run: Path | str) -> tuple[ScoringInputs, dict[str, str]]:
    """What estimators are given, from a finished run, and the fingerprints of what it depends on."""
    run = Path(run).expanduser().absolute()
    inputs = {stage: stage_of(run, stage).fingerprint for stage in ("split", "proxy")}
    config: RunConfig = load_config(run / "config.yaml", {})
    sets = pair_sets(run / "split", stage_of(run, "split"))
    return (
        ScoringInputs(
            pool=sets["pool"],
            target=sets["target"],
            proxies=config.proxy,
            curvature=config.curvature,
            proxy_folder=run / "proxy",
        ),
        inputs,
    )


def check_estimator(run: Path, estimator: str, options: dict[str, Any], space: str = HEADS) -> None:
    """Refuse a run that is not finished or an estimator that there is not, before anything starts."""
    if estimator != POOLED:
        make_estimator(estimator, options)
    elif options:
        raise InputError(
            f"the score of the run itself takes no options, and was given {', '.join(options)}: leave them out"
        )
    if space != HEADS:
        check_tower_estimator(ScoreConfig(estimator=estimator, options=options, space=space))
    read_summary(run)  # without one the stages may be of two configs


def score_run(
    run: Path, estimator: str, options: dict[str, Any], engine: Engine, space: str = HEADS
) -> tuple[Path, Manifest]:
    """Score the pool of a finished run by an estimator in a space; returns scores.parquet and the manifest."""
    given, inputs = valued(run)
    run = run.expanduser().absolute()
    config = ScoreConfig(estimator=estimator, options=options, space=space)
    if space == HEADS:
        out = run / "scores" / estimator
        return out / "scores.parquet", score(given, inputs, config, out, engine)
    out = run / "scores" / f"{estimator}-{re.sub(r'[^A-Za-z0-9]+', '-', space).strip('-')}"
    manifest = score_through_towers(
        given.pool,
        given.target,
        given.proxies,
        given.proxy_folder,
        load_config(run / "config.yaml", {}).embed,
        inputs,
        config,
        out,
        engine,
    )
    return out / "scores.parquet", manifest
