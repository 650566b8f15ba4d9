"""A pointwise problem without a download: scikit-learn's digits, some with wrong labels, and classifiers trained on them.

Layers have no bias, so that a layer is one parameter tensor and blocks mean the same to every package.
"""

import time
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.attribution.scoring import Setup, path_of
from influencespace.core.arrays import BoolArray, FloatArray
from influencespace.core.batches import training_batches
from influencespace.core.contrastive import Pointwise, cross_entropy
from influencespace.data.artifacts import fingerprint
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.problem import Problem
from influencespace.estimators.proxy_problem import proxy_problem, rows_of
from influencespace.models.predictor import Predictor
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import State, loss_gradient, step

CLASSES, PIXELS, WIDTH = 10, 64, 32
TARGET, VALIDATION = 400, 397  # what is left of the 1,797 can be the pool
Kind = Literal["linear", "mlp"]
RATES = (0.1, 0.3, 1.0, 3.0)  # of plain SGD


def classifier(kind: Kind) -> nn.Module:
    """Pixels (n, 64) -> logits (n, 10), at its initial parameters."""
    if kind == "linear":
        return nn.Sequential(nn.Linear(PIXELS, CLASSES, bias=False))
    layers = nn.Linear(PIXELS, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, CLASSES, bias=False)
    return nn.Sequential(*layers)


@cache
def pictures() -> tuple[Tensor, FloatArray]:
    """All digits in a seeded order: pixels (1797, 64) less the mean picture, labels (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.from_numpy((pixels[order] - pixels.mean(0)) / 8).float(), labels[order]


def samples(first: int, count: int, wrong: BoolArray | None = None) -> NegativeBatch:
    """Digits with one-hot labels; a wrong one is another class's, by seed."""
    x, labels = pictures()
    x, y = x[first : first + count], labels[first : first + count].copy()
    if wrong is not None:
        shift = np.random.default_rng(1).integers(1, CLASSES, count)
        y = np.where(wrong, (y + shift) % CLASSES, y)
    one_hot = nn.functional.one_hot(torch.from_numpy(y), CLASSES).to(x)
    return NegativeBatch(inputs=(x, one_hot), image=np.arange(count))


@dataclass(frozen=True, kw_only=True)
class Classification(Setup):
    """A pool of digits of which a share is wrong, clean target groups, and how a classifier is trained by plain SGD."""

    kind: Kind
    size: int
    groups: int
    config: HeadsConfig
    wrong: float = 0.2

    @cached_property
    def is_wrong(self) -> BoolArray:
        """(N,)."""
        return np.random.default_rng(2).permutation(self.size) < round(self.wrong * self.size)

    @cached_property
    def target(self) -> NegativeBatch:
        return samples(0, TARGET)

    @cached_property
    def validation(self) -> NegativeBatch:
        return samples(TARGET, VALIDATION)

    @cached_property
    def pool(self) -> NegativeBatch:
        return samples(TARGET + VALIDATION, self.size, self.is_wrong)

    @property
    def key(self) -> str:
        return fingerprint([self.kind, self.size, self.groups, self.config, self.wrong])

    def problem(self, seed: int, target: NegativeBatch | None = None) -> Problem:
        """The reference bank is the pool, so that curvature is over the same samples as the peers'."""
        torch.manual_seed(seed)
        proxy, loss = Predictor(classifier(self.kind)), Pointwise(cross_entropy)
        problem = proxy_problem(
            self.pool, target or self.target, self.config, proxy=proxy, objective=loss, rule="sgd", seed=seed
        )
        return replace(problem, bank=[self.pool])

    def by_group(self, problem: Problem) -> list[Problem]:
        """The same for each group of the target."""
        groups = np.array_split(np.arange(TARGET), self.groups)
        batches = [
            NegativeBatch(inputs=rows_of(self.target.inputs, rows), image=np.arange(len(rows)))
            for rows in groups
        ]
        return [replace(problem, target=[batch]) for batch in batches]

    def group_means(self, values: FloatArray) -> FloatArray:
        """(..., T) -> (..., G)."""
        return np.stack([part.mean(-1) for part in np.array_split(values, self.groups, -1)], -1)


@torch.no_grad()
def retrained(problem: Problem, study: Classification, subsets: FloatArray, seed: int) -> FloatArray:
    """Loss of each target sample after training anew on each subset (S, N) of 0 and 1, all at once: (S, T).

    The steps are those of `models.trajectory`, each subset with batches of its own from its own samples.
    """
    path, config = path_of(problem), study.config
    drawn = [
        list(training_batches(weights, study.pool.image, config.batch_size, config.steps, seed))
        for weights in subsets
    ]
    theta = path.initial.expand(len(subsets), -1)
    state = State(theta, torch.zeros_like(theta), torch.zeros_like(theta))

    def gradient(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss_gradient(path.space, theta, (x, y), path.objective)

    for index in range(config.steps):
        x, y = (torch.stack([path.inputs(batches[index])[side] for batches in drawn]) for side in (0, 1))
        g = vmap(gradient)(state.theta, x, y)
        state = step(state, g, index, path.rate(index), config.weight_decay, path.rule)

    def losses(theta: Tensor) -> Tensor:
        outputs = functional_call(path.space.proxy, path.space.unflatten(theta), study.target.inputs)
        return path.objective.terms(*outputs)

    result: FloatArray = vmap(losses)(state.theta).double().numpy()
    return result


@torch.no_grad()
def right_probability(study: Classification, problem: Problem) -> FloatArray:
    """(T,)."""
    logits, labels = problem.space.embed(study.target.inputs)
    probability: FloatArray = (logits.softmax(-1) * labels).sum(-1).double().numpy()
    return probability


def sample_loop(problem: Problem) -> float:
    """Seconds of a backward pass for each sample of the pool by itself."""
    space = problem.space
    x, y = path_of(problem).inputs(np.arange(problem.pool_size))

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        u, labels = functional_call(space.proxy, parameters, (x[None], y[None]))
        return problem.objective.terms(u, labels).sum()

    began = time.process_time()
    for one, label in zip(x, y):
        grad(loss)(space.parameters, one, label)
    return time.process_time() - began
