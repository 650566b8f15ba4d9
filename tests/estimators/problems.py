"""A small contrastive problem with planted wrong captions, really trained in float64, and how to train it again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from influencespace.core.batches import InMemory, disjoint_batches, training_batches
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch, damping_of, floored
from influencespace.estimators.problem import Batch, Checkpoint, Problem
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.space import Inputs, Space
from influencespace.models.training import HeadsConfig, train_heads
from influencespace.models.trajectory import Trajectory

MEANINGS, INPUT, OUTPUT = 4, 6, 4


@dataclass(frozen=True, kw_only=True)
class Small:
    """A pool of which a share is wrong, a clean target, and a proxy trained on all of the pool."""

    pairs: int = 96
    wrong_share: float = 0.25
    batch_size: int = 16
    steps: int = 120
    learning_rate: float = 0.02
    targets: int = 64
    kept_checkpoints: int = 6
    temperature: float = 0.2
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    seed: int = 0
    config: HeadsConfig = field(init=False)

    def __post_init__(self) -> None:
        config = HeadsConfig(
            dimension=OUTPUT,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            temperature=self.temperature,
            loss=self.loss,
            bias=-10.0,
        )
        object.__setattr__(self, "config", config)

    @cached_property
    def wrong(self) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(self.pairs) < round(self.wrong_share * self.pairs)

    @cached_property
    def pool(self) -> Inputs:
        images, texts = embeddings(self.pairs, self.seed + 1)
        moved = texts.clone()
        rows = np.flatnonzero(self.wrong)
        moved[rows] = texts[np.roll(rows, 1)]
        return images, moved

    @cached_property
    def target(self) -> Inputs:
        return embeddings(self.targets, self.seed + 2)

    def rows(self, rows: np.ndarray) -> Inputs:
        index = torch.from_numpy(np.asarray(rows))
        return self.pool[0][index], self.pool[1][index]

    def batches(self, weights: np.ndarray, seed: int) -> list[np.ndarray]:
        """The training batches of a run."""
        image = np.arange(self.pairs)
        return list(training_batches(weights, image, self.batch_size, self.steps, seed))

    def train(self, weights: np.ndarray | None = None, seed: int = 0) -> Heads:
        """A proxy trained by weight, from the same initial parameters for the same seed."""
        weights = np.ones(self.pairs) if weights is None else weights
        heads = initial_heads(INPUT, INPUT, OUTPUT, seed).double()
        return train_heads(self.rows, self.batches(weights, seed), heads, self.config).heads

    @property
    def target_batches(self) -> list[NegativeBatch]:
        """One for InfoNCE. The sigmoid loss adds negatives up: as many as in training, or its bias is wrong for the target."""
        size = self.targets if self.loss == "info_nce" else self.batch_size
        chosen = torch.arange(self.targets).split(size)
        return [
            NegativeBatch(inputs=(self.target[0][rows], self.target[1][rows]), image=rows.numpy())
            for rows in chosen
        ]

    @torch.no_grad()
    def target_loss(self, heads: Heads) -> float:
        terms = [self.config.objective.terms(*heads(*batch.inputs)) for batch in self.target_batches]
        return float(torch.cat(terms).mean())

    @cached_property
    def problem(self) -> Problem:
        heads = initial_heads(INPUT, INPUT, OUTPUT, 0).double()
        every = max(1, self.steps // self.kept_checkpoints)
        kept: list[tuple[int, dict[str, Tensor]]] = []

        def keep(step: int, loss: float) -> None:
            if (step + 1) % every == 0:
                state = {name: value.clone() for name, value in heads.state_dict().items()}
                kept.append((step + 1, state))

        trained = train_heads(
            self.rows, self.batches(np.ones(self.pairs), 0), heads, self.config, on_step=keep
        )
        everything = InMemory(np.ones(self.pairs), np.arange(self.pairs))
        bank = disjoint_batches(everything, self.batch_size - 1, 4, seed=7)
        return Problem(
            space=Space(trained.heads),
            objective=self.config.objective,
            batch_size=self.batch_size,
            pool_size=self.pairs,
            bank=[NegativeBatch(inputs=self.rows(rows), image=rows) for rows in bank],
            target=self.target_batches,
            preconditioner=floored(trained.preconditioner),
            damping=damping_of(CurvatureConfig(damping_factor=1.0), trained.sum_of_learning_rates, 0.0),
            checkpoints=[self._checkpoint(step, state) for step, state in kept],
            trajectory=self.trajectory,
        )

    @property
    def trajectory(self) -> Trajectory:
        space = Space(initial_heads(INPUT, INPUT, OUTPUT, 0).double())
        return Trajectory(
            space=space,
            initial=space.flatten(space.parameters),
            config=self.config,
            batches=self.batches(np.ones(self.pairs), 0),
            inputs=self.rows,
            objective=self.config.objective,
        )

    def _checkpoint(self, step: int, state: dict[str, Tensor]) -> Checkpoint:
        factor = 0.5 * (1 + np.cos(np.pi * (step - 1) / self.steps))
        return Checkpoint(
            step=step, learning_rate=self.learning_rate * float(factor), load=partial(space_of, state)
        )

    def cut(self, sizes: Sequence[int] | None = None, order: np.ndarray | None = None) -> list[Batch]:
        """The pool in batches of these sizes, in this order."""
        order = np.arange(self.pairs) if order is None else order
        borders = np.cumsum(sizes)[:-1] if sizes is not None else []
        return [
            Batch(uid=[f"pair-{i}" for i in rows], inputs=self.rows(rows), image=rows, row=rows)
            for rows in np.split(order, borders)
        ]


def space_of(state: dict[str, Tensor]) -> Space:
    heads = initial_heads(INPUT, INPUT, OUTPUT, 0).double()
    heads.load_state_dict(state)
    return Space(heads)


def embeddings(n: int, seed: int) -> Inputs:
    """Unit embeddings of n images and their captions: the same meanings through fixed maps, with noise."""
    maps = np.random.default_rng(12345).normal(size=(2, MEANINGS, INPUT))
    generator = np.random.default_rng(seed)
    meaning = generator.normal(size=(n, MEANINGS))
    sides = (meaning @ m + 0.3 * generator.normal(size=(n, INPUT)) for m in maps)
    images, texts = (F.normalize(torch.from_numpy(side), dim=-1) for side in sides)
    return images, texts
