"""Influence at a moment of training: what more weight on a pair does to the target loss by the very next step.

A step of AdamW moves the parameters by -eta D^-1 times the loss's gradient, so it lowers the target loss by
eta g . D^-1 grad l_z. It is also what influence tends to at large damping: (G + mu D)^-1 g -> D^-1 g / mu. No curvature
is solved, so it can be computed while a proxy trains. The unit depends on D and so on the moment: only its order and
its spread are meaningful.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from influencespace.core.contrastive import Objective
from influencespace.estimators.influence import InfluenceScorer, NegativeBatch, floored, target_gradients
from influencespace.models.space import Inputs, Space


def online_direction(space: Space, target: Sequence[Inputs], objective: Objective, D: Tensor) -> Tensor:
    """v = D^-1 g for the gradient g of the mean target loss over batches and AdamW's preconditioner D (p,): (1, p)."""
    one_fold = [np.zeros(len(inputs[0]), np.int64) for inputs in target]
    return target_gradients(space, target, one_fold, 1, objective) / floored(D)


def online_scorer(
    space: Space,
    target: Sequence[Inputs],
    bank: Sequence[NegativeBatch],
    objective: Objective,
    batch_size: int,
    D: Tensor,
) -> InfluenceScorer:
    """Scores pairs in both roles at the parameters of `space` as they are now: higher is more worth keeping."""
    direction = online_direction(space, target, objective, D)
    return InfluenceScorer(space, direction, bank, objective, batch_size)
