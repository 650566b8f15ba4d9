"""The curvature stage: for each student the target gradient by fold, a Nystrom sketch, and the solved directions.

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
from influencespace.core.linalg import nystrom, probes
from influencespace.core.objective import Objective
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen, write_json
from influencespace.data.pair_set import PairSet
from influencespace.estimators.nystrom import (
    CurvatureConfig,
    curvature_products,
    damping_of,
    floored,
    solve_directions,
    target_gradients,
)
from influencespace.models.space import Space
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.progress import progress
from influencespace.stages.runtime import Runtime, call, run_once
from influencespace.stages.student import Student, StudentsConfig, TargetHalves, student_name


@options(frozen=True, kw_only=True)
class TargetConfig:
    """The target's own uncertainty."""

    folds: int = Field(default=10, ge=2)
    """Folds of the target's images, one direction each: their spread is the target's standard error."""


@dataclass(frozen=True, kw_only=True)
class StudentSpace:
    """A student with the recorded contexts on which its curvature and target gradient are taken."""

    pool: PairSet
    target: PairSet
    students: StudentsConfig
    config: CurvatureConfig
    target_config: TargetConfig
    student: Student

    @property
    def objective(self) -> Objective:
        return self.students.train.objective

    @cached_property
    def space(self) -> Space:
        return Space(self.student.heads)

    @cached_property
    def contexts(self) -> list[tuple[Tensor, Tensor]]:
        return [self.pool.inputs(rows) for rows in self.student.bank]

    @cached_property
    def preconditioner(self) -> Tensor:
        return floored(self.student.preconditioner)

    @property
    def damping(self) -> float:
        train = self.students.train
        return damping_of(self.config, self.student.sum_of_learning_rates, train.weight_decay)

    def target_gradients(self) -> Tensor:
        halves = TargetHalves(self.target, self.students.seed)
        contexts = halves.contexts(halves.gradient, self.students.train.batch_size)
        image = self.target.image
        count = min(self.target_config.folds, len(np.unique(image[halves.gradient])))
        fold = np.zeros(len(self.target), np.int64)
        fold[halves.gradient] = folds_by_image(image[halves.gradient], count, self.students.seed)
        inputs = [self.target.inputs(rows) for rows in contexts]
        return target_gradients(self.space, inputs, [fold[rows] for rows in contexts], count, self.objective)


@dataclass(frozen=True, kw_only=True)
class SketchBlock:
    """Task: the curvature times some of the probes."""

    space: StudentSpace
    rank: int
    start: int
    stop: int
    folder: Path

    @property
    def name(self) -> str:
        return f"probes {self.start} to {self.stop} of {self.space.student.name}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.space.student.name}-{self.rank}-{self.start:05d}-{self.stop:05d}.probes"

    def __call__(self) -> int:
        if not self.path.exists():
            s = self.space
            Omega = probes(s.space.size, self.rank, s.config.seed)[:, self.start : self.stop]
            Y = curvature_products(s.space, s.contexts, Omega.T.contiguous(), s.objective, s.preconditioner)
            with atomic_path(self.path) as aside:
                save_file({"Y": Y}, aside)
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class SolveStudent:
    """Task: sketch from the blocks, then the solved directions of one student, with their diagnostics."""

    space: StudentSpace
    rank: int
    blocks: list[Path]
    folder: Path

    @property
    def name(self) -> str:
        return f"directions of {self.space.student.name}"

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
        with atomic_path(self.folder / f"{s.student.name}.safetensors") as aside:
            save_file({"directions": solution.x.contiguous(), "eigenvalues": sketch.lam}, aside)
        note = {
            "name": s.student.name,
            "rank": self.rank,
            "damping": s.damping,
            "effective_dimension": sketch.effective_dimension(s.damping),
            "smallest_eigenvalue_over_damping": sketch.tail_ratio(s.damping),
            "largest_eigenvalue_over_damping": float(sketch.lam[0]) / s.damping,
            "iterations": solution.iterations,
            "residual": solution.residual,
        }
        write_json(self.folder / f"{s.student.name}.json", note)
        return note


def count_parameters(space: StudentSpace) -> int:
    return space.space.size


def directions_of(folder: Path, student: str) -> Tensor:
    """Solved directions of a student, one for each fold of the target: (F, p)."""
    return load_file(folder / f"{student}.safetensors")["directions"]


def curvature(
    pool: PairSet,
    target: PairSet,
    students: StudentsConfig,
    students_folder: Path,
    inputs: dict[str, str],
    config: CurvatureConfig,
    target_config: TargetConfig,
    out: Path,
    runtime: Runtime,
) -> Manifest:
    """Solve (G + mu D) v = grad L_target for every student; the sketch is doubled until it reaches the damping."""
    mark = fingerprint({"stage": "curvature", "config": config, "target": target_config, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    parts = reopen(out) / f"parts-{mark}"  # parts of another config are never taken for these
    spaces = [
        StudentSpace(
            pool=pool,
            target=target,
            students=students,
            config=config,
            target_config=target_config,
            student=Student(students_folder, student_name(fold)),
        )
        for fold in (None, *range(students.folds))
    ]
    notes: dict[str, Any] = {}
    size = run_once(runtime, partial(count_parameters, spaces[0]))
    rank, most = min(config.rank, size), min(config.max_rank, size)
    left = spaces
    while left:
        width = max(4, math.ceil(rank * len(left) / (4 * runtime.cores)))
        tasks = [
            SketchBlock(space=s, rank=rank, start=a, stop=min(a + width, rank), folder=parts)
            for s in left
            for a in range(0, rank, width)
        ]
        with progress(f"curvature (rank {rank})", rank * len(left), "probes") as bar:
            for count in runtime.map(call, tasks, num_actors=runtime.cores):
                bar.advance(count)
        solves = [
            SolveStudent(space=s, rank=rank, blocks=[t.path for t in tasks if t.space is s], folder=out)
            for s in left
        ]
        for note in runtime.map(call, solves, num_actors=runtime.cores):
            notes[note["name"]] = note
        left = [s for s in left if notes[s.student.name]["smallest_eigenvalue_over_damping"] > 1]
        if 2 * rank > most:
            break
        rank *= 2
    for path in sorted(parts.glob("*")):
        path.unlink()
    parts.rmdir()
    manifest = Manifest(stage="curvature", fingerprint=mark, inputs=inputs, details={"students": notes})
    return finish_stage(out, manifest, began)
