"""The one scoring pass: pairs of the pool are given to fitted scorers, in sample or out of fold, bucket by bucket."""

import operator
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.batches import folds_by_image
from influencespace.data.batch_file import BatchFile
from influencespace.data.buckets import Columns, WriteBucket, buckets_of
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Pool
from influencespace.engine.placement import Resources
from influencespace.errors import InputError
from influencespace.estimators.influence import (
    CurvatureConfig,
    NegativeBatch,
    damping_of,
    floored,
    target_gradients,
)
from influencespace.estimators.problem import Batch, Estimator, Fold, Problem, Scorer, checkpoints_of, fitted
from influencespace.estimators.table import TABLE
from influencespace.models.space import Space
from influencespace.models.trajectory import Trajectory
from influencespace.run import Run, Workers
from influencespace.stages.proxies.proxies import seen_by
from influencespace.stages.proxies.proxy import Proxy, ProxyConfig, proxy_name
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.proxies.train_many import (
    BlockInputs,
    Weights,
    beginning,
    fold_of_rows,
    total_weight,
)

RowRange = tuple[int, int]
Values = Callable[[int | None, Batch], FloatArray]
"""Influence (V, n, C) of pairs by the proxy that left a fold out, or by that of all pairs."""


def make_estimator(name: str, options: Mapping[str, Any], curvature: CurvatureConfig | None = None) -> Any:
    """An estimator of the table; raises InputError for an unknown name or an option that does not fit.

    `curvature` is that of the run, for an estimator that has one and is given no other.
    """
    if name not in TABLE:
        raise InputError(f"there is no estimator {name!r}; there are {', '.join(sorted(TABLE))}")
    try:
        estimator: Any = TABLE[name](**options)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InputError(f"the estimator {name} does not take {dict(options)}: {'; '.join(wrong)}") from None
    if curvature is not None and "curvature" not in options and hasattr(estimator, "curvature"):
        # the damping is the problem's
        own = replace(curvature, damping_factor=CurvatureConfig().damping_factor)
        estimator = replace(estimator, curvature=own)
    return estimator


class Uids(Sequence[str]):
    """Uids of some pairs of a set, read where they are asked for."""

    def __init__(self, pairs: PairSet, rows: IntArray) -> None:
        self._pairs, self._rows = pairs, rows

    @cached_property
    def _read(self) -> list[str]:
        return list(map(str, self._pairs.read(self._rows, "uid")["uid"]))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._read[index]


@dataclass(frozen=True, kw_only=True)
class ScoringInputs:
    """A pool with its trained proxies and the target: what estimators are given. Cheap to pickle."""

    pool: PairSet
    target: PairSet
    proxy: ProxyConfig
    curvature: CurvatureConfig
    seed: int
    folder: Path
    """Of the proxies stage."""
    device: str = "cpu"
    """Where problems lie and batches are read to."""

    @classmethod
    def of(cls, run: Run, device: str = "cpu") -> "ScoringInputs":
        return cls(
            pool=run.pool,
            target=run.target,
            proxy=run.config.proxy,
            curvature=run.config.curvature,
            seed=run.seed,
            folder=run.at("proxies"),
            device=device,
        )

    @cached_property
    def halves(self) -> TargetHalves:
        return TargetHalves(self.target, self.seed)

    @cached_property
    def target_batches(self) -> list[IntArray]:
        """Pairs of the target's half that gives gradients, in batches."""
        return self.halves.batches(self.halves.gradient, self.proxy.train.batch_size)

    def trained(self, fold: int | None = None) -> Proxy:
        return Proxy(self.folder, proxy_name(fold))

    def seen_by(self, fold: int | None) -> Weights:
        """Weights of the pool's pairs in the training of a proxy."""
        return seen_by(fold, self.pool, self.proxy, self.seed)

    def fold_of(self, rows: IntArray) -> IntArray:
        """Fold of some pairs of the pool (m,): which of the proxies left them out."""
        return fold_of_rows(self.pool, rows, self.proxy.fold_count(len(self.pool)), self.seed)

    def problem(self, fold: int | None = None, *, path: bool = True) -> Problem:
        """The problem of the proxy of all pairs, or of the one that left a fold out, on the half that gives gradients.

        Its training path takes a pass over the images of the pool: it may be left out.
        """
        proxy, train = self.trained(fold), self.proxy.train
        space = Space(proxy.heads.to(self.device))
        trajectory = self.trajectory(space, fold) if path else None
        return Problem(
            space=space,
            objective=train.objective,
            batch_size=train.batch_size,
            pool_size=len(self.pool),
            # of use with a path alone: other tasks do not read the images of the whole pool
            trained_on=int(total_weight(self.seen_by(fold), len(self.pool)))
            if path and fold is not None
            else None,
            bank=proxy.reference_bank(self.pool, self.device),
            target=[
                NegativeBatch(inputs=self.target.inputs(rows, self.device), image=self.target.image[rows])
                for rows in self.target_batches
            ],
            preconditioner=floored(proxy.preconditioner.to(self.device)),
            damping=damping_of(self.curvature, proxy.sum_of_learning_rates, train.weight_decay),
            checkpoints=checkpoints_of(trajectory) if trajectory else (),
            trajectory=trajectory,
            seed=self.seed,
        )

    def target_gradients(self, problem: Problem) -> Tensor:
        """Gradient of the target loss by fold of the target's images: (F, p)."""
        half, image = self.halves.gradient, self.target.image
        count = min(self.curvature.target_folds, len(np.unique(image[half])))
        fold = np.zeros(len(self.target), np.int64)
        fold[half] = folds_by_image(image[half], count, self.seed)
        batches = [batch.inputs for batch in problem.target]
        folds = [fold[rows] for rows in self.target_batches]
        return target_gradients(problem.space, batches, folds, count, problem.objective)

    def trajectory(self, space: Space, fold: int | None = None) -> Trajectory:
        """The training of a proxy, replayed from its seed and steps where it is asked for."""
        record = self.trained(fold).record
        assert record is not None, f"{self.folder} lost the proxy {proxy_name(fold)}"
        train = replace(self.proxy.train, steps=record["steps"])
        heads, batches = beginning(self.pool, self.seen_by(fold), train, record["seed"])
        initial = Space(heads.to(self.device))
        return Trajectory(
            space=space,
            initial=initial.flatten(initial.parameters),
            config=train,
            batches=BatchFile(batches),
            inputs=BlockInputs(self.pool, self.device),
            objective=train.objective,
        )

    def batch(self, rows: IntArray, captions_of: IntArray | None = None) -> Batch:
        """Some pairs of the pool, with their own captions or those of other pairs."""
        images, texts = self.pool.inputs(rows, self.device)
        if captions_of is not None:
            _, texts = self.pool.inputs(captions_of, self.device)
        image = self.pool.read(rows, "image")["image"].astype(np.int64)
        return Batch(uid=Uids(self.pool, rows), row=rows, inputs=(images, texts), image=image)

    def out_of_fold(self, values: Values, rows: IntArray, captions_of: IntArray | None = None) -> FloatArray:
        """What `values(fold, batch)` gives of each pair (V, n, C), asked of the proxy that left the pair's image out."""
        fold = self.fold_of(rows)
        captions = rows if captions_of is None else captions_of
        parts = {
            int(k): values(int(k), self.batch(rows[fold == k], captions[fold == k])) for k in np.unique(fold)
        }
        first = next(iter(parts.values()))
        whole = np.empty((first.shape[0], len(rows), first.shape[2]))
        for k, part in parts.items():
            whole[:, fold == k] = part
        return whole


class HasBatches(Protocol):
    """What rows of a pool can be asked of."""

    @property
    def pool(self) -> PairSet: ...

    def batch(self, rows: IntArray, /) -> Batch:
        """Some of its pairs."""


class Job(Protocol):
    """What workers do to one range of rows after another."""

    @property
    def key(self) -> str:
        """Of this job alone: a worker keeps what it has cached as long as the job is the same."""

    def __call__(self, inputs: Any, rows: RowRange) -> Any:
        """A mergeable result."""


def new_key() -> str:
    """Of a job that is like no other."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class ScoringWorker:
    """The factory of a worker that opens its inputs, and each job that it is sent, once."""

    inputs: HasBatches

    def __call__(self) -> Callable[[RowRange, Job], Any]:
        held: list[Job] = []

        def work(rows: RowRange, job: Job) -> Any:
            if not held or held[0].key != job.key:
                held[:] = [job]
            return held[0](self.inputs, rows)

        return work


@dataclass(frozen=True)
class FoldRange:
    """Job: one pass of a fit over a range of rows, those of one fold left out."""

    statistic: Fold
    without_fold: int | None = None
    key: str = field(default_factory=new_key)

    def __call__(self, inputs: ScoringInputs, rows: RowRange) -> Any:
        chosen = np.arange(*rows)
        if self.without_fold is not None:
            chosen = chosen[inputs.fold_of(chosen) != self.without_fold]
        state = self.statistic.zero()
        return self.statistic.observe(state, inputs.batch(chosen)) if len(chosen) else state


@dataclass(frozen=True)
class WriteRange:
    """Job: write the columns that `compute(inputs, start, stop)` gives, unless they are there; how many rows."""

    compute: Callable[[Any, int, int], Columns]
    table: str
    folder: Path
    key: str = field(default_factory=new_key)

    def __call__(self, inputs: HasBatches, rows: RowRange) -> int:
        compute = partial(self.compute, inputs)
        return WriteBucket(
            folder=self.folder, table=self.table, start=rows[0], stop=rows[1], compute=compute
        )()


@dataclass(frozen=True)
class ScoreColumn:
    """The column `score` of a range of rows."""

    scorer: Scorer

    def __call__(self, inputs: HasBatches, start: int, stop: int) -> Columns:
        return {"score": self.scorer(inputs.batch(np.arange(start, stop)))}


@dataclass(frozen=True, kw_only=True)
class ScoringPass:
    """Workers that have opened their inputs, for as many fits and passes as are asked of them."""

    pool: Pool
    workers: Workers
    size: int
    """Pairs in one task; no score depends on it."""

    def fit(self, estimator: Estimator, problem: Problem, rows: int, fold: int | None = None) -> Scorer:
        """The scorer of an estimator; each pass over the pool that it asks for is folded, one fold of the images left out."""
        spans = list(buckets_of(rows, self.size))

        def run(statistic: Fold) -> Any:
            return self.pool.fold(spans, statistic.merge, FoldRange(statistic, fold))

        return fitted(estimator.fit(problem), run)

    def write(
        self,
        table: str,
        compute: Callable[[Any, int, int], Columns],
        rows: range,
        *,
        label: str = "",
        share: int = 1,
    ) -> list[int]:
        """Write the columns of all rows in buckets of a `share` of the usual size; where these begin."""
        size = max(1, self.size // share)
        spans = [(rows.start + a, rows.start + b) for a, b in buckets_of(len(rows), size)]
        if not spans:
            return []
        with self.workers.progress(len(rows), label=label) as bar:
            write = WriteRange(compute, table, self.workers.folder)
            self.pool.fold(spans, operator.add, write, done=lambda span: bar.advance(span[1] - span[0]))
        return [start for start, _ in spans]


@contextmanager
def scoring_pass(
    workers: Workers, inputs: HasBatches, size: int, rows: int, *, resources: Resources | None = None
) -> Iterator[ScoringPass]:
    """Workers over `inputs` until the block ends, no more than `rows` give tasks to."""
    with workers.pool(ScoringWorker(inputs), -(-rows // size), resources=resources) as pool:
        yield ScoringPass(pool=pool, workers=workers, size=size)
