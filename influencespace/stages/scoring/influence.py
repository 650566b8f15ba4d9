"""The attribute stage: balanced influence of sampled pairs of every stratum, by tangent embeddings against the bank."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from torch import Tensor

from influencespace.core.quality import agreement, caption_axis, quality_axis
from influencespace.core.sequential import anytime_p, next_look, tightest_at
from influencespace.core.strata import balance, means_by, quantile_of, shared_spread, stratified_sample
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen
from influencespace.data.buckets import (
    Columns,
    buckets_of,
    has_bucket,
    join_buckets,
    read_bucket,
    read_columns,
    write_bucket,
    write_columns,
)
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, run_once, run_task
from influencespace.engine.progress import progress
from influencespace.estimators.influence import Influence, InfluenceScorer
from influencespace.models.space import Space
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.proxies.proxies import Proxy, ProxyConfig, image_folds, proxy_name
from influencespace.stages.scoring.curvature import directions_of

IntArray = NDArray[np.int64]


@options(frozen=True, kw_only=True)
class InfluenceConfig:
    """Which pairs are scored, and how."""

    quantiles: int = Field(default=40, ge=2)
    """Quality quantiles Q over the pool; a stratum is a cluster at a quantile."""
    initial_samples: int = Field(default=64, ge=2)
    """Pairs of a stratum scored first; doubled while its confidence sequence holds zero, up to `budget`."""
    budget: int = Field(default=500, ge=2)
    """Pairs scored in a stratum at most; the others take the influence of their like."""
    level: float = Field(default=0.05, gt=0, lt=1)
    """Error of the confidence sequence of each stratum."""
    target_budget: int = Field(default=64, ge=2)
    """Pairs of a quantile scored along every fold of the target, for the target's standard error."""
    caption_control: int = Field(default=2000, ge=0)
    """Pairs whose captions are permuted between images, scored beside the rest."""
    form: Literal["exact", "taylor"] = "exact"
    """Of the negative role."""
    bucket_size: int = Field(default=4096, ge=1)
    """Pairs scored in one task; no score depends on it."""

    def quantiles_of(self, pairs: int) -> int:
        """Quality quantiles of a pool of so many pairs: ten pairs in each, but two at least."""
        return min(self.quantiles, max(2, pairs // 10))


@dataclass(frozen=True, kw_only=True)
class Scorers:
    """What a worker needs to score pairs by every proxy; scorers are built once a process."""

    pool: PairSet
    proxies: ProxyConfig
    proxy_folder: Path
    curvature_folder: Path
    form: str
    mark: str

    def scorer(self, fold: int | None, folds_of_target: bool) -> InfluenceScorer:
        return _scorer(self, fold, folds_of_target)

    def __hash__(self) -> int:
        return hash(self.mark)

    def influence(
        self, rows: IntArray, captions_of: IntArray, fold: int | None, folds_of_target: bool = False
    ) -> Influence:
        """Influence of images of the pool with captions of the pool (mostly their own) by one proxy."""
        inputs = self.pool.mixed_inputs(rows, captions_of)
        return self.scorer(fold, folds_of_target)(inputs, self.pool.image[rows])

    def held_out(
        self, rows: IntArray, captions_of: IntArray, folds_of_target: bool = False
    ) -> NDArray[np.float64]:
        """Influence (V, n, C) of each pair by the proxy that held its image out."""
        fold = image_folds(self.pool, self.proxies)[rows]
        parts = {}
        for k in np.unique(fold):
            held = fold == k
            influence = self.influence(rows[held], captions_of[held], int(k), folds_of_target)
            parts[k] = influence.by_batch
        first = next(iter(parts.values()))
        out = np.empty((first.shape[0], len(rows), first.shape[2]))
        for k, part in parts.items():
            out[:, fold == k] = part
        return out


@lru_cache(maxsize=32)
def _scorer(setting: Scorers, fold: int | None, folds_of_target: bool) -> InfluenceScorer:
    proxy = Proxy(setting.proxy_folder, proxy_name(fold))
    directions: Tensor = directions_of(setting.curvature_folder, proxy.name)
    return InfluenceScorer(
        Space(proxy.heads),
        directions if folds_of_target else directions.mean(0, keepdim=True),
        proxy.reference_bank(setting.pool),
        setting.proxies.train.objective,
        setting.proxies.train.batch_size,
        setting.form,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreBlock:
    """Task: influence of some sampled pairs, in training and held out."""

    scorers: Scorers
    sample: Path
    folder: Path
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"influence of sampled pairs {self.start} to {self.stop}"

    def __call__(self) -> int:
        if has_bucket(self.folder, "influence", self.start, self.scorers.mark):
            return self.stop - self.start
        rows = np.load(self.sample)[self.start : self.stop]
        seen = self.scorers.influence(rows, rows, None)
        held_out = self.scorers.held_out(rows, rows)[0]
        balanced = balance(seen.by_batch[0], held_out, self.scorers.proxies.folds)
        columns: Columns = {
            "pair": rows,
            "own_in": np.nanmean(seen.own[0], 1),
            "negative_in": np.nanmean(seen.negative[0], 1),
            "influence_in": np.nanmean(seen.by_batch[0], 1),
            "influence_out": np.nanmean(held_out, 1),
            "influence": np.nanmean(balanced, 1),
            "by_batch": balanced,
        }
        write_bucket(self.folder, "influence", self.start, self.scorers.mark, columns)
        return len(rows)


@dataclass(frozen=True, kw_only=True)
class ScoreExtra:
    """Task: influence along every fold of the target (`target`), or held out with permuted captions (`caption_control`)."""

    scorers: Scorers
    kind: Literal["target", "caption_control"]
    rows_file: Path
    folder: Path
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.kind} influence {self.start} to {self.stop}"

    def __call__(self) -> int:
        if has_bucket(self.folder, self.kind, self.start, self.scorers.mark):
            return self.stop - self.start
        rows = np.load(self.rows_file)[self.start : self.stop]
        if self.kind == "caption_control":
            captions_of = np.load(self.folder / "caption_control_captions.npy")[self.start : self.stop]
            held_out = self.scorers.held_out(rows, captions_of)[0]
            columns: Columns = {"pair": rows, "influence_out": np.nanmean(held_out, 1)}
        else:
            seen = self.scorers.influence(rows, rows, None, folds_of_target=True).by_batch
            held_out = self.scorers.held_out(rows, rows, folds_of_target=True)
            balanced = np.nanmean(balance(seen, held_out, self.scorers.proxies.folds), 2)
            columns = {"pair": rows, "by_target_fold": np.ascontiguousarray(balanced.T)}
        write_bucket(self.folder, self.kind, self.start, self.scorers.mark, columns)
        return len(rows)


@dataclass(frozen=True, kw_only=True)
class DrawSamples:
    """Task: strata of all pairs, and which of them are scored."""

    pool: PairSet
    proxies: Path
    clusters: Path
    config: InfluenceConfig
    folder: Path

    def __call__(self) -> dict[str, int]:
        quality = read_columns(self.proxies / "quality.parquet", "neg_clip_in", "neg_clip_out")
        axis = quality_axis(quality["neg_clip_in"], quality["neg_clip_out"])
        cluster = read_columns(self.clusters / "clusters.parquet", "cluster")["cluster"]
        quantiles = self.config.quantiles_of(len(axis))
        quantile = quantile_of(axis, quantiles)
        first = min(self.config.initial_samples, self.config.budget)
        samples = {
            "sample": stratified_sample(cluster * quantiles + quantile, first),
            "target_sample": stratified_sample(quantile, self.config.target_budget),
            # the canonical order is random, so its beginning is a random sample
            "caption_control_sample": np.arange(min(self.config.caption_control, len(axis))),
        }
        samples["caption_control_captions"] = self.pool.captions_of_others(
            samples["caption_control_sample"], seed=0
        )
        for name, rows in samples.items():
            save_rows(self.folder / f"{name}.npy", rows)
        strata = {
            "quality": axis,
            "cluster": cluster,
            "quantile": quantile,
            "seen": quality["neg_clip_in"],
            "held_out": quality["neg_clip_out"],
            "given": self.pool.clip_score,
            "caption_images": caption_axis(self.pool.image, self.pool.text),
            "caption_agreement": caption_agreement(self.pool),
            "sharpness": self.pool.sharpness,
            "group": self.pool.group,
        }
        write_columns(self.folder / "strata.parquet", strata)
        return {name: len(rows) for name, rows in samples.items()} | {
            "pairs": len(axis),
            "quantiles": quantiles,
        }


@dataclass(frozen=True, kw_only=True)
class LookAgain:
    """Task: add pairs of the strata whose sign is not sure yet to the sample; how many there are then."""

    config: InfluenceConfig
    folder: Path
    starts: Sequence[int]
    """Blocks of the pairs that are scored already."""

    def __call__(self) -> int:
        strata = read_columns(self.folder / "strata.parquet", "cluster", "quantile")
        quantiles = int(strata["quantile"].max()) + 1
        stratum = strata["cluster"] * quantiles + strata["quantile"]
        size = np.bincount(stratum, minlength=(int(strata["cluster"].max()) + 1) * quantiles)
        blocks = [read_bucket(self.folder, "influence", start, "pair", "influence") for start in self.starts]
        rows, values = (np.concatenate([block[name] for block in blocks]) for name in ("pair", "influence"))
        scored = means_by(stratum[rows], values, len(size))
        count = scored.count.astype(np.float64)
        # of single pairs: a stratum's own spread is known too badly to stop by, that of its quantile of quality well
        spread = np.sqrt(shared_spread(scored, quantiles).variance * count)
        p = anytime_p(scored.mean, spread, count, tightest_at(self.config.initial_samples, self.config.level))
        save_rows(self.folder / "p_values.npy", p)
        wanted = next_look(scored.count, size, p, self.config.level, self.config.budget)
        more = stratified_sample(stratum, wanted, after=scored.count)
        # from what is scored, not from the file: a task may be begun again after it has written
        save_rows(self.folder / "sample.npy", np.concatenate([rows, more]))
        return len(rows) + len(more)


def save_rows(path: Path, rows: NDArray[Any]) -> None:
    with atomic_path(path) as aside, aside.open("wb") as file:
        np.save(file, rows)


def caption_agreement(pool: PairSet, block: int = 16_384) -> NDArray[np.float64]:
    """Agreement of every pair's caption with the other captions of its image (n,), some images in memory at a time.

    A pair that the pool holds twice counts once.
    """
    pairs, place = np.unique(np.stack([pool.image, pool.text]), axis=1, return_inverse=True)
    found = np.empty(pairs.shape[1])
    start = 0
    while start < len(found):
        # as many whole images as a block holds, one at least
        last = pairs[0, min(start + block, len(found)) - 1]
        stop = int(np.searchsorted(pairs[0], last, side="right"))
        found[start:stop] = agreement(
            np.asarray(pool.table.texts[pairs[1, start:stop]]), pairs[0, start:stop]
        )
        start = stop
    return found[place.reshape(-1)]


def attribute(
    pool: PairSet,
    proxies: ProxyConfig,
    folders: dict[str, Path],
    inputs: dict[str, str],
    config: InfluenceConfig,
    out: Path,
    engine: Engine,
) -> Manifest:
    """Score sampled pairs of every stratum; writes influence.parquet, target.parquet, caption_control.parquet, strata.parquet."""
    mark = fingerprint({"stage": "attribute", "config": config, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    counts = run_once(
        engine,
        DrawSamples(
            pool=pool, proxies=folders["proxy"], clusters=folders["cluster"], config=config, folder=out
        ),
    )
    scorers = Scorers(
        pool=pool,
        proxies=proxies,
        proxy_folder=folders["proxy"],
        curvature_folder=folders["curvature"],
        form=config.form,
        mark=mark,
    )
    starts = {
        kind: _score(
            engine,
            partial(ScoreExtra, scorers=scorers, kind=kind, rows_file=out / f"{kind}_sample.npy", folder=out),
            0,
            counts[f"{kind}_sample"],
            max(1, config.bucket_size // 4),
            kind,
        )
        for kind in ("target", "caption_control")
        if counts[f"{kind}_sample"]
    }
    block = partial(ScoreBlock, scorers=scorers, sample=out / "sample.npy", folder=out)
    starts["influence"] = []
    scored = counts["looks"] = 0
    while counts["sample"] > scored:
        counts["looks"] += 1
        what = "attribute" if counts["looks"] == 1 else f"attribute (look {counts['looks']})"
        starts["influence"] += _score(engine, block, scored, counts["sample"], config.bucket_size, what)
        scored = counts["sample"]
        again = LookAgain(config=config, folder=out, starts=starts["influence"])
        counts["sample"] = run_once(engine, again)
    for name, begins in starts.items():
        run_once(engine, partial(join_buckets, out, name, begins))
    if not counts["caption_control_sample"]:
        nothing: Columns = {"pair": np.empty(0, np.int64), "influence_out": np.empty(0)}
        write_columns(out / "caption_control.parquet", nothing)
    manifest = Manifest(
        stage="attribute",
        fingerprint=mark,
        inputs=inputs,
        rows_in=counts["pairs"],
        rows_out=counts["pairs"],
        details=counts,
    )
    return finish_stage(out, manifest, began)


def _score(
    engine: Engine, make: Callable[..., Any], first: int, last: int, size: int, what: str
) -> list[int]:
    """Score the pairs `first` to `last` of a sample in blocks of `size`; where the blocks begin."""
    tasks = [make(start=first + a, stop=first + b) for a, b in buckets_of(last - first, size)]
    with progress(what, last - first, "pairs") as bar:
        for count in engine.map(run_task, tasks, num_actors=engine.cores):
            bar.advance(count)
    return [task.start for task in tasks]
