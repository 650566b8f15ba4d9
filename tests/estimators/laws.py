"""A small problem, and per-sample gradients and projections as dense matrices."""

import numpy as np
import torch
from problems import Small
from torch import Tensor

from influencespace.estimators.influence import InfluenceScorer
from influencespace.estimators.problem import Batch, Problem
from influencespace.models.projected import ReducedSpace

SMALL = Small(pairs=48, batch_size=12, steps=40)
WHOLE = SMALL.cut()


def dense_gradients(problem: Problem, batch: Batch) -> Tensor:
    """Centred gradients of F_z (n, p), one forward-mode direction for each parameter; nan where no negative batch judges."""
    eye = torch.eye(problem.space.size, dtype=torch.float64)
    scorer = InfluenceScorer(problem.space, eye, problem.bank, problem.objective, problem.batch_size)
    return torch.from_numpy(np.nanmean(scorer(batch.inputs, batch.image).by_batch, -1).T)


def projection_matrix(reduced: ReducedSpace) -> Tensor:
    """All blocks' projections as one matrix (p, k)."""
    return torch.block_diag(*(torch.kron(projection.A, projection.B) for projection in reduced.projections))
