"""The curvature stage: for each proxy the target gradient by fold, a Nystrom sketch, and the solved directions.

Actors share the probes of a sketch; each sums over the recorded contexts in their order, so any number of actors gives
the same bits.
"""

import math
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from safetensors.torch import load_file, save_file
from torch import Tensor

from influencespace.core.batches import folds_by_image
from influencespace.core.contrastive import Objective
from influencespace.core.linalg import nystrom, probes
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen, write_json
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, run_once, run_task
from influencespace.engine.progress import progress
from influencespace.estimators.influence import (
    CurvatureConfig,
    curvature_products,
    damping_of,
    floored,
    solve_directions,
    target_gradients,
)
from influencespace.models.space import Space
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.proxies.proxies import Proxy, ProxyConfig, TargetHalves, proxy_name


@options(frozen=True, kw_only=True)
class TargetConfig:
    """The target's own uncertainty."""

    folds: int = Field(default=10, ge=2)
    """Folds of the target's images, one direction each: their spread is the target's standard error."""


@dataclass(frozen=True, kw_only=True)
class ProxySpace:
    """A proxy with the recorded contexts on which its curvature and target gradient are taken."""

    pool: PairSet
    target: PairSet
    proxies: ProxyConfig
    config: CurvatureConfig
    target_config: TargetConfig
    proxy: Proxy

    @property
    def objective(self) -> Objective:
        return self.proxies.train.objective

    @cached_property
    def space(self) -> Space:
        return Space(self.proxy.heads)

    @cached_property
    def contexts(self) -> list[tuple[Tensor, Tensor]]:
        return [self.pool.inputs(rows) for rows in self.proxy.bank]

    @cached_property
    def preconditioner(self) -> Tensor:
        return floored(self.proxy.preconditioner)

    @property
    def damping(self) -> float:
        train = self.proxies.train
        return damping_of(self.config, self.proxy.sum_of_learning_rates, train.weight_decay)

    def target_gradients(self) -> Tensor:
        halves = TargetHalves(self.target, self.proxies.seed)
        contexts = halves.contexts(halves.gradient, self.proxies.train.batch_size)
        image = self.target.image
        count = min(self.target_config.folds, len(np.unique(image[halves.gradient])))
        fold = np.zeros(len(self.target), np.int64)
        fold[halves.gradient] = folds_by_image(image[halves.gradient], count, self.proxies.seed)
        inputs = [self.target.inputs(rows) for rows in contexts]
        return target_gradients(self.space, inputs, [fold[rows] for rows in contexts], count, self.objective)


@dataclass(frozen=True, kw_only=True)
class SketchBlock:
    """Task: the curvature times some of the probes."""

    space: ProxySpace
    rank: int
    start: int
    stop: int
    folder: Path

    @property
    def name(self) -> str:
        return f"probes {self.start} to {self.stop} of {self.space.proxy.name}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.space.proxy.name}-{self.rank}-{self.start:05d}-{self.stop:05d}.probes"

    def __call__(self) -> int:
        if not self.path.exists():
            s = self.space
            Omega = probes(s.space.size, self.rank, s.config.seed)[:, self.start : self.stop]
            Y = curvature_products(s.space, s.contexts, Omega.T.contiguous(), s.objective, s.preconditioner)
            with atomic_path(self.path) as aside:
                save_file({"Y": Y}, aside)
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class SolveProxy:
    """Task: sketch from the blocks, then the solved directions of one proxy, with their diagnostics."""

    space: ProxySpace
    rank: int
    blocks: list[Path]
    folder: Path

    @property
    def name(self) -> str:
        return f"directions of {self.space.proxy.name}"

    def __call__(self) -> dict[str, Any]:
        s = self.space
        Y = torch.cat([load_file(path)["Y"] for path in self.blocks]).T
        sketch = nystrom(probes(s.space.size, self.rank, s.config.seed), Y)
        solution = solve_directions(
            s.space,
            s.contexts,
            s.objective,
            s.preconditioner,
            sketch,
            s.damping,
            s.target_gradients(),
            s.config,
        )
        with atomic_path(self.folder / f"{s.proxy.name}.safetensors") as aside:
            save_file({"directions": solution.x.contiguous(), "eigenvalues": sketch.lam}, aside)
        note = {
            "name": s.proxy.name,
            "rank": self.rank,
            "damping": s.damping,
            "effective_dimension": sketch.effective_dimension(s.damping),
            "smallest_eigenvalue_over_damping": sketch.tail_ratio(s.damping),
            "largest_eigenvalue_over_damping": float(sketch.lam[0]) / s.damping,
            "iterations": solution.iterations,
            "residual": solution.residual,
        }
        write_json(self.folder / f"{s.proxy.name}.json", note)
        return note


def count_parameters(space: ProxySpace) -> int:
    return space.space.size


def directions_of(folder: Path, proxy: str) -> Tensor:
    """Solved directions of a proxy, one for each fold of the target: (F, p)."""
    return load_file(folder / f"{proxy}.safetensors")["directions"]


def curvature(
    pool: PairSet,
    target: PairSet,
    proxies: ProxyConfig,
    proxy_folder: Path,
    inputs: dict[str, str],
    config: CurvatureConfig,
    target_config: TargetConfig,
    out: Path,
    engine: Engine,
) -> Manifest:
    """Solve (G + mu D) v = grad L_target for every proxy; the sketch is doubled until it reaches the damping."""
    mark = fingerprint({"stage": "curvature", "config": config, "target": target_config, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    parts = reopen(out) / f"parts-{mark}"  # parts of another config are never taken for these
    spaces = [
        ProxySpace(
            pool=pool,
            target=target,
            proxies=proxies,
            config=config,
            target_config=target_config,
            proxy=Proxy(proxy_folder, proxy_name(fold)),
        )
        for fold in (None, *range(proxies.folds))
    ]
    notes: dict[str, Any] = {}
    size = run_once(engine, partial(count_parameters, spaces[0]))
    rank, most = min(config.rank, size), min(config.max_rank, size)
    left = spaces
    while left:
        width = max(4, math.ceil(rank * len(left) / (4 * engine.cores)))
        tasks = [
            SketchBlock(space=s, rank=rank, start=a, stop=min(a + width, rank), folder=parts)
            for s in left
            for a in range(0, rank, width)
        ]
        with progress(f"curvature (rank {rank})", rank * len(left), "probes") as bar:
            for count in engine.map(run_task, tasks, num_actors=engine.cores):
                bar.advance(count)
        solves = [
            SolveProxy(space=s, rank=rank, blocks=[t.path for t in tasks if t.space is s], folder=out)
            for s in left
        ]
        for note in engine.map(run_task, solves, num_actors=engine.cores):
            notes[note["name"]] = note
        left = [s for s in left if notes[s.proxy.name]["smallest_eigenvalue_over_damping"] > 1]
        if 2 * rank > most:
            break
        rank *= 2
    for path in sorted(parts.glob("*")):
        path.unlink()
    parts.rmdir()
    manifest = Manifest(stage="curvature", fingerprint=mark, inputs=inputs, details={"proxies": notes})
    return finish_stage(out, manifest, began)
