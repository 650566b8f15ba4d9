"""From embeddings alone to a problem: heads trained on a pool, with all that an estimator may need."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from influencespace.core.batches import InMemory, covering_batches, disjoint_batches, training_batches
from influencespace.core.contrastive import Objective
from influencespace.errors import InputError
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch, damping_of, floored
from influencespace.estimators.problem import Batch, FloatArray, IntArray, Problem, checkpoints_of
from influencespace.models.heads import initial_heads
from influencespace.models.space import Inputs, Space
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import Rule, Trajectory, preconditioner, space_at

MIN_IMAGES = 4  # two negative batches of two pairs


def rows_of(inputs: Inputs, rows: IntArray) -> Inputs:
    """Embeddings of some pairs: two (m, D)."""
    index = torch.from_numpy(rows).to(inputs[0].device)
    return inputs[0][index], inputs[1][index]


def cut(pairs: NegativeBatch, batches: Sequence[IntArray]) -> list[NegativeBatch]:
    """Pairs by the rows of each batch."""
    return [NegativeBatch(inputs=rows_of(pairs.inputs, rows), image=pairs.image[rows]) for rows in batches]


def proxy_problem(
    pool: NegativeBatch,
    target: NegativeBatch,
    config: HeadsConfig,
    *,
    curvature: CurvatureConfig | None = None,
    proxy: nn.Module | None = None,
    objective: Objective | None = None,
    weights: FloatArray | None = None,
    rule: Rule = "adamw",
    negative_batches: int = 4,
    seed: int = 0,
) -> Problem:
    """Train a proxy on the pool and state how its pairs influence the target loss.

    `pool` and `target` are pairs by embeddings (two (n, D)) and image (n,); the proxy has their dtype and device. By
    default it is heads under the config's loss; for a `Pointwise` objective give a module that maps inputs and labels to
    predictions and labels (`models.predictor.Predictor`). It is trained by AdamW as `train_heads` does, or by plain SGD;
    there are up to `negative_batches` of batch_size - 1 pairs, fewer and smaller ones where the pool is small. Both
    are drawn by `weights` (n,), ones by default: how often a pair is met in an epoch.
    Raises InputError where the pool has too few images for two.
    """
    images, texts = pool.inputs
    weights = np.ones(len(images)) if weights is None else weights
    distinct = len(np.unique(pool.image[weights > 0]))
    if distinct < MIN_IMAGES:
        raise InputError(f"the pool has {distinct} image(s); two negative batches need {MIN_IMAGES} or more")
    batches = list(training_batches(weights, pool.image, config.batch_size, config.steps, seed))
    size = len(batches[0])
    bank = disjoint_batches(InMemory(weights, pool.image), size - 1, negative_batches, seed + 1)
    curvature = curvature or CurvatureConfig()
    if proxy is None:
        proxy = initial_heads(images.shape[1], texts.shape[1], config.dimension, seed)
    initial = Space(proxy.to(images))
    path = Trajectory(
        space=initial,
        initial=initial.flatten(initial.parameters),
        config=config,
        batches=batches,
        inputs=partial(rows_of, pool.inputs),
        objective=objective or config.objective,
        rule=rule,
    )
    end = path.stored[-1]
    D = torch.ones_like(end.theta) if rule == "sgd" else floored(preconditioner(end.v, len(batches) - 1))
    rates = sum(path.rate(index) for index in range(len(batches)))
    return Problem(
        space=space_at(initial, end.theta),
        objective=path.objective,
        batch_size=size,
        pool_size=len(images),
        bank=cut(pool, bank),
        target=cut(target, covering_batches(target.image, size, seed)),
        preconditioner=D,
        damping=damping_of(curvature, rates, config.weight_decay),
        checkpoints=checkpoints_of(path),
        trajectory=path,
        seed=seed,
    )


def batch_of(pool: NegativeBatch, rows: IntArray | None = None) -> Batch:
    """Some pairs of a pool, or all, as an estimator scores them; a pair's uid is its row."""
    rows = np.arange(len(pool.image)) if rows is None else rows
    uids = [str(row) for row in rows]
    return Batch(uid=uids, inputs=rows_of(pool.inputs, rows), image=pool.image[rows], row=rows)
