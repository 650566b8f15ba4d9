"""The trace stage: the training pairs behind the proxy's errors on queries, among the whole pool or by a stored index."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.projection import TwoSided
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen
from influencespace.data.buckets import buckets_of
from influencespace.engine.local import Engine, run_once, run_task
from influencespace.engine.progress import progress
from influencespace.estimators.ecif import curvature_of
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
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.scoring.score import ScoringInputs, Span, Spans

IntArray = NDArray[np.int64]
AT_ONCE = 8  # queries whose directions are held at a time
CANDIDATES = 10  # by score, for each pair that is asked for
SIDES = "sides.safetensors"
LOOKED_UP = 4  # in the index, for each candidate: an exact score then decides


@options(frozen=True, kw_only=True)
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
    valued: ScoringInputs, queries: Inputs, config: TraceConfig, engine: Engine, index: Path | None = None
) -> list[Causes]:
    """Trace queries, given by embeddings (two (Q, D)), back to the pool: exact scores, whichever way pairs are looked for.

    Without an index the whole pool is scored, by one forward-mode pass for every AT_ONCE queries. With the folder of a
    `gradient_index`, exact search in it names candidates, which are then scored. Raises InputError where a query has no
    usable loss.
    """
    problem = valued.problem()
    sketch = curvature_of(problem, valued.curvature)
    found: list[Causes] = []
    for start in range(0, len(queries[0]), AT_ONCE):
        part = queries[0][start : start + AT_ONCE], queries[1][start : start + AT_ONCE]
        group = NegativeBatch(inputs=part, image=images_in_bank(problem.bank, part[0]))
        directions = query_directions(problem, group, sketch, valued.curvature)
        tracer = make_tracer(problem, directions)
        candidates = config.top * CANDIDATES
        if index is None:
            nearest = _scan(valued, tracer, candidates, config, engine)
        else:
            vectors = _reduced(problem, index).project(directions.sum(1).double())
            nearest = _search(index, torch.cat([-vectors, vectors]), LOOKED_UP * candidates, engine)
        job = Judge(valued=valued, tracer=tracer, nearest=nearest, candidates=candidates, top=config.top)
        found += run_once(engine, job)
    return found


@dataclass(frozen=True)
class ScanSpan:
    """The candidates among some of the pairs, by their scores."""

    tracer: Tracer
    count: int

    def __call__(self, valued: ScoringInputs, span: Span) -> Candidates:
        batch = valued.batch(span)
        traced = self.tracer(batch.inputs, batch.image)
        return Candidates.among(both_ways(traced.score), batch.row, self.count)


def _scan(
    valued: ScoringInputs, tracer: Tracer, count: int, config: TraceConfig, engine: Engine
) -> Candidates:
    spans = list(buckets_of(len(valued.pool), config.bucket_size))
    with (
        progress("trace", len(spans), "blocks") as bar,
        engine.pool(Spans(valued), num_actors=min(engine.cores, len(spans))) as workers,
    ):

        def merge(left: Candidates, right: Candidates) -> Candidates:
            bar.advance(1)
            return left.merge(right)

        found: Candidates = workers.fold(spans, merge, ScanSpan(tracer, count))
        bar.advance(1)  # the first, which all others were merged into
    return found


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Task: exact scores of the candidates of every query, and the choice among them."""

    valued: ScoringInputs
    tracer: Tracer
    nearest: Candidates
    candidates: int
    top: int

    def __call__(self) -> list[Causes]:
        return [self._judge(query) for query in range(len(self.nearest.row) // 2)]

    def _judge(self, query: int) -> Causes:
        pool, opposite = self.valued.pool, query + len(self.nearest.row) // 2
        rows = np.union1d(self.nearest.rows(query), self.nearest.rows(opposite))
        if not len(rows):
            return Causes(harmful=[], helpful=[])
        traced = self.tracer(pool.inputs(rows), pool.image[rows])
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
class IndexSpan:
    """Write the projected gradients of some of the pairs, those that a context can judge; returns how many were read."""

    gradients: Gradients
    folder: Path
    mark: str

    def __call__(self, valued: ScoringInputs, span: Span) -> int:
        start, stop = span
        path = shard_path(self.folder, start)
        if _mark_of(path) != self.mark:
            batch = valued.batch(span)
            rows = self.gradients(batch.inputs, batch.image)
            known = torch.isfinite(rows).all(1)
            _save(
                path, self.mark, {"gradient": rows[known].float(), "row": torch.from_numpy(batch.row)[known]}
            )
        return stop - start


def gradient_index(
    valued: ScoringInputs, inputs: dict[str, str], config: TraceConfig, out: Path, engine: Engine
) -> Manifest:
    """Store every pair's projected gradient, a shard for each block, for any number of later queries.

    A shard holds `gradient` (n, k) and `row` (n,) of the pairs that some context can judge; sides.safetensors the
    projection, because its eigenvectors computed elsewhere may have other signs.
    """
    mark = fingerprint(
        {
            "stage": "gradient index",
            "dimension": config.index_dimension,
            "bucket_size": config.bucket_size,
            "inputs": inputs,
        }
    )
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    problem, sides = valued.problem(), out / SIDES
    if _mark_of(sides) != mark:
        for path in out.glob("*.safetensors"):  # of another config
            path.unlink()
        projections = index_space(problem, config.index_dimension).projections
        _save(
            sides,
            mark,
            {f"{i}.{side}": m for i, P in enumerate(projections) for side, m in (("A", P.A), ("B", P.B))},
        )
    gradients = indexed_gradients(problem, _reduced(problem, out))
    rows = len(valued.pool)
    spans = list(buckets_of(rows, config.bucket_size))
    with (
        progress("index", rows, "pairs") as bar,
        engine.pool(Spans(valued), num_actors=min(engine.cores, len(spans))) as workers,
    ):

        def add(done: int, more: int) -> int:
            bar.advance(more)
            return done + more

        workers.fold(spans, add, IndexSpan(gradients, out, mark))
        bar.advance(spans[0][1])  # which all others were added to
    known = sum(len(load_rows(shard_path(out, start))) for start, _ in spans)
    details = {"dimension": gradients.space.size, "without_gradient": rows - known}
    manifest = Manifest(
        stage="gradient index", fingerprint=mark, inputs=inputs, rows_in=rows, rows_out=rows, details=details
    )
    return finish_stage(out, manifest, began)


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
        shard = load_file(self.path)
        return largest_products(shard["gradient"], shard["row"].numpy(), self.vectors, self.count)


def _search(index: Path, vectors: Tensor, count: int, engine: Engine) -> Candidates:
    shards = sorted(index.glob("gradients-*.safetensors"))
    tasks: Sequence[Any] = [SearchShard(path=path, vectors=vectors, count=count) for path in shards]
    first, *others = engine.map(run_task, tasks, num_actors=engine.cores)
    found: Candidates = first
    for other in others:
        found = found.merge(other)
    return found


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"gradients-{start:012d}.safetensors"


def load_rows(path: Path) -> IntArray:
    """Rows of the pool that a shard of the index holds."""
    with safe_open(path, "pt") as file:
        rows: IntArray = file.get_tensor("row").numpy()
    return rows


def _reduced(problem: Problem, index: Path) -> ReducedSpace:
    """The space of a stored index."""
    sides = load_file(index / SIDES)
    projections = [
        TwoSided(A, B) for A, B in ((sides[f"{i}.A"], sides[f"{i}.B"]) for i in range(len(sides) // 2))
    ]
    return projected(problem.space, projections)


def _save(path: Path, mark: str, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside, {"mark": mark})


def _mark_of(path: Path) -> str | None:
    """What a stored file was computed from; None where there is none, or not a whole one."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("mark")
    except (FileNotFoundError, SafetensorError):
        return None
