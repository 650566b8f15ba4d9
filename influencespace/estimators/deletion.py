"""Deletion without retraining: where the proxy would have ended, had some pairs been left out of its batches.

A proxy that stops early is not at a minimum, so a Newton step from its end does not predict retraining. A second training
does: from the same beginning over the same batches in a few long steps, once with the pairs and once without. Both end far
from the real proxy, but nearly equally far, so that their difference can be added to it:

    theta + short(kept pairs) - short(all pairs)

(the control variate of multilevel Monte Carlo: Giles 2008; the coarse correction of parareal: Lions, Maday, Turinici 2001).
With as many steps as the training had, the sum is the really retrained proxy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import overload

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from influencespace.core.arrays import FloatArray, IntArray
from influencespace.core.contrastive import info_nce_only
from influencespace.errors import InputError
from influencespace.models.space import Inputs
from influencespace.models.trajectory import BETA1, BETA2, State, Trajectory, preconditioner, step

ImagesOf = Callable[[IntArray], IntArray]
"""The image of each of some rows of the pool: (m,) -> (m,)."""
SHARE = 1 / 25
"""Of the training's steps, taken twice: a tenth of its time, as a long step takes somewhat longer."""
MAX_STEP = 0.05
"""Of the parameters' root mean square at the beginning: AdamW moves a parameter by about its learning rate at each step, and
a long step that moves it farther overshoots. Chosen on the proxy of high learning rate in docs/benchmarks.md, deletion."""


@dataclass(frozen=True)
class Remaining(Sequence[IntArray]):
    """Batches less some rows, cut where they are asked for."""

    batches: Sequence[IntArray]
    removed: IntArray

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> IntArray: ...
    @overload
    def __getitem__(self, index: slice) -> "Remaining": ...
    def __getitem__(self, index: int | slice) -> "IntArray | Remaining":
        if isinstance(index, slice):
            return Remaining(self.batches[index], self.removed)
        rows = self.batches[index]
        return rows[~np.isin(rows, self.removed)]


def without(path: Trajectory, removed: IntArray) -> Trajectory:
    """The training with the same batches less some rows: the truth that an edit approximates.

    Raises InputError where a batch is left with fewer than two pairs, and so without a loss.
    """
    batches = Remaining(path.batches, removed)
    left, smallest = min((len(rows), index) for index, rows in enumerate(batches))
    if left < 2:
        raise InputError(
            f"without these pairs batch {smallest} of the training has {left} of its "
            f"{len(path.batches[smallest])} pairs left, and no loss: train a proxy on the kept pairs instead"
        )
    return replace(path, batches=batches)


def steps_for(path: Trajectory) -> int:
    """Number of long steps: a share of the training's, more where the learning rate is high."""
    way = sum(path.rate(index) for index in range(len(path.batches)))
    size = float(path.initial.square().mean().sqrt())
    careful = math.ceil(way / (MAX_STEP * size)) if path.rule == "adamw" else 1
    return min(len(path.batches), max(1, round(SHARE * len(path.batches)), careful))


def segments(path: Trajectory, count: int) -> list[range]:
    """The training's steps cut into at most `count` runs, one for each long step, of equal sums of learning rates."""
    passed = np.cumsum([0.0] + [path.rate(index) for index in range(len(path.batches))])
    cuts = np.linspace(0, passed[-1], count + 1)
    edges = np.round(np.interp(cuts, passed, np.arange(len(passed)))).astype(int)
    if count >= len(path.batches):
        edges = np.arange(len(passed))  # each step for itself, however small the last ones are
    edges = np.unique(edges)
    return [range(int(first), int(last)) for first, last in pairwise(edges)]


def middle_of(segment: range) -> int:
    """The step whose batch stands for a segment's."""
    return segment[len(segment) // 2]


@dataclass(frozen=True)
class WeightedBatch:
    """Rows of the pool of which each stands for a share of a pair."""

    rows: IntArray  # (n,)
    weights: FloatArray  # (n,) above 0


def batch_with(path: Trajectory, kept: Trajectory, segment: range) -> WeightedBatch:
    """The batch amid a segment, its removed pairs replaced by all of the segment's, each by its share of the batches.

    So every removed pair counts: with the middle batch alone, chance would decide which of them are forgotten.
    """
    middle = kept.batches[middle_of(segment)]
    everything = np.concatenate([path.batches[index] for index in segment])
    remaining = np.concatenate([kept.batches[index] for index in segment])
    removed, count = np.unique(everything[~np.isin(everything, remaining)], return_counts=True)
    return WeightedBatch(
        np.concatenate([middle, removed]), np.concatenate([np.ones(len(middle)), count / len(segment)])
    )


def weighted_gradient(path: Trajectory, theta: Tensor, batch: WeightedBatch, images: ImagesOf) -> Tensor:
    """Gradient of the InfoNCE loss in which a pair's weight multiplies it as an anchor and as a negative: (p,) -> (p,).

    `images` gives those of rows: a pair is no negative of another pair of its image, which no batch of the training holds. In
    closed form in the logits.
    """
    scale = info_nce_only(path.objective, "forget").scale
    inputs: Inputs = path.inputs(batch.rows)
    w = torch.from_numpy(batch.weights).to(theta)
    image = images(batch.rows)
    same_image = torch.from_numpy(image[:, None] == image).to(theta.device)
    log_weight = torch.where(same_image, -torch.inf, w.log())  # (n, n) of column j as a negative of row i
    log_weight.fill_diagonal_(0.0)
    outputs = vjp(lambda q: path.space.embed_at(q, inputs), path.space.unflatten(theta))
    (u, t), pull = outputs[0], outputs[1]
    S = scale * u @ t.T
    P, Q = (S + log_weight).softmax(1), (S + log_weight.T).softmax(0)
    R = (w[:, None] * P + w * Q) / 2 - w.diag()
    R *= scale / w.sum()
    (tree,) = pull((R @ t, R.T @ u))
    return path.space.flatten(tree)


def long_step(path: Trajectory, state: State, gradient: Tensor, segment: range) -> State:
    """All steps of a segment at once, as if each had this gradient; for one step it is the optimiser's own.

    AdamW's moments are carried in closed form, but for its preconditioner, which is the one amid the segment.
    """
    rates = [path.rate(index) for index in segment]
    decay = path.config.weight_decay
    if len(rates) == 1 or path.rule == "sgd":
        return step(state, gradient, segment[-1], sum(rates), decay, path.rule)
    count, middle = len(rates), (len(rates) + 1) // 2
    of_m = of_gradient = 0.0
    for taken, (index, rate) in enumerate(zip(segment, rates), 1):
        corrected = rate / (1 - BETA1 ** (index + 1))
        of_m += corrected * BETA1**taken
        of_gradient += corrected * (1 - BETA1**taken)
    squared = gradient**2
    D = preconditioner(torch.lerp(state.v, squared, 1 - BETA2**middle), segment[middle - 1])
    shrunken = state.theta * math.prod(1 - rate * decay for rate in rates)
    return State(
        shrunken - (of_m * state.m + of_gradient * gradient) / D,
        torch.lerp(state.m, gradient, 1 - BETA1**count),
        torch.lerp(state.v, squared, 1 - BETA2**count),
    )


def short_training(
    path: Trajectory, cut: Sequence[range], gradient: Callable[[State, range], Tensor]
) -> Tensor:
    """Parameters at the end of the training in long steps, each by its gradient at a state: (p,)."""
    state = State(path.initial, torch.zeros_like(path.initial), torch.zeros_like(path.initial))
    for segment in cut:
        state = long_step(path, state, gradient(state, segment), segment)
    return state.theta


def deletion_displacement(
    path: Trajectory, removed: IntArray, images: ImagesOf, steps: int | None = None
) -> Tensor:
    """What to add to a proxy's parameters (p,) in place of training it again without some rows of the pool.

    `images` gives those of rows (m,) -> (m,); `steps` long steps in each of two short trainings, by default those of `steps_for`.
    Reads where the training began and its batches, not its path. Its truth is the proxy retrained from the same beginning
    on the same batches less the pairs; one with fresh batches differs from that by chance, at few pairs by more than by the
    pairs. Trust it as far as an edit with half as many steps agrees with it (`tasks/forget.py` reports that): best with
    a small learning rate and a training that stops early; where training converges, long steps overshoot.
    Raises InputError as `without` does and for losses other than InfoNCE, ValueError for fewer than one step.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it must be one or more")
    kept = without(path, removed)
    cut = segments(path, steps_for(path) if steps is None else steps)

    def with_removed(state: State, segment: range) -> Tensor:
        return weighted_gradient(path, state.theta, batch_with(path, kept, segment), images)

    def of_kept(state: State, segment: range) -> Tensor:
        rows = kept.batches[middle_of(segment)]
        # by the same formula: rounding, too, should cancel
        return weighted_gradient(path, state.theta, WeightedBatch(rows, np.ones(len(rows))), images)

    return short_training(path, cut, of_kept) - short_training(path, cut, with_removed)
