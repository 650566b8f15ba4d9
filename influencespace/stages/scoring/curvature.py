"""The curvature stage: for each proxy the target gradient by fold, a Nystrom sketch, and the solved directions.

Workers share the probes of a sketch, of which a task makes its own, and the right-hand sides of the solve; each sums over the
recorded batches in their order, so any number of workers gives the same bits. The sketch is made once for each proxy. An
estimator that scores along no direction leaves nothing to do here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.nystrom import Sketch, nystrom, probes, sketch_bytes
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import (
    Columns,
    WriteBucket,
    bucket_path,
    buckets_of,
    read_bucket,
    write_tasks,
)
from influencespace.data.mirror import here, is_file
from influencespace.engine.placement import Resources
from influencespace.estimators.problem import Directional
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.proxy import proxy_name
from influencespace.stages.scoring.scoring import ScoringInputs, make_estimator

PROBES = 8
"""In one task: enough that a pass over the bank pays, few enough that all workers have some."""
DIRECTIONS = 5
"""Right-hand sides that one task solves for."""
WORKER_MEMORY = 800 * 2**20
"""Bytes of a worker, without a sketch: Python, torch, a proxy and its bank."""


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

    def __call__(self, start: int, stop: int) -> Columns:
        problem = self.inputs.problem(self.fold, path=False)
        D = problem.preconditioner
        Omega = probes(len(D), range(start, stop), problem.seed, D.dtype).to(D.device)
        products = problem.curvature(Omega.T.contiguous())
        return {"products": np.ascontiguousarray(products.detach().cpu().numpy())}


def sketch_path(folder: Path, proxy: str, rank: int) -> Path:
    """Where a proxy's sketch and target gradients lie while they serve the work."""
    return bucket_path(folder, f"{proxy}-sketch", rank).with_suffix(".safetensors")


@dataclass(frozen=True, kw_only=True)
class SketchProxy:
    """Task: sketch from the probes' products, and the target's gradients, of one proxy; what is reported of them."""

    inputs: ScoringInputs
    fold: int | None
    rank: int
    """0 for no sketch."""
    starts: tuple[int, ...]
    """Of the buckets of products."""
    folder: Path

    @property
    def name(self) -> str:
        return f"sketch of {proxy_name(self.fold)}"

    def __call__(self) -> dict[str, Any]:
        proxy = proxy_name(self.fold)
        path = sketch_path(self.folder, proxy, self.rank)
        if is_file(path):
            with safe_open(here(path), "pt") as file:
                done: dict[str, Any] = json.loads(file.metadata()["record"])
            return done
        problem = self.inputs.problem(self.fold, path=False)
        tensors = {"gradients": self.inputs.target_gradients(problem).cpu().contiguous()}
        record: dict[str, Any] = {"name": proxy, "damping": problem.damping}
        record |= {"target_folds": len(tensors["gradients"])}
        if self.rank:
            sketch = self._sketch(problem.space.size, problem.seed)
            tensors |= {"U": sketch.U.contiguous(), "eigenvalues": sketch.lam}
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
        proxy = proxy_name(self.fold)
        parts = [read_bucket(self.folder, proxy, start, "products")["products"] for start in self.starts]
        Y = torch.from_numpy(np.concatenate(parts)).T
        return nystrom(probes(size, range(self.rank), seed, Y.dtype), Y)


@dataclass(frozen=True)
class SolveDirections:
    """Columns: the solved directions of some folds of the target (n, p), and how well each converged."""

    inputs: ScoringInputs
    estimator: Directional
    fold: int | None
    sketch: Path

    def __call__(self, start: int, stop: int) -> Columns:
        problem = self.inputs.problem(self.fold, path=False)
        tensors = {
            name: value.to(problem.preconditioner) for name, value in load_file(here(self.sketch)).items()
        }
        sketch = Sketch(U=tensors["U"], lam=tensors["eigenvalues"]) if "U" in tensors else None
        solution = self.estimator.solution(problem, tensors["gradients"][start:stop], sketch)
        return {
            "directions": solution.x.detach().cpu().numpy(),
            "iterations": np.full(stop - start, solution.iterations),
            "residual": np.full(stop - start, solution.residual),
        }


@dataclass(frozen=True, kw_only=True)
class JoinDirections:
    """Task: write the directions of one proxy, with what is reported of them."""

    folder: Path
    record: dict[str, Any]
    sketch: Path
    starts: tuple[int, ...]

    def __call__(self) -> dict[str, Any]:
        proxy: str = self.record["name"]
        parts = [
            read_bucket(self.folder, f"{proxy}-directions", start, "directions", "iterations", "residual")
            for start in self.starts
        ]
        column = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        record = self.record | {
            "iterations": int(column["iterations"].max()),
            "residual": float(column["residual"].max()),
        }
        tensors = {"directions": torch.from_numpy(column["directions"])}
        with safe_open(here(self.sketch), "pt") as file:
            if "eigenvalues" in file.keys():  # noqa: SIM118 - it is no mapping
                tensors["eigenvalues"] = file.get_tensor("eigenvalues")
        with atomic_path(self.folder / f"{proxy}.safetensors") as aside:
            save_file(tensors, aside, {"record": json.dumps(record)})
        return record


def directions_of(folder: Path, proxy: str) -> Tensor:
    """Solved directions of a proxy, one for each fold of the target: (F, p)."""
    return load_file(here(folder / f"{proxy}.safetensors"))["directions"]


@dataclass(frozen=True)
class CountParameters:
    """Task: the parameters of a proxy."""

    inputs: ScoringInputs

    def __call__(self) -> int:
        return self.inputs.problem(path=False).space.size


class Curvature(Stage):
    """Solves (G + mu D) v = grad L_target for every proxy; the sketch is doubled until it reaches the damping."""

    name = "curvature"
    version = 2
    needs = ("proxies",)

    def settings(self, config: Any) -> Any:
        return config.curvature, config.influence.estimator, config.influence.options, config.seed

    def resources(self, run: Run) -> Resources:
        return Resources(memory=WORKER_MEMORY)

    def work(self, run: Run, workers: Workers) -> Details:
        estimator = directional(run.config)
        if estimator is None:
            return Details(details={"proxies": {}})
        inputs = ScoringInputs.of(run, workers.device)
        folds: list[int | None] = [None, *range(run.config.proxy.fold_count(len(run.pool)))]
        sketches = self._sketches(inputs, folds, estimator.sketched, run.config.curvature, workers)
        return Details(details={"proxies": self._solved(inputs, estimator, sketches, workers)})

    def _sketches(
        self, inputs: ScoringInputs, folds: Sequence[int | None], probed: bool, config: Any, workers: Workers
    ) -> dict[int | None, dict[str, Any]]:
        """What is reported of the sketch of each proxy; probes are added until it reaches the damping."""
        size = workers.once(CountParameters(inputs))
        rank, limit = (min(wanted, size) if probed else 0 for wanted in (config.rank, config.max_rank))
        left, probes_done, starts = list(folds), 0, list[int]()
        records: dict[int | None, dict[str, Any]] = {}
        while left:
            spans = [(probes_done + a, probes_done + b) for a, b in buckets_of(rank - probes_done, PROBES)]
            if spans:
                self._probe(inputs, left, spans, workers)
            starts, probes_done = [*starts, *(start for start, _ in spans)], rank
            tasks = [
                SketchProxy(inputs=inputs, fold=fold, rank=rank, starts=tuple(starts), folder=workers.folder)
                for fold in left
            ]
            needs = workers.heavy(memory=WORKER_MEMORY + sketch_bytes(size, rank))
            done = {one["name"]: one for one in workers.map(tasks, unit="sketches", resources=needs)}
            records |= {fold: done[proxy_name(fold)] for fold in left}
            if 2 * rank > limit or not rank:
                break
            left = [fold for fold in left if records[fold]["smallest_eigenvalue_over_damping"] > 1]
            rank *= 2
        return records

    def _probe(
        self,
        inputs: ScoringInputs,
        folds: Sequence[int | None],
        spans: Sequence[tuple[int, int]],
        workers: Workers,
    ) -> None:
        tasks: list[WriteBucket] = []
        for fold in folds:
            tasks += write_tasks(workers.folder, proxy_name(fold), ProbeProducts(inputs, fold), spans)
        total, label = sum(stop - start for start, stop in spans) * len(folds), f"rank {spans[-1][1]}"
        needs = workers.heavy(memory=WORKER_MEMORY)
        workers.map(tasks, total=total, unit="probes", label=label, size=int, resources=needs)

    def _solved(
        self,
        inputs: ScoringInputs,
        estimator: Directional,
        sketches: dict[int | None, dict[str, Any]],
        workers: Workers,
    ) -> dict[str, Any]:
        """What is reported of each proxy."""
        folder, tasks, joins = workers.folder, list[WriteBucket](), list[JoinDirections]()
        for fold, record in sketches.items():
            path = sketch_path(folder, proxy_name(fold), record.get("rank", 0))
            spans = list(buckets_of(record["target_folds"], DIRECTIONS))
            solve = SolveDirections(inputs, estimator, fold, path)
            tasks += write_tasks(folder, f"{proxy_name(fold)}-directions", solve, spans)
            starts = tuple(start for start, _ in spans)
            joins.append(JoinDirections(folder=folder, record=record, sketch=path, starts=starts))
        needs = workers.heavy(memory=WORKER_MEMORY)
        total = sum(record["target_folds"] for record in sketches.values())
        workers.map(tasks, total=total, unit="directions", label="solve", size=int, resources=needs)
        records = {record["name"]: record for record in workers.map(joins, unit="proxies", label="join")}
        return {proxy_name(fold): records[proxy_name(fold)] for fold in sketches}
