"""The part `deletion` of attribution: edited proxies beside really retrained ones."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import wanted
from benchmarks.attribution.attribution_setup import Study
from benchmarks.attribution.scoring import path_of, score_all, trained_heads
from benchmarks.bench import Bench
from benchmarks.cache import each_seed
from benchmarks.data.datasets import Dataset
from influencespace.core.arrays import IntArray
from influencespace.core.batches import covering_batches, training_batches
from influencespace.core.contrastive import info_nce_only
from influencespace.estimators.deletion import deletion_displacement, steps_for, without
from influencespace.estimators.grad_dot import GradDot
from influencespace.estimators.influence import NegativeBatch
from influencespace.models.space import Space
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import Trajectory, space_at

SHARES = (0.01, 0.1)
MEANS = (
    "distance",
    "on_fresh_batches",
    "retrained_on_fresh_batches",
    "half_the_steps",
    "loss_before",
    "loss_edited",
    "times_quicker",
)
"""What a row gives the mean over seeds of."""
PROMISES: dict[str, tuple[str, wanted.Wanted, Callable[[Iterable[float]], float]]] = {
    "farthest mean distance to the retrained proxy": ("distance", wanted.at_most(0.3), max),
    "time of retraining over that of editing, the least": ("times_quicker", wanted.at_least(10), min),
    "loss on the deleted pairs off the retrained one's, in its sd over seeds": (
        "loss_off_by_sd",
        wanted.at_most(2),
        max,
    ),
}


def deletion(bench: Bench) -> None:
    """Distance of test logits to the retrained proxy, unedited = 1; the deleted pairs' loss; the time."""
    config = HeadsConfig(steps=bench.pick(100, 40))
    small = Study(dataset=Dataset.of(bench), pairs=1000, wrong=0.3, config=config)
    studies = {"1,000 pairs": small.tuned()}
    if not bench.quick:
        studies["1,000 pairs, a high learning rate"] = small
        every = Study(dataset=small.dataset, pairs=None, wrong=0.3, config=config)
        studies["all pairs"] = every.tuned()
    for name, study in studies.items():
        runs = each_seed(study.dataset.cache, bench.seeds, ["deletion", study.key], edits, study)
        label = f"{name}, {study.config.learning_rate:g}"
        rows = [summary([run["cases"][case] for run in runs]) for case in range(len(runs[0]["cases"]))]
        for row in rows:
            bench.row(proxy=label, steps=f"{runs[0]['steps']} of {config.steps}", **row)
        for what, (column, asked, worst) in PROMISES.items():
            bench.target(f"deletion, {label}: {what}", asked, worst(row[column] for row in rows))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One case over the seeds."""
    retrained = np.concatenate([run["loss_retrained"] for run in runs])
    means = {key: float(np.mean([run[key] for run in runs])) for key in MEANS}
    return {
        "removed": runs[0]["removed"],
        "pairs": runs[0]["pairs"],
        **means,
        "highest": max(run["distance"] for run in runs),
        "loss_retrained": float(retrained.mean()),
        "loss_off_by_sd": float(abs(means["loss_edited"] - retrained.mean()) / retrained.std(ddof=1)),
    }


def removals(study: Study) -> dict[str, IntArray]:
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
    trained = TrainedProxy(study, path_of(study.problem(seed)), seed)
    steps = steps_for(trained.path)
    cases = [
        {**trained.case(order[: round(share * study.size)], steps), "removed": f"{name}, {share:.0%}"}
        for name, order in removals(study).items()
        for share in SHARES
    ]
    return {"steps": steps, "cases": cases}


@dataclass(frozen=True)
class TrainedProxy:
    """A proxy of a whole pool, what it becomes when pairs are deleted from it, and what retraining gives."""

    study: Study
    path: Trajectory
    seed: int

    def case(self, removed: IntArray, steps: int) -> dict[str, Any]:
        """One removal, edited and retrained on the same batches and on fresh ones."""
        study, path, image = self.study, self.path, self.study.pool.image
        displacement, seconds = timed(lambda: deletion_displacement(path, removed, image.__getitem__, steps))
        edited = path.final + displacement
        half = path.final + deletion_displacement(path, removed, image.__getitem__, steps // 2)
        same = without(path, removed)
        retrained, seconds_of_retraining = timed(lambda: self.trained(same.batches))
        weights = np.where(np.isin(np.arange(study.size), removed), 0.0, 1.0)
        size, count = study.config.batch_size, study.config.steps
        fresh = self.trained(list(training_batches(weights, image, size, count, 100 + self.seed)))
        before, after, after_half, truth, other = map(
            self.logits, (path.final, edited, half, retrained, fresh)
        )
        return {
            "pairs": len(removed),
            "distance": float((after - truth).norm() / (before - truth).norm()),
            "on_fresh_batches": float((after - other).norm() / (before - other).norm()),
            "retrained_on_fresh_batches": float((truth - other).norm() / (before - other).norm()),
            "half_the_steps": float((after - after_half).norm() / (after - before).norm()),
            "loss_before": self.loss_of(path.final, removed),
            "loss_edited": self.loss_of(edited, removed),
            "loss_retrained": [self.loss_of(theta, removed) for theta in (retrained, fresh)],
            "times_quicker": seconds_of_retraining / seconds,
        }

    def trained(self, batches: Sequence[IntArray]) -> Tensor:
        """Parameters of a proxy trained on these batches by the library's own loop (p,)."""
        ones = np.ones(self.study.size)
        space = Space(trained_heads(self.study.pool, ones, self.study.config, self.seed, batches))
        return space.flatten(space.parameters)

    @torch.no_grad()
    def logits(self, theta: Tensor) -> Tensor:
        """Of the validation pairs."""
        test: NegativeBatch = self.study.validation
        u, t = space_at(self.path.space, theta).embed(test.inputs)
        logits: Tensor = info_nce_only(self.path.objective, "forget").scale * u @ t.T
        return logits

    @torch.no_grad()
    def loss_of(self, theta: Tensor, rows: IntArray) -> float:
        """Mean loss of some pairs of the pool among themselves, in negative batches of at most a batch."""
        space, batches = (
            space_at(self.path.space, theta),
            covering_batches(self.study.pool.image[rows], self.study.config.batch_size, 0),
        )
        terms = [self.path.objective.terms(*space.embed(self.path.inputs(rows[batch]))) for batch in batches]
        return float(torch.cat(terms).mean())


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result and the seconds of the quicker of two calls: the machines are shared."""
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        result = work()
        seconds.append(time.monotonic() - began)
    return result, min(seconds)
