"""The part `deletion` of attribution.py: edited proxies beside really retrained ones."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from common import ESTIMATING, Benchmark, cached
from study import Study, score_all, tuned
from torch import Tensor
from world import World

from influencespace.core.batches import covering_batches, training_batches
from influencespace.core.contrastive import info_nce_only
from influencespace.estimators.deletion import deletion_displacement, steps_for, without
from influencespace.estimators.grad_dot import GradDot
from influencespace.estimators.influence import NegativeBatch
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.space import Space
from influencespace.models.training import HeadsConfig, train_heads
from influencespace.models.trajectory import Trajectory, space_at

SHARES = (0.01, 0.1)
SPREAD = 2.0  # standard deviations of the retrained proxies' loss that an edit's may lie off


def deletion_part(bench: Benchmark, world: World, quick: bool) -> None:
    """Distance of test logits to the retrained proxy, unedited = 1; the deleted pairs' loss; the time."""
    config = HeadsConfig(steps=40 if quick else 100)
    studies = {"1,000 pairs": tuned(Study(world=world, pairs=1000, wrong=0.3, config=config))}
    if not quick:
        studies["1,000 pairs, a high learning rate"] = Study(
            world=world, pairs=1000, wrong=0.3, config=config
        )
        studies["all pairs"] = tuned(Study(world=world, pairs=None, wrong=0.3, config=config))
    for name, study in studies.items():
        runs = [
            cached(world.cache, ["deletion", study.key, seed], partial(edits, study, seed), ESTIMATING)
            for seed in bench.seeds
        ]
        label = f"{name}, {study.config.learning_rate:g}"
        found = [summary([run["cases"][case] for run in runs]) for case in range(len(runs[0]["cases"]))]
        for row in found:
            bench.row(proxy=label, steps=f"{runs[0]['steps']} of {config.steps}", **row)
        farthest = max(row["distance"] for row in found)
        bench.target(
            name=f"deletion, {label}: farthest mean distance to the retrained proxy",
            target="at most 0.3",
            measured=farthest,
            reached=farthest <= 0.3,
        )
        slowest = min(row["times_quicker"] for row in found)
        bench.target(
            name=f"deletion, {label}: time of retraining over that of editing, the least",
            target="at least 10",
            measured=slowest,
            reached=slowest >= 10,
        )
        off = max(row["loss_off_by_sd"] for row in found)
        bench.target(
            name=f"deletion, {label}: loss on the deleted pairs off the retrained one's, in its sd over seeds",
            target=f"at most {SPREAD:g}",
            measured=off,
            reached=off <= SPREAD,
        )


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One case over the seeds."""

    def mean(key: str) -> float:
        return float(np.mean([run[key] for run in runs]))

    retrained = np.concatenate([run["loss_retrained"] for run in runs])
    off = abs(mean("loss_edited") - retrained.mean()) / retrained.std(ddof=1)
    return {
        "removed": runs[0]["removed"],
        "pairs": runs[0]["pairs"],
        "distance": mean("distance"),
        "highest": max(run["distance"] for run in runs),
        "on_fresh_batches": mean("on_fresh_batches"),
        "retrained_on_fresh_batches": mean("retrained_on_fresh_batches"),
        "half_the_steps": mean("half_the_steps"),
        "loss_before": mean("loss_before"),
        "loss_edited": mean("loss_edited"),
        "loss_retrained": float(retrained.mean()),
        "loss_off_by_sd": float(off),
        "times_quicker": mean("times_quicker"),
    }


def removals(study: Study) -> dict[str, np.ndarray]:
    """Rows in the order in which they are removed, the same for every seed."""
    generator = np.random.default_rng(0)
    images, texts = (torch.nn.functional.normalize(x, dim=1) for x in study.pool.inputs)
    centre = int(generator.integers(study.size))
    nearness = images @ images[centre] + texts @ texts[centre]
    return {
        "random": generator.permutation(study.size),
        "most harmful": np.argsort(score_all(GradDot(), study.problem(0)), kind="stable"),
        "one cluster": torch.argsort(nearness, descending=True, stable=True).numpy(),
    }


def edits(study: Study, seed: int) -> dict[str, Any]:
    """Every removal, edited and retrained."""
    path = study.problem(seed).trajectory
    assert path is not None
    steps = steps_for(path)
    cases = [
        case(study, path, order[: round(share * study.size)], steps, seed)
        | {"removed": f"{name}, {share:.0%}"}
        for name, order in removals(study).items()
        for share in SHARES
    ]
    return {"steps": steps, "cases": cases}


def case(study: Study, path: Trajectory, removed: np.ndarray, steps: int, seed: int) -> dict[str, Any]:
    image = study.pool.image
    displacement, seconds = timed(lambda: deletion_displacement(path, removed, image, steps))
    edited = path.final + displacement
    half = path.final + deletion_displacement(path, removed, image, steps // 2)
    same = without(path, removed)
    retrained, seconds_of_retraining = timed(lambda: trained(study, path, same.batches, seed))
    weights = np.where(np.isin(np.arange(study.size), removed), 0.0, 1.0)
    size, count = study.config.batch_size, study.config.steps
    fresh = trained(study, path, list(training_batches(weights, image, size, count, 100 + seed)), seed)
    before, after, after_half, truth, other = (
        logits(path, theta, study.validation) for theta in (path.final, edited, half, retrained, fresh)
    )
    return {
        "pairs": len(removed),
        "distance": float((after - truth).norm() / (before - truth).norm()),
        "on_fresh_batches": float((after - other).norm() / (before - other).norm()),
        "retrained_on_fresh_batches": float((truth - other).norm() / (before - other).norm()),
        "half_the_steps": float((after - after_half).norm() / (after - before).norm()),
        "loss_before": loss_of(study, path, path.final, removed),
        "loss_edited": loss_of(study, path, edited, removed),
        "loss_retrained": [loss_of(study, path, theta, removed) for theta in (retrained, fresh)],
        "times_quicker": seconds_of_retraining / seconds,
    }


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result and the seconds of the quicker of two calls: the machines are shared."""
    found = []
    for _ in range(2):
        began = time.monotonic()
        result = work()
        found.append(time.monotonic() - began)
    return result, min(found)


def trained(study: Study, path: Trajectory, batches: Sequence[np.ndarray], seed: int) -> Tensor:
    """Parameters of a proxy trained on these batches by the library's own loop (p,)."""
    images, texts = study.pool.inputs
    heads: Heads = initial_heads(images.shape[1], texts.shape[1], study.config.dimension, seed).to(images)
    space = Space(train_heads(path.inputs, batches, heads, study.config).heads)
    return space.flatten(space.parameters)


@torch.no_grad()
def logits(path: Trajectory, theta: Tensor, test: NegativeBatch) -> Tensor:
    u, t = space_at(path.space, theta).embed(test.inputs)
    logits: Tensor = info_nce_only(path.objective, "forget").scale * u @ t.T
    return logits


@torch.no_grad()
def loss_of(study: Study, path: Trajectory, theta: Tensor, rows: np.ndarray) -> float:
    """Mean loss of some pairs of the pool among themselves, in contexts of at most a batch."""
    terms = []
    for context in covering_batches(study.pool.image[rows], study.config.batch_size, 0):
        u, t = space_at(path.space, theta).embed(path.inputs(rows[context]))
        terms.append(path.objective.terms(u, t))
    return float(torch.cat(terms).mean())
