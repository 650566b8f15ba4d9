"""The influence stage: strata of all pairs, and balanced influence of a sample of them, by the run's estimator."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as plain_field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from influencespace.core.arrays import FloatArray
from influencespace.core.quality import find_quantiles
from influencespace.core.strata import balance
from influencespace.data.buckets import Columns, read_columns, write_columns
from influencespace.data.mirror import here
from influencespace.engine.placement import Resources, fitting
from influencespace.errors import STRICT, InputError
from influencespace.estimators.problem import Batch, Directional, Scorer, mean_of_known
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.passes import RANGE, RangePasses
from influencespace.stages.proxies.proxy import proxy_name
from influencespace.stages.scoring.curvature import directional, directions_of
from influencespace.stages.scoring.memory import scoring_bytes
from influencespace.stages.scoring.sampling import DrawSamples, StrataOfRange, scores_of
from influencespace.stages.scoring.scoring import ScoringInputs, ScoringPass, make_estimator, scoring_pass

Kind = Literal["influence", "target", "caption_control"]
INFLUENCE = ("pair", "own_in", "negative_in", "influence_in", "influence_out", "influence", "by_batch")
"""Columns of influence.parquet, a row for each scored pair: its row in the pool; in sample as an anchor, as a negative of
others and in both roles; out of fold; balanced, as the mean over the negative batches and by each of them."""


@options(frozen=True, kw_only=True, config=STRICT)
class InfluenceConfig:
    """Which pairs are scored, and how."""

    estimator: str = "ecif"
    """A name of the table of estimators: what the run curates by."""
    options: dict[str, Any] = plain_field(default_factory=dict)
    """Of the estimator, e.g. {"role": "own"}."""
    quantiles: int = Field(default=40, ge=2)
    """Quality quantiles Q over the pool; a stratum is a cluster at a quantile."""
    max_samples: int = Field(default=32_000, ge=2)
    """Pairs scored at most, about equally many of each quantile; the others take the influence of their like. A smaller pool is
    scored as a whole."""
    target_samples: int = Field(default=64, ge=2)
    """Pairs of a quantile scored along every fold of the target, for the target's standard error."""
    control_samples: int = Field(default=2000, ge=0)
    """Pairs whose captions are permuted between images, scored beside the rest as a control."""
    bucket_size: int = Field(default=4096, ge=1)
    """Pairs scored in one task; no score depends on it."""

    def quantiles_of(self, pairs: int) -> int:
        """Quality quantiles of a pool of so many pairs: ten pairs in each, but two at least."""
        return min(self.quantiles, max(2, pairs // 10))


@dataclass(frozen=True)
class AlongDirections:
    """Influence of pairs by every proxy along its solved directions: their mean, or one for each fold of the target."""

    inputs: ScoringInputs
    estimator: Directional
    curvature: Path
    fingerprint: str
    """Of the curvature stage: a process keeps scorers as long as it is the same."""
    by_target_fold: bool = False

    def roles(self, fold: int | None, batch: Batch) -> tuple[FloatArray, FloatArray, FloatArray]:
        """As an anchor, as a negative, and as the estimator takes both: three (V, n, C)."""
        influence, values = _scorer(self, fold).by_batch(batch)
        return influence.own, influence.negative, values

    def __call__(self, fold: int | None, batch: Batch) -> FloatArray:
        return self.roles(fold, batch)[2]


@lru_cache(maxsize=16)
def _scorer(along: AlongDirections, fold: int | None) -> Any:
    """The scorer of one proxy, with all that it has computed of the bank."""
    directions = directions_of(along.curvature, proxy_name(fold))
    directions = directions.to(along.inputs.device)
    rows = directions if along.by_target_fold else directions.mean(0, keepdim=True)
    return along.estimator.scorer(along.inputs.problem(fold, path=False), rows)


@dataclass(frozen=True)
class ByScorers:
    """Scores of pairs by an estimator fitted to every proxy: one target, one batch, no roles."""

    scorers: Mapping[int | None, Scorer]

    def roles(self, fold: int | None, batch: Batch) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Roles are not known (nan); the scores (1, n, 1)."""
        values = self(fold, batch)
        return np.full_like(values, np.nan), np.full_like(values, np.nan), values

    def __call__(self, fold: int | None, batch: Batch) -> FloatArray:
        return self.scorers[fold](batch)[None, :, None]


ByProxy = AlongDirections | ByScorers


def balanced(in_sample: FloatArray, out_of_fold: FloatArray, folds: int) -> FloatArray:
    """`core.strata.balance`; a pair that the estimator cannot score out of fold counts by its score in sample."""
    return np.where(np.isfinite(out_of_fold), balance(in_sample, out_of_fold, folds), in_sample)


@dataclass(frozen=True, kw_only=True)
class ScoreSample:
    """The columns of one kind of sample: `influence`, `target` (by its folds), or `caption_control` (permuted captions)."""

    kind: Kind
    scorers: ByProxy
    folds: int
    sample: Path

    def __call__(self, inputs: ScoringInputs, start: int, stop: int) -> Columns:
        rows = np.load(here(self.sample))[start:stop]
        if self.kind == "caption_control":
            captions_of = np.load(here(self.sample.with_name("permuted_captions.npy")))[start:stop]
            out = inputs.out_of_fold(self.scorers, rows, captions_of)[0]
            return {"pair": rows, "influence_out": mean_of_known(out)}
        own, negative, values = self.scorers.roles(None, inputs.batch(rows))
        out = inputs.out_of_fold(self.scorers, rows)
        if self.kind == "target":
            by_fold = mean_of_known(balanced(values, out, self.folds))
            return {"pair": rows, "by_target_fold": np.ascontiguousarray(by_fold.T)}
        by_batch = balanced(values[0], out[0], self.folds)
        means = map(mean_of_known, (own[0], negative[0], values[0], out[0], by_batch))
        return dict(zip(INFLUENCE, (rows, *means, by_batch), strict=True))


@dataclass(frozen=True)
class DropUnscored:
    """Task: leave out of influence.parquet the pairs that the estimator cannot score; how many they are.

    Raises InputError where it can score none.
    """

    folder: Path

    def __call__(self) -> int:
        columns = read_columns(self.folder / "influence.parquet")
        known = np.isfinite(columns["influence"])
        if not known.any():
            raise InputError(
                "the estimator scores none of the sampled pairs: choose another influence.estimator"
            )
        if not known.all():
            rows = {name: values[known] for name, values in columns.items()}
            write_columns(self.folder / "influence.parquet", rows)
        return int((~known).sum())


class Influence(Stage):
    """Scores a sample by quality quantiles; writes influence, target, caption_control and strata.parquet, and the samples."""

    name = "influence"
    version = 3
    needs = ("proxies", "cluster", "redundancy", "curvature")

    def settings(self, config: Any) -> tuple[InfluenceConfig, int]:
        return config.influence, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        config, _ = self.settings(run.config)
        pairs, folder = run.manifest("proxies").rows_out, workers.folder
        find = find_quantiles(config.quantiles_of(pairs), pairs)
        quantiles = RangePasses(workers).result(find, scores_of(run), pairs)
        draw = DrawSamples(run=run, folder=folder, quantiles=quantiles, pairs=pairs)
        counts = workers.once(draw)
        strata = StrataOfRange(run=run, quantiles=quantiles)
        workers.table("strata", strata, pairs, RANGE, label="strata")
        estimator, solved = directional(run.config), run.manifest("curvature").content
        # others are fitted where the stage is driven
        inputs = ScoringInputs.of(run, "cpu" if estimator is None else workers.device)
        memory = fitting(scoring_bytes(inputs, config.bucket_size), workers.engine.machines)
        needs = Resources(memory=memory) if estimator is None else workers.heavy(memory=memory)
        starts: dict[str, list[int]] = {}
        with scoring_pass(workers, inputs, config.bucket_size, pairs, resources=needs) as scoring:
            by_proxy = self._fit(run, inputs, pairs, scoring if estimator is None else None)

            def sample(kind: Kind, file: str) -> ScoreSample:
                scorers: ByProxy
                if estimator is None:
                    scorers = by_proxy
                else:
                    scorers = AlongDirections(
                        inputs, estimator, run.at("curvature"), solved, kind == "target"
                    )
                return ScoreSample(
                    kind=kind,
                    scorers=scorers,
                    folds=run.config.proxy.fold_count(pairs),
                    sample=folder / file,
                )

            kinds: tuple[tuple[Kind, str, int], ...] = (
                ("target", "target_sample", 4),  # F directions at once
                ("caption_control", "control_sample", 4),
                ("influence", "sample", 1),
            )
            for kind, name, share in kinds:
                job, rows = sample(kind, f"{name}.npy"), range(counts[name])
                label = "" if kind == "influence" else kind
                starts[kind] = scoring.write(kind, job, rows, label=label, share=share)
        for name, begins in starts.items():
            if begins:
                workers.join(name, begins)
        if not starts["caption_control"]:
            nothing: Columns = {"pair": np.empty(0, np.int64), "influence_out": np.empty(0)}
            write_columns(folder / "caption_control.parquet", nothing)
        counts["without_score"] = workers.once(DropUnscored(folder))
        return Details(rows_in=pairs, rows_out=pairs, details=counts)

    def _fit(self, run: Run, inputs: ScoringInputs, pairs: int, scoring: ScoringPass | None) -> ByScorers:
        """An estimator without directions is fitted to every proxy, on the pairs that the proxy was trained on."""
        if scoring is None:
            return ByScorers({})
        config = run.config.influence
        estimator = make_estimator(config.estimator, config.options, run.config.curvature)
        folds = [None, *range(run.config.proxy.fold_count(pairs))]
        return ByScorers({k: scoring.fit(estimator, inputs.problem(k), pairs, k) for k in folds})
