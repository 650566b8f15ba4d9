"""Metagradient descent on the weights of the pool's pairs: mgd.parquet."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.data.artifacts import atomic_path
from influencespace.data.buckets import Columns
from influencespace.data.mirror import here, is_file
from influencespace.models.metagradient import Descent, round_of
from influencespace.models.trajectory import space_at
from influencespace.run import Run, Workers
from influencespace.stages.passes import RANGE
from influencespace.stages.scoring.scoring import ScoringInputs

NAME = "mgd"
ROUNDS = 10


@dataclass(frozen=True)
class LookUp:
    """Weights of some rows of the pool, as a tensor."""

    weights: FloatArray  # (N,)
    device: str

    def __call__(self, rows: IntArray) -> Tensor:
        return torch.from_numpy(self.weights[rows].astype(np.float32)).to(self.device)


def saved(folder: Path, rounds: int) -> Path:
    """Where a descent lies after so many rounds; it only serves the work."""
    return folder / f".{NAME}-{rounds:02d}.npy"


def load(path: Path) -> Descent:
    votes, total = np.load(here(path), mmap_mode="r")
    return Descent(votes, total)


@dataclass(frozen=True, kw_only=True)
class DescentRound:
    """Task: one more round, unless its file is there. Holds some 40 bytes a pair of the pool: every step adds to any of them."""

    inputs: ScoringInputs
    folder: Path
    before: int
    """Rounds that are done."""

    @property
    def name(self) -> str:
        return f"round {self.before + 1} of {NAME}"

    def __call__(self) -> int:
        path = saved(self.folder, self.before + 1)
        if not is_file(path):
            rows = len(self.inputs.pool)
            descent = load(saved(self.folder, self.before)) if self.before else Descent.begin(rows)
            after = self._after(descent)
            with atomic_path(path) as aside, aside.open("wb") as file:
                np.save(file, np.stack([after.votes, after.total]))
        return 1

    def _after(self, descent: Descent) -> Descent:
        problem = self.inputs.problem()
        assert problem.trajectory is not None
        trajectory = replace(problem.trajectory, weights=LookUp(descent.weights, self.inputs.device))

        def target_gradient(theta: Tensor) -> Tensor:
            return problem.gradient_at(space_at(problem.space, theta))

        return round_of(descent, trajectory, target_gradient)


@dataclass(frozen=True)
class ScoreOfRange:
    """The column `score` of a range of pairs."""

    path: Path

    def __call__(self, start: int, stop: int) -> Columns:
        return {"score": load(self.path).score[start:stop]}


def write_descent(run: Run, workers: Workers, **needs: Any) -> None:
    """Write mgd.parquet, of the first round's pool, its proxy of all pairs and the half of the target that gives gradients."""
    inputs = ScoringInputs.of(run.first, workers.device)
    for before in range(ROUNDS):
        one = DescentRound(inputs=inputs, folder=workers.folder, before=before)
        workers.map([one], unit="rounds", label=f"{NAME} {before + 1} of {ROUNDS}", **needs)
    workers.table(NAME, ScoreOfRange(saved(workers.folder, ROUNDS)), len(inputs.pool), RANGE, label=NAME)
