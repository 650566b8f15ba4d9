"""Scores that add up over the checkpoints of the training path."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from influencespace.errors import InputError
from influencespace.estimators.problem import Batch, Checkpoint, FloatArray, Problem


def at_checkpoints(problem: Problem) -> Iterator[tuple[Checkpoint, Problem]]:
    """The problem as it was at each checkpoint, first to last; one proxy is in memory at a time."""
    for checkpoint in problem.checkpoints:
        yield checkpoint, replace(problem, space=checkpoint.load())


def require_checkpoints(problem: Problem, name: str) -> None:
    """Raises InputError where no checkpoints were kept."""
    if not problem.checkpoints:
        raise InputError(
            f"{name} follows the proxy along its training and the problem has no checkpoints: keep some in training, "
            "or use ecif, which needs the trained proxy only"
        )


def without_path(problem: Problem) -> Problem:
    """The problem for a scorer that has loaded its checkpoints: the others need not travel with it."""
    return replace(problem, checkpoints=(), trajectory=None)


@dataclass(frozen=True)
class CheckpointSum:
    """Scores pairs by all checkpoints, loaded one after the other for each batch: use large batches."""

    problem: Problem
    term: Callable[[int, Checkpoint, Problem, Batch], FloatArray]
    """Score (n,) by one checkpoint: its number, the checkpoint, the problem as it was there, the batch."""

    def __call__(self, batch: Batch) -> FloatArray:
        scores = np.zeros(len(batch))
        for index, (checkpoint, then) in enumerate(at_checkpoints(self.problem)):
            scores += self.term(index, checkpoint, then, batch)
        return scores
