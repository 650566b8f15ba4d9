"""The score stage: any estimator of the table over the whole pool, its passes folded and its scores mapped over blocks."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as plain_field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass as options

from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen
from influencespace.data.buckets import buckets_of, has_bucket, join_buckets, read_columns, write_bucket
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, Pool, run_once
from influencespace.engine.progress import progress
from influencespace.errors import InputError
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch
from influencespace.estimators.problem import (
    Batch,
    Estimator,
    Fold,
    IntArray,
    Problem,
    Scorer,
    checkpoints_of,
    fitted,
)
from influencespace.estimators.table import TABLE
from influencespace.models.space import Inputs, Space
from influencespace.models.trajectory import Trajectory
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.proxies.proxies import (
    ALL,
    Proxy,
    ProxyConfig,
    TargetHalves,
    beginning,
    proxy_steps,
)
from influencespace.stages.scoring.curvature import ProxySpace, TargetConfig

Span = tuple[int, int]


@options(frozen=True, kw_only=True)
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


def make_estimator(name: str, given: Mapping[str, Any]) -> Estimator:
    """An estimator of the table; raises InputError for an unknown name or an option that does not fit."""
    if name not in TABLE:
        raise InputError(f"there is no estimator {name!r}; there are {', '.join(sorted(TABLE))}")
    try:
        return TABLE[name](**given)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InputError(f"the estimator {name} does not take {dict(given)}: {'; '.join(wrong)}") from None


@dataclass(frozen=True, kw_only=True)
class ScoringInputs:
    """A pool with the proxy that was trained on it and the target: what estimators are given."""

    pool: PairSet
    target: PairSet
    proxies: ProxyConfig
    curvature: CurvatureConfig
    proxy_folder: Path

    def problem(self) -> Problem:
        """The problem of the proxy of all pairs, with the half of the target that gives gradients."""
        space = ProxySpace(
            pool=self.pool,
            target=self.target,
            proxies=self.proxies,
            config=self.curvature,
            target_config=TargetConfig(),
            proxy=Proxy(self.proxy_folder, ALL),
        )
        path = self.trajectory(space.space)
        halves = TargetHalves(self.target, self.proxies.seed)
        contexts = halves.contexts(halves.gradient, self.proxies.train.batch_size)
        return Problem(
            space=space.space,
            objective=space.objective,
            batch_size=self.proxies.train.batch_size,
            pool_size=len(self.pool),
            bank=space.proxy.reference_bank(self.pool),
            target=[
                NegativeBatch(inputs=self.target.inputs(rows), image=self.target.image[rows])
                for rows in contexts
            ],
            preconditioner=space.preconditioner,
            damping=space.damping,
            checkpoints=checkpoints_of(path),
            trajectory=path,
            seed=self.proxies.seed,
        )

    def trajectory(self, space: Space) -> Trajectory:
        """The training of the proxy of all pairs, replayed from its seed and steps where it is asked for."""
        proxy, steps = self.proxies, proxy_steps(self.proxy_folder)
        train, seed = replace(proxy.train, steps=steps), proxy.seed + 1
        heads, batches = beginning(self.pool, np.ones(len(self.pool)), train, seed)
        initial = Space(heads)
        return Trajectory(
            space=space,
            initial=initial.flatten(initial.parameters),
            config=train,
            batches=list(batches),
            inputs=self.pool.inputs,
            objective=train.objective,
        )

    def batch(self, span: Span) -> Batch:
        return batch_of(self.pool, span, self.pool.inputs)


def batch_of(pool: PairSet, span: Span, inputs: Callable[[IntArray], Inputs]) -> Batch:
    """A range of the pool's pairs, with what `inputs` gives of their rows."""
    rows = np.arange(*span)
    place = pool.rows[rows]  # rising, so that only the files' part between its ends is read
    first = int(place[0])
    uids = pool.table.rows(first, int(place[-1]) + 1, "uid")["uid"].take(place - first).to_pylist()
    return Batch(uid=uids, row=rows, inputs=inputs(rows), image=pool.image[rows])


class Scorable(Protocol):
    """A pool whose pairs a scorer can be given."""

    @property
    def pool(self) -> PairSet: ...

    def batch(self, span: Span) -> Batch:
        """A range of its pairs."""


@dataclass(frozen=True)
class FoldSpan:
    """One pass of a fit over some of the pairs."""

    statistic: Fold

    def __call__(self, valued: ScoringInputs, span: Span) -> Any:
        return self.statistic.observe(self.statistic.zero(), valued.batch(span))


@dataclass(frozen=True)
class ScoreSpan:
    """Write the scores of some of the pairs; returns how many."""

    scorer: Scorer
    folder: Path
    mark: str

    def __call__(self, valued: Scorable, span: Span) -> int:
        start, stop = span
        if not has_bucket(self.folder, "score", start, self.mark):
            score = self.scorer(valued.batch(span))
            write_bucket(self.folder, "score", start, self.mark, {"score": score})
        return stop - start


@dataclass(frozen=True)
class Spans:
    """The recipe of a worker that does what it is shared to the spans that it is given."""

    valued: Scorable

    def __call__(self) -> Callable[[Span, Any], Any]:
        return lambda span, job: job(self.valued, span)


@dataclass(frozen=True)
class JoinScores:
    """Task: scores.parquet from the blocks; the number of pairs without a score."""

    valued: Scorable
    folder: Path
    starts: list[int]

    def __call__(self) -> int:
        join_buckets(self.folder, "score", self.starts)
        score = read_columns(self.folder / "score.parquet")["score"]
        uids = list(map(str, self.valued.pool.column("uid")))
        with atomic_path(self.folder / "scores.parquet") as aside:
            pq.write_table(pa.table({"uid": pa.array(uids, pa.string()), "score": pa.array(score)}), aside)
        (self.folder / "score.parquet").unlink(missing_ok=True)
        return int((~np.isfinite(score)).sum())


def score(
    valued: ScoringInputs, inputs: dict[str, str], config: ScoreConfig, out: Path, engine: Engine
) -> Manifest:
    """Score every pair of the pool by an estimator of the table; writes scores.parquet (uid, score).

    Higher is more worth keeping; nan where no context of the bank can judge a pair, counted in the manifest.
    """
    estimator = make_estimator(config.estimator, config.options)
    mark = fingerprint({"stage": "score", "config": config, "curvature": valued.curvature, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    rows = len(valued.pool)
    spans = list(buckets_of(rows, config.bucket_size))
    with engine.pool(Spans(valued), num_actors=min(engine.cores, len(spans))) as workers:

        def run(statistic: Fold) -> Any:
            return workers.fold(spans, statistic.merge, FoldSpan(statistic))

        scorer = fitted(estimator.fit(valued.problem()), run)
        score_spans(workers, spans, ScoreSpan(scorer, out, mark), config.estimator)
    without = run_once(engine, JoinScores(valued, out, [start for start, _ in spans]))
    return finish_stage(out, score_manifest(config, mark, inputs, rows, without), began)


def score_spans(workers: Pool, spans: Sequence[Span], job: ScoreSpan, name: str) -> None:
    """Write the scores of all spans, which begin with the first and end with the last pair."""
    with progress(f"score ({name})", spans[-1][1], "pairs") as bar:

        def add(done: int, more: int) -> int:
            bar.advance(more)
            return done + more

        workers.fold(spans, add, job)
        bar.advance(spans[0][1])  # which all others were added to


def score_manifest(
    config: ScoreConfig, mark: str, inputs: dict[str, str], rows: int, without: int, **details: Any
) -> Manifest:
    """The manifest of scores of `rows` pairs, `without` of which have none."""
    said = {"estimator": config.estimator, "space": config.space, "options": config.options}
    return Manifest(
        stage="score",
        fingerprint=mark,
        inputs=inputs,
        rows_in=rows,
        rows_out=rows,
        details=said | {"without_score": without} | details,
    )
