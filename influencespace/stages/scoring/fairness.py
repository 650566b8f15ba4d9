"""The fairness stage: what pairs do for the target's groups that are worse off, carried over to every pair of the pool.

One direction serves all these groups: the gradient of their losses, each weighted by how far it is above the mean. Few pairs
of a rare group are in the pool, so its influence is carried over by likeness: a linear function of the given embeddings.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.fairness import disadvantage, group_means
from influencespace.core.linalg import Solution
from influencespace.core.ridge import Ridge, fit_ridge
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen
from influencespace.data.buckets import (
    buckets_of,
    has_bucket,
    join_buckets,
    read_bucket,
    read_columns,
    write_bucket,
)
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, run_once, run_task
from influencespace.engine.progress import progress
from influencespace.estimators.influence import (
    CurvatureConfig,
    InfluenceScorer,
    damping_of,
    floored,
    sketch_curvature,
    solve_directions,
)
from influencespace.models.space import Space
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.proxies.proxies import Proxy, ProxyConfig, TargetHalves, proxy_name

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
MAX_FITTED = 20_000  # scored pairs whose embeddings are in memory at once
GROUPS = "groups.parquet"


@dataclass(frozen=True, kw_only=True)
class Disadvantaged:
    """The groups of the target that the proxy of all pairs serves worse than the mean, on the half that gives gradients."""

    pool: PairSet
    target: PairSet
    proxies: ProxyConfig
    curvature: CurvatureConfig
    proxy_folder: Path

    @cached_property
    def proxy(self) -> Proxy:
        return Proxy(self.proxy_folder, proxy_name(None))

    @cached_property
    def halves(self) -> TargetHalves:
        return TargetHalves(self.target, self.proxies.seed)

    @cached_property
    def contexts(self) -> list[IntArray]:
        return self.halves.contexts(self.halves.gradient, self.proxies.train.batch_size)

    @cached_property
    def losses(self) -> tuple[IntArray, FloatArray]:
        """Group and mean loss of each image of the contexts, those of no group left out (m,), (m,).

        Captions of one image are no independent opinions of how well a group is served.
        """
        losses = []
        for rows in self.contexts:
            with torch.no_grad():
                terms = self.proxies.train.objective.terms(*self.proxy.embed(self.target.inputs(rows)))
            losses.append(terms.double().numpy())
        rows, loss = np.concatenate(self.contexts), np.concatenate(losses)
        named = self.halves.group[rows] >= 0
        keys = np.stack([self.halves.group[rows[named]], self.target.image[rows[named]]])
        images, place = np.unique(keys, axis=1, return_inverse=True)
        return images[0], np.bincount(place.reshape(-1), loss[named]) / np.bincount(place.reshape(-1))

    @cached_property
    def share(self) -> FloatArray:
        """How much each group counts (A,), 1 in all; zeros where none is worse off."""
        group, loss = self.losses
        return disadvantage(loss, group) if len(np.unique(group)) > 1 else np.zeros(len(np.unique(group)))

    def gradient(self) -> Tensor:
        """Of the groups' mean losses, weighted by their shares: (1, p)."""
        space = Space(self.proxy.heads)
        pairs = self.halves.group[np.concatenate(self.contexts)]
        codes, counts = np.unique(pairs[pairs >= 0], return_counts=True)
        weight = np.zeros(int(codes.max()) + 1)
        weight[codes] = self.share / counts
        total = torch.zeros(1, space.size, dtype=torch.float64)
        for rows in self.contexts:
            code = self.halves.group[rows]
            weights = torch.from_numpy(np.where(code >= 0, weight[code], 0.0))[None]
            inputs, objective = self.target.inputs(rows), self.proxies.train.objective
            total += space.loss_gradients(inputs, weights.to(space.like), objective).double().cpu()
        return total.to(space.like)

    def solution(self) -> Solution:
        """The gradient solved at the target's damping, so that both influences are in one unit: x (1, p)."""
        space, train = Space(self.proxy.heads), self.proxies.train
        contexts = [self.pool.inputs(rows) for rows in self.proxy.bank]
        D = floored(self.proxy.preconditioner)
        sketch = sketch_curvature(
            space, contexts, train.objective, D, self.curvature.rank, self.curvature.seed
        )
        damping = damping_of(self.curvature, self.proxy.sum_of_learning_rates, train.weight_decay)
        return solve_directions(
            space, contexts, train.objective, D, sketch, damping, self.gradient(), self.curvature
        )


@dataclass(frozen=True, kw_only=True)
class SolveDisadvantaged:
    """Task: write the direction that serves the groups that are worse off, if any are; what is known of the groups."""

    groups: Disadvantaged
    folder: Path

    def __call__(self) -> dict[str, Any]:
        group, loss = self.groups.losses
        share = self.groups.share
        solve = {}
        if share.any():
            solution = self.groups.solution()
            solve = {"iterations": solution.iterations, "residual": solution.residual}
            with atomic_path(self.folder / "direction.safetensors") as aside:
                save_file({"direction": solution.x.contiguous()}, aside)
        names, codes = self.groups.target.column("group"), self.groups.halves.group
        means = group_means(loss, group) if len(group) else share
        groups = [
            {"group": str(names[int(np.argmax(codes == code))]), "loss": float(mean), "share": float(part)}
            for code, mean, part in zip(np.unique(group), means, share, strict=True)
        ]
        return {"groups": groups, **solve}


@dataclass(frozen=True, kw_only=True)
class ScoreForGroups:
    """Task: in-training influence of some scored pairs on the groups that are worse off."""

    groups: Disadvantaged
    form: str
    sample: Path
    folder: Path
    mark: str
    start: int
    stop: int

    def __call__(self) -> int:
        if not has_bucket(self.folder, "scored", self.start, self.mark):
            g = self.groups
            rows = read_columns(self.sample, "pair")["pair"][self.start : self.stop]
            scorer = InfluenceScorer(
                Space(g.proxy.heads),
                load_file(self.folder / "direction.safetensors")["direction"],
                g.proxy.reference_bank(g.pool),
                g.proxies.train.objective,
                g.proxies.train.batch_size,
                self.form,
            )
            by_batch = scorer(g.pool.inputs(rows), g.pool.image[rows]).by_batch[0]
            known = np.isfinite(by_batch).any(1)
            columns = {"pair": rows[known], "influence": np.nanmean(by_batch[known], 1)}
            write_bucket(self.folder, "scored", self.start, self.mark, columns)
        return self.stop - self.start


def features(pool: PairSet, rows: IntArray) -> FloatArray:
    """Both given embeddings of pairs, side by side: (n, 2 D)."""
    return torch.cat(pool.inputs(rows), 1).double().numpy()


@dataclass(frozen=True, kw_only=True)
class FitForGroups:
    """Task: fit influence on the groups as a linear function of embeddings; its effective degrees of freedom."""

    pool: PairSet
    folder: Path
    starts: Sequence[int]
    """Blocks of the pairs that are scored."""

    def __call__(self) -> float:
        blocks = [read_bucket(self.folder, "scored", start, "pair", "influence") for start in self.starts]
        pair, influence = (
            np.concatenate([block[name] for block in blocks]) for name in ("pair", "influence")
        )
        rows = slice(0, MAX_FITTED)  # of the first look, which is in canonical order; this is random
        fitted = fit_ridge(features(self.pool, pair[rows]), influence[rows])
        with atomic_path(self.folder / "ridge.npz") as aside, aside.open("wb") as file:
            np.savez(
                file, centre=fitted.centre, coefficients=fitted.coefficients, offset=np.array(fitted.offset)
            )
        return fitted.freedom


@dataclass(frozen=True, kw_only=True)
class PredictForGroups:
    """Task: the fitted influence of a block of the pool."""

    pool: PairSet
    folder: Path
    mark: str
    start: int
    stop: int

    def __call__(self) -> int:
        if not has_bucket(self.folder, "groups", self.start, self.mark):
            found = np.load(self.folder / "ridge.npz")
            fitted = Ridge(
                centre=found["centre"],
                coefficients=found["coefficients"],
                offset=float(found["offset"]),
                freedom=0,
            )
            rows = np.arange(self.start, self.stop)
            columns = {"influence": fitted.predict(features(self.pool, rows))}
            write_bucket(self.folder, "groups", self.start, self.mark, columns)
        return self.stop - self.start


def fairness(
    pool: PairSet,
    target: PairSet,
    proxies: ProxyConfig,
    config: CurvatureConfig,
    proxy_folder: Path,
    attribute_folder: Path,
    wanted: bool,
    form: str,
    bucket_size: int,
    rows: tuple[int, int],
    inputs: dict[str, str],
    out: Path,
    engine: Engine,
) -> Manifest:
    """Influence of all `rows[0]` pairs on the groups that are worse off, from `rows[1]` scored ones; writes groups.parquet.

    `config.rank` is the one that the curvature stage found large enough, `form` that of the attribute stage; `bucket_size` pairs
    are scored in one task.
    Nothing is written where it is not `wanted`, the target names fewer than two groups, or none is worse off than the mean.
    """
    mark = fingerprint(
        {
            "stage": "fairness",
            "config": config,
            "wanted": wanted,
            "form": form,
            "bucket_size": bucket_size,
            "inputs": inputs,
        }
    )
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    for name in (GROUPS, "scored.parquet", "ridge.npz", "direction.safetensors"):
        (out / name).unlink(missing_ok=True)  # of another target: there may be none to take their place
    groups = Disadvantaged(
        pool=pool, target=target, proxies=proxies, curvature=config, proxy_folder=proxy_folder
    )
    solve = SolveDisadvantaged(groups=groups, folder=out)
    details: dict[str, Any] = run_once(engine, solve) if wanted else {"groups": []}
    if any(group["share"] for group in details["groups"]):
        sample = attribute_folder / "influence.parquet"
        score = partial(ScoreForGroups, groups=groups, form=form, sample=sample, folder=out, mark=mark)
        starts = {"scored": _blockwise(engine, score, rows[1], bucket_size, "fairness")}
        fit = FitForGroups(pool=pool, folder=out, starts=starts["scored"])
        details["freedom"] = run_once(engine, fit)
        predict = partial(PredictForGroups, pool=pool, folder=out, mark=mark)
        starts["groups"] = _blockwise(engine, predict, rows[0], bucket_size, "fairness (all pairs)")
        for name in starts:
            run_once(engine, partial(join_buckets, out, name, starts[name]))
    manifest = Manifest(
        stage="fairness",
        fingerprint=mark,
        inputs=inputs,
        rows_in=rows[0],
        rows_out=rows[0],
        details=details,
    )
    return finish_stage(out, manifest, began)


def _blockwise(engine: Engine, make: "partial[Any]", count: int, block: int, what: str) -> list[int]:
    tasks = [make(start=a, stop=b) for a, b in buckets_of(count, block)]
    with progress(what, count, "pairs") as bar:
        for done in engine.map(run_task, tasks, num_actors=engine.cores):
            bar.advance(done)
    return [task.start for task in tasks]
