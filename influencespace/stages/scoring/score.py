"""Scoring the whole pool by any estimator of the table, through the proxy's heads: fitted by passes, then scored."""

from dataclasses import dataclass
from dataclasses import field as plain_field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import read_bucket
from influencespace.data.pair_set import PairSet
from influencespace.engine.placement import Resources, fitting
from influencespace.errors import STRICT
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.scoring.memory import scoring_bytes
from influencespace.stages.scoring.scoring import ScoreColumn, ScoringInputs, make_estimator, scoring_pass


@options(frozen=True, kw_only=True, config=STRICT)
class ScoreConfig:
    """Which estimator scores, and how."""

    estimator: str = "ecif"
    """A name of the table."""
    space: str = "heads"
    """The proxy's heads, or parameters of the towers: `last-blocks`, `lora`, `towers`, or patterns of their names."""
    options: dict[str, Any] = plain_field(default_factory=dict)
    """Of the estimator, e.g. {"role": "own"}."""
    bucket_size: int = Field(default=4096, ge=1)
    """Pairs scored in one task; no score depends on it."""

    def details(self, without: int) -> dict[str, Any]:
        """What the manifest reports of these scores, `without` of which are missing."""
        settings = {"estimator": self.estimator, "space": self.space, "options": self.options}
        return settings | {"without_score": without}


SCORES = pa.schema([("uid", pa.string()), ("score", pa.float64())])
"""Columns of scores.parquet."""


@dataclass(frozen=True)
class JoinScores:
    """Task: scores.parquet from the buckets, one after another; the number of pairs without a score."""

    pool: PairSet
    folder: Path
    starts: list[int]

    def __call__(self) -> int:
        without = 0
        with (
            atomic_path(self.folder / "scores.parquet") as aside,
            pq.ParquetWriter(aside, SCORES) as writer,
        ):
            for start in self.starts:
                score = read_bucket(self.folder, "score", start, "score")["score"]
                uids = self.pool.read(slice(start, start + len(score)), "uid")["uid"]
                writer.write_table(pa.table({"uid": pa.array(uids, pa.string()), "score": score}, SCORES))
                without += int((~np.isfinite(score)).sum())
        return without


@dataclass(frozen=True)
class Score(Stage):
    """Scores every pair of a finished run's pool; writes scores.parquet (uid, score) into scores/<name>.

    Higher is more worth keeping; nan where no batch of the bank can judge a pair, counted in the manifest.
    """

    config: ScoreConfig
    needs = ("proxies",)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"scores/{self.config.estimator}"

    def settings(self, config: Any) -> Any:
        return self.config, config.curvature, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        inputs, config = ScoringInputs.of(run), self.config
        estimator = make_estimator(config.estimator, config.options)
        rows = len(run.pool)
        needs = Resources(memory=fitting(scoring_bytes(inputs, config.bucket_size), workers.engine.machines))
        with scoring_pass(workers, inputs, config.bucket_size, rows, resources=needs) as scoring:
            scorer = scoring.fit(estimator, inputs.problem(), rows)
            starts = scoring.write("score", ScoreColumn(scorer), range(rows), label=config.estimator)
        without = workers.once(JoinScores(run.pool, workers.folder, starts))
        return Details(rows_in=rows, rows_out=rows, details=config.details(without))
