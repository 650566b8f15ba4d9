"""The fairness stage: what pairs do for the target's groups that are worse off, carried over to every pair of the pool.

One direction serves all these groups: the gradient of their losses, each weighted by how far it is above the mean. Few pairs
of a rare group are in the pool, so its influence is carried over by likeness: a linear function of the given embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.fairness import disadvantage, group_means
from influencespace.core.ridge import Ridge, fit_ridge
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns, read_bucket, read_columns
from influencespace.data.mirror import here
from influencespace.data.pair_set import PairSet
from influencespace.engine.placement import LIBRARY_BYTES, Resources, fitting
from influencespace.estimators.influence import sketch_curvature
from influencespace.estimators.problem import Directional, Problem, mean_of_known
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.proxy import ALL
from influencespace.stages.scoring.curvature import directional
from influencespace.stages.scoring.memory import scoring_bytes
from influencespace.stages.scoring.scoring import ScoringInputs, scoring_pass

MAX_FITTED = 20_000  # scored pairs whose embeddings are in memory at once
GROUPS = "groups.parquet"
RANGE = 16_384  # pairs whose embeddings are in memory at once


@dataclass(frozen=True, kw_only=True)
class Disadvantaged:
    """The groups of the target that the proxy of all pairs serves worse than the mean, on the half that gives gradients."""

    inputs: ScoringInputs
    estimator: Directional
    rank: int
    """Of the sketch, found large enough by the curvature stage."""

    @cached_property
    def losses(self) -> tuple[IntArray, FloatArray]:
        """Group and mean loss of each image of the target's batches, those of no group left out (m,), (m,).

        Captions of one image are no independent opinions of how well a group is served.
        """
        inputs, losses = self.inputs, []
        proxy = inputs.trained()
        for rows in inputs.target_batches:
            with torch.no_grad():
                terms = inputs.proxy.train.objective.terms(*proxy.embed(inputs.target.inputs(rows)))
            losses.append(terms.double().cpu().numpy())
        rows, loss = np.concatenate(inputs.target_batches), np.concatenate(losses)
        named = inputs.halves.group[rows] >= 0
        keys = np.stack([inputs.halves.group[rows[named]], inputs.target.image[rows[named]]])
        images, place = np.unique(keys, axis=1, return_inverse=True)
        return images[0], np.bincount(place.reshape(-1), loss[named]) / np.bincount(place.reshape(-1))

    @cached_property
    def share(self) -> FloatArray:
        """How much each group counts (A,), 1 in all; zeros where none is worse off."""
        group, loss = self.losses
        return disadvantage(loss, group) if len(np.unique(group)) > 1 else np.zeros(len(np.unique(group)))

    def gradient(self, problem: Problem) -> Tensor:
        """Of the groups' mean losses, weighted by their shares: (1, p)."""
        space, halves = problem.space, self.inputs.halves
        pairs = halves.group[np.concatenate(self.inputs.target_batches)]
        codes, counts = np.unique(pairs[pairs >= 0], return_counts=True)
        weight = np.zeros(int(codes.max()) + 1)
        weight[codes] = self.share / counts
        total = torch.zeros(1, space.size, dtype=torch.float64)
        for rows, batch in zip(self.inputs.target_batches, problem.target):
            code = halves.group[rows]
            weights = torch.from_numpy(np.where(code >= 0, weight[code], 0.0))[None].to(space.like)
            total += space.loss_gradients(batch.inputs, weights, problem.objective).double().cpu()
        return total.to(space.like)


@dataclass(frozen=True, kw_only=True)
class SolveDisadvantaged:
    """Task: write the direction that serves the groups that are worse off, if any are; what is known of the groups.

    It is solved at the target's damping, so that both influences are in one unit.
    """

    groups: Disadvantaged
    folder: Path

    def __call__(self) -> dict[str, Any]:
        group, loss = self.groups.losses
        share, inputs = self.groups.share, self.groups.inputs
        solve = {}
        if share.any():
            problem, estimator = inputs.problem(path=False), self.groups.estimator
            sketch = None
            if estimator.sketched:
                sketch = sketch_curvature(problem.curvature, self.groups.rank, problem.seed)
            solution = estimator.solution(problem, self.groups.gradient(problem), sketch)
            solve = {"iterations": solution.iterations, "residual": solution.residual}
            with atomic_path(self.folder / "direction.safetensors") as aside:
                save_file({"direction": solution.x.contiguous().cpu()}, aside)
        names, codes = inputs.target.column("group"), inputs.halves.group
        means = group_means(loss, group) if len(group) else share
        groups = [
            {"group": str(names[int(np.argmax(codes == code))]), "loss": float(mean), "share": float(part)}
            for code, mean, part in zip(np.unique(group), means, share, strict=True)
        ]
        return {"groups": groups, **solve}


@dataclass(frozen=True, kw_only=True)
class ScoreForGroups:
    """Columns: in-sample influence of some scored pairs on the groups that are worse off; those that none can judge left out."""

    estimator: Directional
    sample: Path
    folder: Path

    def __call__(self, inputs: ScoringInputs, start: int, stop: int) -> Columns:
        rows = read_columns(self.sample, "pair")["pair"][start:stop]
        by_batch = _scorer(self, inputs).by_batch(inputs.batch(rows))[1][0]
        known = np.isfinite(by_batch).any(1)
        return {"pair": rows[known], "influence": mean_of_known(by_batch[known])}


@lru_cache(maxsize=1)
def _scorer(score: ScoreForGroups, inputs: ScoringInputs) -> Any:
    """Made once by each worker, with all that it computes of the bank."""
    direction, problem = (
        load_file(here(score.folder / "direction.safetensors"))["direction"],
        inputs.problem(path=False),
    )
    return score.estimator.scorer(problem, direction.to(problem.space.like.device))


def features_bytes(pool: PairSet, rows: int) -> int:
    """Memory that a task takes which fits or predicts by both embeddings of so many pairs, in bytes: in float32, in float64 and
    centred."""
    width = 2 * pool.table.dimension
    return LIBRARY_BYTES + min(rows, len(pool)) * width * (4 + 4 + 3 * 8) + 4 * 8 * width**2


def features(pool: PairSet, rows: IntArray | slice) -> FloatArray:
    """Both given embeddings of pairs, side by side: (n, 2 D)."""
    return torch.cat(pool.inputs(rows), 1).double().numpy()


@dataclass(frozen=True, kw_only=True)
class FitForGroups:
    """Task: fit influence on the groups as a linear function of embeddings; its effective degrees of freedom."""

    pool: PairSet
    folder: Path
    starts: Sequence[int]
    """Buckets of the pairs that are scored."""

    def __call__(self) -> float:
        buckets = [read_bucket(self.folder, "scored", start, "pair", "influence") for start in self.starts]
        pair, influence = (np.concatenate([one[name] for one in buckets]) for name in ("pair", "influence"))
        rows = slice(0, MAX_FITTED)  # of the initial sample, which is in canonical order; this is random
        fitted = fit_ridge(features(self.pool, pair[rows]), influence[rows])
        with atomic_path(self.folder / "ridge.npz") as aside, aside.open("wb") as file:
            np.savez(
                file, centre=fitted.centre, coefficients=fitted.coefficients, offset=np.array(fitted.offset)
            )
        return fitted.freedom


@dataclass(frozen=True, kw_only=True)
class PredictForGroups:
    """Columns: the fitted influence of a bucket of the pool."""

    pool: PairSet
    folder: Path

    def __call__(self, start: int, stop: int) -> Columns:
        values = np.load(here(self.folder / "ridge.npz"))
        fitted = Ridge(
            centre=values["centre"],
            coefficients=values["coefficients"],
            offset=float(values["offset"]),
            freedom=0,
        )
        return {"influence": fitted.predict(features(self.pool, slice(start, stop)))}


class Fairness(Stage):
    """Influence of all pairs on the groups that are worse off, from the scored ones; writes groups.parquet (influence).

    Nothing is written where the selection does not ask for it, the target names fewer than two groups, none is worse off than
    the mean, or the estimator scores along no direction.
    """

    name = "fairness"
    version = 2
    needs = ("proxies", "curvature", "influence")

    def settings(self, config: Any) -> Any:
        return config.selection.serves_groups, config.influence.bucket_size

    def work(self, run: Run, workers: Workers) -> Details:
        wanted, size = self.settings(run.config)
        estimator = directional(run.config)
        scored = run.manifest("influence")
        pairs, out = scored.rows_out, workers.folder
        details: dict[str, Any] = {"groups": []}
        if wanted and estimator is not None:
            rank = run.manifest("curvature").details["proxies"][ALL].get("rank", 0)
            inputs, machines = ScoringInputs.of(run, workers.device), workers.engine.machines
            heavy = workers.heavy(memory=fitting(scoring_bytes(inputs, size), machines))
            groups = Disadvantaged(inputs=inputs, estimator=estimator, rank=rank)
            solve = SolveDisadvantaged(groups=groups, folder=out)
            (details,) = workers.map([solve], unit="directions", label="solve", resources=heavy)
            if any(group["share"] for group in details["groups"]):
                sample = run.at("influence") / "influence.parquet"
                score = ScoreForGroups(estimator=estimator, sample=sample, folder=out)
                rows = range(scored.details["sample"] - scored.details["without_score"])
                with scoring_pass(workers, inputs, size, len(rows), resources=heavy) as scoring:
                    starts = scoring.write("scored", score, rows)
                fit = FitForGroups(pool=run.pool, folder=out, starts=starts)
                details["freedom"] = workers.once(fit, memory=features_bytes(run.pool, MAX_FITTED))
                workers.join("scored", starts)
                predict = PredictForGroups(pool=run.pool, folder=out)
                needs = Resources(memory=features_bytes(run.pool, RANGE))
                workers.table("groups", predict, pairs, RANGE, label="all pairs", resources=needs)
        return Details(rows_in=pairs, rows_out=pairs, details=details)
