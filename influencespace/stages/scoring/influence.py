"""The influence stage: balanced influence of sampled pairs of every stratum, by the run's estimator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as plain_field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from influencespace.core.arrays import FloatArray
from influencespace.core.sequential import anytime_p, next_sample_size, tightest_at
from influencespace.core.strata import balance, means_by, shared_spread, stratified_sample
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns, read_bucket, read_columns, write_columns
from influencespace.errors import STRICT, InputError
from influencespace.estimators.problem import Batch, Directional, Scorer, mean_of_known
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.proxy import proxy_name
from influencespace.stages.scoring.curvature import directional, directions_of
from influencespace.stages.scoring.sampling import DrawSamples
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
    initial_samples: int = Field(default=64, ge=2)
    """Pairs of a stratum scored first; doubled while its confidence sequence holds zero, up to `max_samples`."""
    max_samples: int = Field(default=500, ge=2)
    """Pairs scored in a stratum at most; the others take the influence of their like."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Error of the confidence sequence of each stratum."""
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
        rows = np.load(self.sample)[start:stop]
        if self.kind == "caption_control":
            captions_of = np.load(self.sample.with_name("permuted_captions.npy"))[start:stop]
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


@dataclass(frozen=True, kw_only=True)
class InterimAnalysis:
    """Task: add pairs of the strata whose sign is not significant yet to the sample; how many there are then."""

    config: InfluenceConfig
    folder: Path
    starts: Sequence[int]
    """Buckets of the pairs that are scored already."""

    def __call__(self) -> int:
        strata = read_columns(self.folder / "strata.parquet", "cluster", "quantile")
        quantiles = int(strata["quantile"].max()) + 1
        stratum = strata["cluster"] * quantiles + strata["quantile"]
        size = np.bincount(stratum, minlength=(int(strata["cluster"].max()) + 1) * quantiles)
        buckets = [read_bucket(self.folder, "influence", start, "pair", "influence") for start in self.starts]
        rows, values = (np.concatenate([one[name] for one in buckets]) for name in ("pair", "influence"))
        known = np.isfinite(values)
        scored = means_by(stratum[rows[known]], values[known], len(size))
        taken = np.bincount(stratum[rows], minlength=len(size))
        count = scored.count.astype(np.float64)
        # of single pairs: a stratum's own spread is known too badly to stop by, that of its quantile of quality well
        spread = np.sqrt(shared_spread(scored, quantiles).variance * count)
        alpha = self.config.alpha
        p = anytime_p(scored.mean, spread, count, tightest_at(self.config.initial_samples, alpha))
        save_rows(self.folder / "p_values.npy", p)
        wanted = next_sample_size(taken, size, p, alpha, self.config.max_samples)
        more = stratified_sample(stratum, wanted, after=taken)
        # from what is scored, not from the file: a task may be begun again after it has written
        save_rows(self.folder / "sample.npy", np.concatenate([rows, more]))
        return len(rows) + len(more)


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


def save_rows(path: Path, rows: NDArray[Any]) -> None:
    """Write an array, atomically."""
    with atomic_path(path) as aside, aside.open("wb") as file:
        np.save(file, rows)


class Influence(Stage):
    """Scores sampled pairs of every stratum; writes influence, target, caption_control and strata.parquet, p_values.npy."""

    name = "influence"
    needs = ("proxies", "cluster", "curvature")

    def settings(self, config: Any) -> tuple[InfluenceConfig, int]:
        return config.influence, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        config, _ = self.settings(run.config)
        draw = DrawSamples(run=run, folder=workers.folder)
        counts = workers.once(draw)
        inputs = ScoringInputs.of(run)
        starts: dict[str, list[int]] = {}
        with scoring_pass(workers, inputs, config.bucket_size, counts["pairs"]) as scoring:
            estimator, solved = directional(run.config), run.manifest("curvature").content
            by_proxy = self._fit(run, inputs, counts["pairs"], scoring if estimator is None else None)

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
                    folds=run.config.proxy.fold_count(len(run.pool)),
                    sample=workers.folder / file,
                )

            kinds: tuple[tuple[Kind, str], ...] = (("target", "target"), ("caption_control", "control"))
            for kind, name in kinds:
                job, rows = sample(kind, f"{name}_sample.npy"), range(counts[f"{name}_sample"])
                starts[kind] = scoring.write(kind, job, rows, label=kind, share=4)  # F directions at once
            starts["influence"] = self._in_analyses(config, counts, sample, scoring)
        for name, begins in starts.items():
            if begins:
                workers.join(name, begins)
        if not starts["caption_control"]:
            nothing: Columns = {"pair": np.empty(0, np.int64), "influence_out": np.empty(0)}
            write_columns(workers.folder / "caption_control.parquet", nothing)
        counts["without_score"] = workers.once(DropUnscored(workers.folder))
        return Details(rows_in=counts["pairs"], rows_out=counts["pairs"], details=counts)

    def _in_analyses(
        self, config: InfluenceConfig, counts: dict[str, int], sample: Any, scoring: ScoringPass
    ) -> list[int]:
        """Score the sample, and what interim analyses add to it; where its buckets begin."""
        starts: list[int] = []
        scored = counts["interim_analyses"] = 0
        while counts["sample"] > scored:
            counts["interim_analyses"] += 1
            label = f"analysis {counts['interim_analyses']}" if scored else ""
            job = sample("influence", "sample.npy")
            starts += scoring.write("influence", job, range(scored, counts["sample"]), label=label)
            scored = counts["sample"]
            analysis = InterimAnalysis(config=config, folder=scoring.workers.folder, starts=starts)
            counts["sample"] = scoring.pool.run(analysis)
        return starts

    def _fit(self, run: Run, inputs: ScoringInputs, pairs: int, scoring: ScoringPass | None) -> ByScorers:
        """An estimator without directions is fitted to every proxy, on the pairs that the proxy was trained on."""
        if scoring is None:
            return ByScorers({})
        config = run.config.influence
        estimator = make_estimator(config.estimator, config.options, run.config.curvature)
        folds = [None, *range(run.config.proxy.fold_count(len(run.pool)))]
        return ByScorers({k: scoring.fit(estimator, inputs.problem(k), pairs, k) for k in folds})
