"""Whether influence weights help is asked of real retraining, on the half of the target that makes model choices."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influencespace.core.select import SelectConfig, best_candidate
from influencespace.data.artifacts import write_json
from influencespace.data.pair_set import PairSet
from influencespace.stages.decide import Scores, decide
from influencespace.stages.progress import progress
from influencespace.stages.runtime import Runtime, call
from influencespace.stages.student import (
    StudentsConfig,
    TargetHalves,
    choosing_losses,
    read_note,
    train_subset,
)

FloatArray = NDArray[np.float64]
# Halved from one standard deviation of influence; colder ones leave too few pairs.
TEMPERATURES = (1.0, 0.5, 0.25)
GROUPS = 20  # of the target's images, over which the gain must be sure
SEEDS = (101, 102)  # not those of the retraining that judges


def candidates(config: SelectConfig) -> list[SelectConfig]:
    """The decisions to choose from, uniform weights first."""
    if config.weights != "confirmed":
        return [config]
    weighted = [replace(config, weights="influence", tau_high=tau) for tau in TEMPERATURES]
    return [replace(config, weights="uniform"), *weighted]


@dataclass(frozen=True, kw_only=True)
class TrialStudent:
    """Task: loss on the choosing half of the target of a student trained on what a candidate keeps, by its weights."""

    pool: PairSet
    target: PairSet
    scores: Scores
    config: SelectConfig
    students: StudentsConfig
    steps: int
    seed: int
    folder: Path
    mark: str

    @property
    def name(self) -> str:
        return f"trial-{self.config.weights}-{self.config.tau_high:g}-{self.seed}"

    def __call__(self) -> dict[str, Any]:
        note = self.folder / "trials" / f"{self.name}.json"
        done = read_note(note, self.mark)
        if done is not None:
            return done
        began = time.monotonic()
        weight = decide(self.scores, self.config).weight
        trained = train_subset(self.pool, weight, self.students.train, self.steps, self.seed)
        halves = TargetHalves(self.target, self.students.seed)
        groups = min(GROUPS, len(np.unique(self.target.image[halves.choosing])))
        result = {
            "mark": self.mark,
            "weights": self.config.weights,
            "tau_high": self.config.tau_high,
            "seed": self.seed,
            "target_loss": choosing_losses(trained.heads, halves, self.students.train, groups),
            "seconds": time.monotonic() - began,
        }
        write_json(note, result)
        return result


def confirm(
    pool: PairSet,
    target: PairSet,
    scores: Scores,
    config: SelectConfig,
    students: StudentsConfig,
    steps: int,
    folder: Path,
    mark: str,
    runtime: Runtime,
) -> tuple[SelectConfig, list[dict[str, Any]]]:
    """The candidate that retraining likes best, and the trials; nothing is trained where the config leaves no choice."""
    choices = candidates(config)
    if len(choices) == 1:
        return config, []
    tasks = [
        TrialStudent(
            pool=pool,
            target=target,
            scores=scores,
            config=choice,
            students=students,
            steps=steps,
            seed=seed,
            folder=folder,
            mark=mark,
        )
        for choice in choices
        for seed in SEEDS
    ]
    trials = []
    with progress("confirm", len(tasks), "students") as bar:
        for trial in runtime.map(call, tasks, num_actors=runtime.cores):
            trials.append(trial)
            bar.advance()
    loss = {(t["weights"], t["tau_high"], t["seed"]): t["target_loss"] for t in trials}
    losses = np.array([[loss[c.weights, c.tau_high, seed] for seed in SEEDS] for c in choices])
    best = best_candidate(losses.mean(1))
    table = [
        {"weights": c.weights, "tau_high": c.tau_high, "target_loss": float(mean), "confirmed": i == best}
        for i, (c, mean) in enumerate(zip(choices, losses.mean((1, 2))))
    ]
    return choices[best], table
