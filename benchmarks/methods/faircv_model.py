"""Applicants whose labels are biased, proxies that score them, and weights by iterated influence (see `fairness`)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from benchmarks.data.faircv import Profiles
from benchmarks.fairness.gaps import squared_gap
from benchmarks.fairness.minimax import minimax_weights
from influencespace.core.arrays import FloatArray, IntArray, Labels
from influencespace.core.contrastive import Pointwise, squared_error
from influencespace.core.fairness import shrunken_group_means
from influencespace.estimators.ecif import Ecif
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch
from influencespace.estimators.problem import Problem, scores
from influencespace.estimators.proxy_problem import batch_of, proxy_problem
from influencespace.models.predictor import Predictor
from influencespace.models.training import HeadsConfig

TEST, TARGET = 1500, 200
CAP = 5.0
TEMPERATURES = (1.0, 3.0, 10.0)  # of one step, in standard deviations of influence
CONFIG = HeadsConfig(steps=200, batch_size=256, learning_rate=1e-2)


@dataclass(frozen=True, kw_only=True)
class Applicants:
    """One experiment, split by a seed into profiles to train on, target and test."""

    profiles: Profiles
    group: Labels  # (n,) what labels are biased by
    seed: int

    def _rows(self, start: int, stop: int | None) -> IntArray:
        return np.random.default_rng(self.seed).permutation(len(self.group))[start:stop]

    test = property(lambda self: self._rows(0, TEST))
    influencing = property(lambda self: self._rows(TEST, TEST + TARGET // 2))
    """Half of the target, whose loss gives influence."""
    choosing = property(lambda self: self._rows(TEST + TARGET // 2, TEST + TARGET))
    """The other half, which compares retrained proxies."""
    train = property(lambda self: self._rows(TEST + TARGET, None))

    @cached_property
    def inputs(self) -> FloatArray:
        """Occupation by name, merits and face (n, 37), standardised."""
        profiles = self.profiles
        columns = np.column_stack([np.eye(6)[profiles.occupation], profiles.merits, profiles.face])
        known = columns[self.train]
        standardised: FloatArray = (columns - known.mean(0)) / known.std(0)
        return standardised

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean and spread of the labels to train on, in which the proxy works."""
        labels = self.profiles.biased[self.train]
        return float(labels.mean()), float(labels.std())

    def standardised(self, labels: FloatArray) -> FloatArray:
        return (labels - self.scale[0]) / self.scale[1]

    def samples(self, rows: IntArray, labels: FloatArray, inputs: FloatArray | None = None) -> NegativeBatch:
        """Profiles `rows` with their standardised labels (m,)."""
        x = self.inputs if inputs is None else inputs
        tensors = torch.from_numpy(x[rows]).float(), torch.from_numpy(labels)[:, None].float()
        return NegativeBatch(inputs=tensors, image=np.arange(len(rows)))

    def blind(self, rows: IntArray) -> NegativeBatch:
        return self.samples(rows, self.standardised(self.profiles.blind[rows]))

    @cached_property
    def pool(self) -> NegativeBatch:
        return self.samples(self.train, self.standardised(self.profiles.biased[self.train]))

    def problem(self, pool: NegativeBatch | None = None, weights: FloatArray | None = None) -> Problem:
        """A proxy of the pool by weight, with its influence on the influencing half of the target."""
        pool = pool or self.pool
        torch.manual_seed(self.seed)
        return proxy_problem(
            pool,
            self.blind(self.influencing),
            CONFIG,
            proxy=Predictor(nn.Linear(pool.inputs[0].shape[1], 1)),
            objective=Pointwise(squared_error),
            curvature=CurvatureConfig(damping_factor=1),  # the trainer's own response: in units of loss
            weights=weights,
            seed=self.seed,
        )

    def influence(self, problem: Problem, target: NegativeBatch) -> FloatArray:
        """Of each profile of the pool on the mean loss of a target (N,)."""
        estimator = Ecif(solver="plain", curvature=CurvatureConfig(tolerance=1e-5))
        return scores(estimator, replace(problem, target=[target]), [batch_of(self.pool)])

    @torch.no_grad()
    def predicted(self, problem: Problem, rows: IntArray, inputs: FloatArray | None = None) -> FloatArray:
        """Standardised scores of profiles (m,)."""
        samples = self.samples(rows, np.zeros(len(rows)), inputs)
        values: FloatArray = problem.space.embed(samples.inputs)[0][:, 0].double().numpy()
        return values

    def scores(self, problem: Problem, inputs: FloatArray | None = None) -> FloatArray:
        """Of the test profiles, in the labels' own unit (m,)."""
        mean, spread = self.scale
        return mean + spread * self.predicted(problem, self.test, inputs)

    def losses(self, problem: Problem, rows: IntArray) -> FloatArray:
        """Of profiles, by their blind labels (m,)."""
        labels = self.standardised(self.profiles.blind[rows])
        losses: FloatArray = (self.predicted(problem, rows) - labels) ** 2 / 2
        return losses

    def group_losses(self, problem: Problem, rows: IntArray) -> FloatArray:
        """Mean loss of each group, shrunken for chance (A,)."""
        return shrunken_group_means(self.losses(problem, rows), self.group[rows])

    def gap(self, problem: Problem, rows: IntArray) -> tuple[float, FloatArray]:
        """Squared gap of mean scores between groups, and its slope (m,)."""
        return squared_gap(self.predicted(problem, rows), self.group[rows])


@dataclass(frozen=True)
class Aim:
    """What weights are to lower: the losses of A groups with each profile's influence on them, and what compares proxies."""

    losses: Callable[[Applicants, Problem], tuple[FloatArray, FloatArray]]
    """-> (A,), (N, A)."""
    judged: Callable[[Applicants, Problem], float]
    """On the choosing half: lower is better."""


def on_the_mean(applicants: Applicants, problem: Problem) -> tuple[FloatArray, FloatArray]:
    rows = applicants.influencing
    influence = applicants.influence(problem, applicants.blind(rows))
    return applicants.losses(problem, rows).mean(keepdims=True), influence[:, None]


def on_each_group(applicants: Applicants, problem: Problem) -> tuple[FloatArray, FloatArray]:
    rows = applicants.influencing
    group = applicants.group[rows]
    of_group = [applicants.blind(rows[group == name]) for name in np.unique(group)]
    influence = [applicants.influence(problem, target) for target in of_group]
    return applicants.group_losses(problem, rows), np.stack(influence, 1)


def on_the_gap(applicants: Applicants, problem: Problem) -> tuple[FloatArray, FloatArray]:
    """No label is needed: under the squared error, labels of prediction minus slope have the gap's gradient."""
    rows = applicants.influencing
    gap, slope = applicants.gap(problem, rows)
    labels = applicants.predicted(problem, rows) - len(rows) * slope
    return np.array([gap]), applicants.influence(problem, applicants.samples(rows, labels))[:, None]


MEAN = Aim(on_the_mean, lambda one, problem: float(one.losses(problem, one.choosing).mean()))
WORST = Aim(on_each_group, lambda one, problem: float(one.group_losses(problem, one.choosing).max()))
GAP = Aim(on_the_gap, lambda one, problem: one.gap(problem, one.choosing)[0])


def iterated(applicants: Applicants, aim: Aim, rounds: int, floor: float = 0.0) -> FloatArray:
    """Weights (N,) after steps of mirror descent: each from fresh influence, as long as a retrained proxy does better."""
    group = applicants.group[applicants.train]
    counts = (group[:, None] == np.unique(group)).astype(np.float64)
    weights, problem = np.ones(len(group)), applicants.problem()
    reached = aim.judged(applicants, problem)
    for _ in range(rounds):
        losses, influence = aim.losses(applicants, problem)
        spread = float(np.sqrt(np.max(np.average(influence**2, axis=0, weights=weights))))
        tried = []
        for factor in TEMPERATURES:
            moved = minimax_weights(
                losses, influence, counts, temperature=factor * spread, cap=CAP, floor=floor, start=weights
            )
            proxy = applicants.problem(weights=moved)
            tried.append((aim.judged(applicants, proxy), moved, proxy))
        best = min(tried, key=lambda one: one[0])
        if best[0] >= reached:
            break
        reached, weights, problem = best
    return weights
