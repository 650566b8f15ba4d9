"""Validation of rivals: fraction, temperature and steps of each by retraining, as often as ours is retrained at most.

Each is chosen in turn, the others as they are best so far, by the loss on the half of the target that makes choices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from influencespace.data.joined import TrainingPairs
from influencespace.run import Run, Workers
from influencespace.stages.passes import RangePasses
from influencespace.stages.proxies.proxies import ChoosingLoss
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.proxies.train_many import Training, Weights, train_many
from influencespace.stages.rivals.names import EVERYTHING, SETS, WHOLE
from influencespace.stages.rivals.ranking import (
    Cuts,
    First,
    Rankings,
    ReadExponentials,
    ReadOrders,
    Sums,
    Weighted,
    find,
)
from influencespace.stages.rivals.sets import training_set
from influencespace.stages.selection.weighting import LONGER, SEEDS

FRACTIONS = (0.5, 0.7, 0.9)
TEMPERATURES = (1.0, 0.5)  # beside equal weights
LONGER_SETS = (0.125, 0.25, 0.5, 2.0)  # of sets, whose steps are all that there is to choose


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a method trains."""

    method: str
    steps: int
    fraction: float = 1.0
    """Of the pool, the first of its order."""
    temperature: float | None = None
    """Of the softmax of its weights, in standard deviations of the score; None: all alike."""

    @property
    def name(self) -> str:
        """Of its trials' files, which are no part of the artifact."""
        return f".trial-{self.method}-{self.fraction:g}-{self.temperature or 0:g}-{self.steps}"

    def first(self, rows: int) -> First:
        return First(self.method, max(1, round(self.fraction * rows)))


Next = Callable[[Choice], Sequence[Choice]]


def by_fraction(best: Choice) -> list[Choice]:
    return [replace(best, fraction=fraction) for fraction in FRACTIONS] if best.method not in WHOLE else []


def by_temperature(best: Choice) -> list[Choice]:
    return [replace(best, temperature=value) for value in TEMPERATURES] if best.method not in WHOLE else []


def by_steps(best: Choice) -> list[Choice]:
    parts = {EVERYTHING: (1.0, *LONGER)} | dict.fromkeys(SETS, (1.0, *LONGER_SETS))
    tried = parts.get(best.method, LONGER)
    return [replace(best, steps=max(1, round(part * best.steps))) for part in tried]


@dataclass(kw_only=True)
class Orders:
    """Cuts and weights of a run's orders; found once each, by passes on workers."""

    rankings: Rankings
    rows: int
    passes: RangePasses
    cap: float
    cuts: dict[First, Any] = field(default_factory=dict)

    def cut(self, orders: Sequence[First]) -> None:
        """Find where each of these is cut, those first that are the filters of others."""
        filters = [within for first in orders if (within := first.within(self.rows)) is not None]
        for wanted in (filters, orders):
            new = tuple(dict.fromkeys(first for first in wanted if first not in self.cuts))
            if new:
                read = ReadOrders(self.rankings, new, self._of(new), self.rows)
                self.cuts |= self.passes.result(find(new, self.rows), read, self.rows)

    def _of(self, orders: Sequence[First]) -> Cuts:
        """The cuts that these depend on."""
        filters = (first.within(self.rows) for first in orders)
        return {first: self.cuts[first] for first in (*orders, *filters) if first in self.cuts}

    def weights(self, choices: Sequence[Choice]) -> list[Weighted]:
        """Of each choice; raises KeyError where its order is not cut."""
        made = [
            Weighted(
                rankings=self.rankings,
                first=choice.first(self.rows),
                cuts=self._of([choice.first(self.rows)]),
                rows=self.rows,
                temperature=choice.temperature,
                cap=self.cap,
            )
            for choice in choices
        ]
        soft = tuple(one for one in made if one.temperature is not None)
        sums = iter(self.passes.fold(Sums(), ReadExponentials(soft), self.rows) if soft else ())
        return [
            one if one.temperature is None else replace(one, factor=one.first.size / float(next(sums)))
            for one in made
        ]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Retrains with the choices of rivals, and remembers what each is worth."""

    run: Run
    orders: Orders
    workers: Workers
    losses: dict[Choice, float] = field(default_factory=dict)

    def best(self, methods: Sequence[str], steps: int) -> dict[str, Choice]:
        """The choice for each method that retraining likes best."""
        best = {method: Choice(method=method, steps=steps) for method in methods}
        for options in (by_fraction, by_temperature, by_steps):
            tried = dict.fromkeys(choice for default in best.values() for choice in options(default))
            self._try([choice for choice in tried if choice not in self.losses])
            best = {method: self._best_of(method, default) for method, default in best.items()}
        return best

    def _best_of(self, method: str, default: Choice) -> Choice:
        tried = [choice for choice in self.losses if choice.method == method]
        return min(tried, key=lambda choice: np.nan_to_num(self.losses[choice], nan=np.inf), default=default)

    def _try(self, choices: Sequence[Choice]) -> None:
        config = self.run.config.proxy.train
        measure = ChoosingLoss(TargetHalves(self.run.target, self.run.seed), config)
        ranked = [choice for choice in choices if choice.method not in WHOLE]
        self.orders.cut([choice.first(self.orders.rows) for choice in ranked])
        weights: Mapping[Choice, Weights] = dict(zip(ranked, self.orders.weights(ranked), strict=True))
        trainings = []
        for choice in choices:
            pairs: TrainingPairs | None = None
            if choice.method in WHOLE:
                pairs, own = training_set(self.run, choice.method, whole=False)
            else:
                own = weights[choice]
            trainings += [
                Training(
                    name=f"{choice.name}-{seed}",
                    weights=own,
                    seed=seed,
                    steps=choice.steps,
                    measure=measure,
                    pairs=pairs,
                )
                for seed in SEEDS
            ]
        records = train_many(self.run.everything, config, trainings, self.workers, label="validation")
        for i, choice in enumerate(choices):
            mine = records[i * len(SEEDS) : (i + 1) * len(SEEDS)]
            self.losses[choice] = float(np.mean([record["target_loss"] for record in mine]))
