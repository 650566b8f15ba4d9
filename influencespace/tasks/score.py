"""Score a finished run's pool by any estimator of the table, in the proxy's heads or through the towers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influencespace.data.artifacts import Manifest
from influencespace.engine.local import Engine
from influencespace.run import Run, Stage, carry_out
from influencespace.stages.scoring.score import Score, ScoreConfig
from influencespace.stages.scoring.scoring import make_estimator
from influencespace.stages.scoring.towers import ScoreThroughTowers, tower_estimator

HEADS = "heads"


def scoring_stage(estimator: str, options: Mapping[str, Any], space: str = HEADS) -> Stage:
    """The stage that scores; raises InputError for an estimator that there is not, or not in this space."""
    config = ScoreConfig(estimator=estimator, options=dict(options), space=space)
    if space == HEADS:
        make_estimator(estimator, options)
        return Score(config)
    tower_estimator(config)
    return ScoreThroughTowers(config)


def score_run(run: Run, stage: Stage, engine: Engine) -> tuple[Path, Manifest]:
    """Score the pool of a finished run; the path of scores.parquet (uid, score) and the manifest."""
    run.summary()  # without one the stages may be of two configs
    manifest = carry_out(stage, run, engine)
    return run.at(stage.name) / "scores.parquet", manifest
