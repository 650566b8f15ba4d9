"""Tracing errors on queries back to training pairs, among the whole pool or by a stored index of projected gradients."""

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.arrays import IntArray
from influencespace.core.projection import TwoSided
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import buckets_of
from influencespace.data.mirror import here, is_file, listing
from influencespace.engine.local import THIN, run_task
from influencespace.errors import STRICT
from influencespace.estimators.ecif import sketch_of
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.problem import Problem
from influencespace.estimators.trace import (
    Candidates,
    Traced,
    Tracer,
    both_ways,
    images_in_bank,
    index_space,
    indexed_gradients,
    largest_products,
    make_tracer,
    most_influential,
    query_directions,
)
from influencespace.models.gradients import Gradients
from influencespace.models.projected import ReducedSpace, projected
from influencespace.models.space import Inputs
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.scoring.scoring import RowRange, ScoringInputs, new_key, scoring_pass

AT_ONCE = 8  # queries whose directions are held at a time
CANDIDATES = 10  # by score, for each pair that is asked for
SIDES = "sides.safetensors"
LOOKED_UP = 4  # in the index, for each candidate: an exact score then decides


@options(frozen=True, kw_only=True, config=STRICT)
class TraceConfig:
    """How many pairs are wanted, and how they are looked for."""

    top: int = Field(default=20, ge=1)
    """Causes, and as many pairs that held against the error."""
    index_dimension: int = Field(default=1024, ge=1)
    """Numbers that each head's gradient is projected to in the index; more find more of the right pairs."""
    bucket_size: int = Field(default=4096, ge=1)
    """Pairs in one task, and in one shard of the index; no score depends on it."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One training pair behind the proxy's answer to a query."""

    row: int
    """Of the pool."""
    score: float
    """Negative caused the error, positive held against it."""
    own: float
    negative: float
    relative_influence: float


@dataclass(frozen=True, kw_only=True)
class Causes:
    """What was found for one query, in falling order of relative influence."""

    harmful: list[Cause]
    helpful: list[Cause]


def trace(
    inputs: ScoringInputs,
    queries: Inputs,
    config: TraceConfig,
    workers: Workers,
    index: Path | None = None,
) -> list[Causes]:
    """Trace queries, given by embeddings (two (Q, D)), back to the pool: exact scores, whichever way pairs are looked for.

    Without an index the whole pool is scored, by one forward-mode pass for every AT_ONCE queries. With the folder of a
    `GradientIndex`, exact search in it names candidates, which are then scored. Raises InputError where a query has no
    usable loss.
    """
    problem = inputs.problem(path=False)
    sketch = sketch_of(problem, inputs.curvature)
    causes: list[Causes] = []
    for start, stop in buckets_of(len(queries[0]), AT_ONCE):
        part = queries[0][start:stop], queries[1][start:stop]
        group = NegativeBatch(inputs=part, image=images_in_bank(problem.bank, part[0]))
        directions = query_directions(problem, group, sketch, inputs.curvature)
        tracer = make_tracer(problem, directions)
        candidates = config.top * CANDIDATES
        if index is None:
            nearest = _scan(inputs, tracer, candidates, config, workers)
        else:
            vectors = _reduced(problem, index).project(directions.sum(1).double())
            nearest = _search(index, torch.cat([-vectors, vectors]), LOOKED_UP * candidates, workers)
        job = Judge(inputs=inputs, tracer=tracer, nearest=nearest, candidates=candidates, top=config.top)
        causes += workers.once(job)
    return causes


@dataclass(frozen=True)
class ScanRange:
    """Job: the candidates among a range of the pairs, by their scores."""

    tracer: Tracer
    count: int
    key: str

    def __call__(self, inputs: ScoringInputs, rows: RowRange) -> Candidates:
        batch = inputs.batch(np.arange(*rows))
        traced = self.tracer(batch.inputs, batch.image)
        return Candidates.among(both_ways(traced.score), batch.row, self.count)


def _scan(
    inputs: ScoringInputs, tracer: Tracer, count: int, config: TraceConfig, workers: Workers
) -> Candidates:
    rows = len(inputs.pool)
    spans = list(buckets_of(rows, config.bucket_size))
    with (
        workers.progress(len(spans), "buckets") as bar,
        scoring_pass(workers, inputs, config.bucket_size, rows) as scoring,
    ):
        scan = ScanRange(tracer, count, new_key())
        result: Candidates = scoring.pool.fold(spans, Candidates.merge, scan, done=lambda _: bar.advance())
    return result


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Task: exact scores of the candidates of every query, and the choice among them."""

    inputs: ScoringInputs
    tracer: Tracer
    nearest: Candidates
    candidates: int
    top: int

    def __call__(self) -> list[Causes]:
        return [self._judge(query) for query in range(len(self.nearest.row) // 2)]

    def _judge(self, query: int) -> Causes:
        pool, opposite = self.inputs.pool, query + len(self.nearest.row) // 2
        rows = np.union1d(self.nearest.rows(query), self.nearest.rows(opposite))
        if not len(rows):
            return Causes(harmful=[], helpful=[])
        traced = self.tracer(pool.inputs(rows), pool.read(rows, "image")["image"])
        harmful, helpful = (
            [
                _cause(traced, query, int(column), int(rows[column]))
                for column in most_influential(traced, query, sign, self.candidates, self.top)
            ]
            for sign in (-1, 1)
        )
        return Causes(harmful=harmful, helpful=helpful)


def _cause(traced: Traced, query: int, column: int, row: int) -> Cause:
    return Cause(
        row=row,
        score=float(traced.score[query, column]),
        own=float(traced.own[query, column]),
        negative=float(traced.negative[query, column]),
        relative_influence=float(traced.relative_influence[query, column]),
    )


@dataclass(frozen=True)
class IndexRange:
    """Job: write the projected gradients of a range of the pairs, those that a batch can judge; how many were read."""

    gradients: Gradients
    folder: Path
    key: str

    def __call__(self, inputs: ScoringInputs, rows: RowRange) -> int:
        start, stop = rows
        path = shard_path(self.folder, start)
        if not is_file(path):
            batch = inputs.batch(np.arange(start, stop))
            gradients = self.gradients(batch.inputs, batch.image)
            known = torch.isfinite(gradients).all(1)
            row = torch.from_numpy(batch.row)[known]
            _save(path, {"gradient": gradients[known].float(), "row": row})
        return stop - start


@dataclass(frozen=True)
class GradientIndex(Stage):
    """Stores every pair's projected gradient, a shard for each bucket, for any number of later queries.

    A shard holds `gradient` (n, k) and `row` (n,) of the pairs that some batch can judge; sides.safetensors the
    projection, because its eigenvectors computed elsewhere may have other signs.
    """

    config: TraceConfig
    name = "trace/index"
    needs = ("proxies",)

    def settings(self, config: Any) -> Any:
        return self.config.index_dimension, self.config.bucket_size, config.curvature, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        inputs, out = ScoringInputs.of(run), workers.folder
        problem = inputs.problem(path=False)
        if not is_file(out / SIDES):
            sides = [(p.A, p.B) for p in index_space(problem, self.config.index_dimension).projections]
            _save(
                out / SIDES, {f"{i}.{side}": m for i, both in enumerate(sides) for side, m in zip("AB", both)}
            )
        gradients = indexed_gradients(problem, _reduced(problem, out))
        rows = len(run.pool)
        spans = list(buckets_of(rows, self.config.bucket_size))
        with (
            workers.progress(rows) as bar,
            scoring_pass(workers, inputs, self.config.bucket_size, rows) as scoring,
        ):
            index = IndexRange(gradients, out, new_key())
            scoring.pool.fold(spans, operator.add, index, done=lambda span: bar.advance(span[1] - span[0]))
        known = sum(len(load_rows(shard_path(out, start))) for start, _ in spans)
        details = {"dimension": gradients.space.size, "without_gradient": rows - known}
        return Details(rows_in=rows, rows_out=rows, details=details)


@dataclass(frozen=True, kw_only=True)
class SearchShard:
    """Task: the rows of one shard with the largest products."""

    path: Path
    vectors: Tensor
    count: int

    @property
    def name(self) -> str:
        return f"search in {self.path.name}"

    def __call__(self) -> Candidates:
        shard = load_file(here(self.path))
        return largest_products(shard["gradient"], shard["row"].numpy(), self.vectors, self.count)


def _search(index: Path, vectors: Tensor, count: int, workers: Workers) -> Candidates:
    shards = listing(index, "gradients-*.safetensors")
    tasks = [SearchShard(path=path, vectors=vectors, count=count) for path in shards]
    first, *others = workers.engine.map(run_task, tasks, workers=workers.cores, resources=THIN)
    result: Candidates = first
    for other in others:
        result = result.merge(other)
    return result


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"gradients-{start:012d}.safetensors"


def load_rows(path: Path) -> IntArray:
    """Rows of the pool that a shard of the index holds."""
    with safe_open(here(path), "pt") as file:
        rows: IntArray = file.get_tensor("row").numpy()
    return rows


def _reduced(problem: Problem, index: Path) -> ReducedSpace:
    """The space of a stored index."""
    sides = load_file(here(index / SIDES))
    projections = [
        TwoSided(A, B) for A, B in ((sides[f"{i}.A"], sides[f"{i}.B"]) for i in range(len(sides) // 2))
    ]
    return projected(problem.space, projections)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside)
