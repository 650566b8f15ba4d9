"""The curvature stage: for each proxy the target gradient by fold, a Nystrom sketch, and the solved directions.

Workers share the probes of a sketch; each sums over the recorded batches in their order, so any number of workers gives
the same bits. An estimator that scores along no direction leaves nothing to do here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.nystrom import Sketch, nystrom, probes
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns, WriteBucket, buckets_of, read_bucket
from influencespace.estimators.problem import Directional
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.proxy import proxy_name
from influencespace.stages.scoring.scoring import ScoringInputs, make_estimator

PROBES = 24
"""In one task: enough that a pass over the bank pays, few enough that all workers have some."""


def directional(config: Any) -> Directional | None:
    """The estimator of a run's own score, where that is the influence along solved directions."""
    chosen = config.influence
    estimator = make_estimator(chosen.estimator, chosen.options, config.curvature)
    return estimator if isinstance(estimator, Directional) else None


@dataclass(frozen=True)
class ProbeProducts:
    """The curvature times some of the probes of a proxy: the column `products` (n, p)."""

    inputs: ScoringInputs
    fold: int | None
    rank: int

    def __call__(self, start: int, stop: int) -> Columns:
        problem = self.inputs.problem(self.fold, path=False)
        Omega = probes(problem.space.size, self.rank, problem.seed)[:, start:stop]
        products = problem.curvature(Omega.T.contiguous())
        return {"products": np.ascontiguousarray(products.detach().numpy())}


@dataclass(frozen=True, kw_only=True)
class SolveProxy:
    """Task: sketch from the probes, then the solved directions of one proxy, with their diagnostics."""

    inputs: ScoringInputs
    estimator: Directional
    fold: int | None
    rank: int
    folder: Path

    @property
    def proxy(self) -> str:
        return proxy_name(self.fold)

    @property
    def name(self) -> str:
        return f"directions of {self.proxy}"

    def __call__(self) -> dict[str, Any]:
        path = self.folder / f"{self.proxy}.safetensors"
        if path.exists():  # of this rank, or of a smaller one
            with safe_open(path, "pt") as file:
                done: dict[str, Any] = json.loads(file.metadata()["record"])
            if done.get("rank", self.rank) == self.rank:
                return done
        problem = self.inputs.problem(self.fold, path=False)
        sketch = self._sketch(problem.space.size, problem.seed) if self.estimator.sketched else None
        solution = self.estimator.solution(problem, self.inputs.target_gradients(problem), sketch)
        record = {"name": self.proxy, "damping": problem.damping}
        record |= {"iterations": solution.iterations, "residual": solution.residual}
        tensors = {"directions": solution.x.contiguous()}
        if sketch is not None:
            tensors["eigenvalues"] = sketch.lam
            record |= {
                "rank": self.rank,
                "effective_dimension": sketch.effective_dimension(problem.damping),
                "smallest_eigenvalue_over_damping": sketch.tail_ratio(problem.damping),
                "largest_eigenvalue_over_damping": float(sketch.lam[0]) / problem.damping,
            }
        with atomic_path(path) as aside:
            save_file(tensors, aside, {"record": json.dumps(record)})
        return record

    def _sketch(self, size: int, seed: int) -> Sketch:
        parts = [
            read_bucket(self.folder, f"{self.proxy}-{self.rank}", start, "products")["products"]
            for start, _ in buckets_of(self.rank, PROBES)
        ]
        Y = torch.from_numpy(np.concatenate(parts)).T
        return nystrom(probes(size, self.rank, seed), Y)


def directions_of(folder: Path, proxy: str) -> Tensor:
    """Solved directions of a proxy, one for each fold of the target: (F, p)."""
    return load_file(folder / f"{proxy}.safetensors")["directions"]


@dataclass(frozen=True)
class CountParameters:
    """Task: the parameters of a proxy."""

    inputs: ScoringInputs

    def __call__(self) -> int:
        return self.inputs.problem(path=False).space.size


class Curvature(Stage):
    """Solves (G + mu D) v = grad L_target for every proxy; the sketch is doubled until it reaches the damping."""

    name = "curvature"
    needs = ("proxies",)

    def settings(self, config: Any) -> Any:
        return config.curvature, config.influence.estimator, config.influence.options, config.seed

    def work(self, run: Run, workers: Workers) -> Details:
        estimator = directional(run.config)
        if estimator is None:
            return Details(details={"proxies": {}})
        inputs, config = ScoringInputs.of(run), run.config.curvature
        size = workers.once(CountParameters(inputs))
        rank, limit = min(config.rank, size), min(config.max_rank, size)
        left: list[int | None] = [None, *range(run.config.proxy.fold_count(len(run.pool)))]
        records: dict[str, Any] = {}
        while left:
            if estimator.sketched:
                self._probe(inputs, left, rank, workers)
            tasks = [
                SolveProxy(inputs=inputs, estimator=estimator, fold=k, rank=rank, folder=workers.folder)
                for k in left
            ]
            solved = workers.map(tasks, unit="proxies", label="solve")
            records |= {record["name"]: record for record in solved}
            if not estimator.sketched or 2 * rank > limit:
                break
            left = [k for k in left if records[proxy_name(k)]["smallest_eigenvalue_over_damping"] > 1]
            rank *= 2
        return Details(details={"proxies": records})

    def _probe(self, inputs: ScoringInputs, folds: list[int | None], rank: int, workers: Workers) -> None:
        tasks = [
            WriteBucket(
                folder=workers.folder,
                table=f"{proxy_name(k)}-{rank}",
                start=start,
                stop=stop,
                compute=ProbeProducts(inputs, k, rank),
            )
            for k in folds
            for start, stop in buckets_of(rank, PROBES)
        ]
        workers.map(tasks, total=rank * len(folds), unit="probes", label=f"rank {rank}", size=int)
