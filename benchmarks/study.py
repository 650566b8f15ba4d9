"""What the estimators are measured on: a small pool of real pairs, really trained proxies, and the table of scores."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from common import TRAINING, cached
from sources import Sources
from world import Setting, World

from influencespace.core.batches import folds_by_image
from influencespace.data.artifacts import fingerprint
from influencespace.data.pair_set import PairSet
from influencespace.estimators.ecif import Ecif
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch, damping_of
from influencespace.estimators.problem import Estimator, Problem, scores
from influencespace.estimators.proxy_problem import batch_of, proxy_problem, rows_of
from influencespace.estimators.table import TABLE
from influencespace.estimators.unrolled import Unrolled
from influencespace.models.space import Space
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import Rule, Trajectory, space_at

FloatArray = np.ndarray
# The learning rate is chosen as a user would: the one whose proxy does best on pairs that nothing else looks at.
RATES: dict[Rule, tuple[float, ...]] = {"sgd": (1e-3, 3e-3, 1e-2, 3e-2), "adamw": (3e-5, 1e-4, 3e-4, 1e-3)}
CONTEXTS = 8  # of the bank, where the pool has pairs for so many
OURS = ("ecif", "nystrom", "unrolled")
IN_UNITS = ("ecif, early stopping", "unrolled", "unrolled, whole", "unrolled, taylor")
"""Estimators whose scores are changes of the target loss, so that a slope means something; ecif's default damping shrinks."""
BLIND = ("clip_score", "neg_clip_loss", "el2n", "self_influence", "random")
"""What never looks at the target."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Some real pairs of which a share is wrong, a clean target, and how a proxy is trained."""

    world: World
    pairs: int | None
    wrong: float
    config: HeadsConfig
    rule: Rule = "adamw"
    noise_seed: int = 1
    dtype: torch.dtype = torch.float32

    @cached_property
    def _chosen(self) -> tuple[PairSet, np.ndarray, np.ndarray]:
        setting = Setting(wrong=self.wrong, captions=1, steps=0, noise_seed=self.noise_seed)
        pool, wrong = self.world.corrupted(setting)
        count = len(pool) if self.pairs is None else self.pairs
        return pool, np.sort(np.random.default_rng(self.noise_seed).permutation(len(pool))[:count]), wrong

    @cached_property
    def pool(self) -> NegativeBatch:
        pool, rows, _ = self._chosen
        return recorded(pool, rows, self.dtype)

    @cached_property
    def is_wrong(self) -> np.ndarray:
        _, rows, wrong = self._chosen
        return wrong[rows]

    @cached_property
    def target(self) -> NegativeBatch:
        """One caption of each image of dev's first tar."""
        return one_caption(self.world.dev(0), self.dtype)

    @cached_property
    def validation(self) -> NegativeBatch:
        """The same of dev's second tar, for the choice of a learning rate alone."""
        return one_caption(self.world.dev(1), self.dtype)

    @property
    def size(self) -> int:
        return len(self.pool.image)

    @property
    def key(self) -> str:
        """What its results depend on, beside the seeds of proxies and the code."""
        parts = [self.pairs, self.wrong, self.config, self.rule, self.noise_seed, str(self.dtype)]
        return fingerprint(parts)

    def problem(self, seed: int, target: NegativeBatch | None = None) -> Problem:
        return proxy_problem(
            self.pool, target or self.target, self.config, rule=self.rule, contexts=CONTEXTS, seed=seed
        )

    def target_group(self, group: int, groups: int) -> NegativeBatch:
        rows = np.flatnonzero(folds_by_image(self.target.image, groups, 0) == group)
        return NegativeBatch(inputs=rows_of(self.target.inputs, rows), image=self.target.image[rows])


@dataclass(frozen=True, kw_only=True)
class SyntheticStudy(Study):
    """The same with synthetic scenes, embedded by the same encoder, which has never seen any."""

    @cached_property
    def _rows(self) -> tuple[PairSet, list[np.ndarray]]:
        """Pairs of distinct scenes: the pool's, 500 for the target, the others."""
        scenes = Sources(self.world).scenes
        rows = np.unique(scenes.image, return_index=True)[1]
        rows = np.random.default_rng(self.noise_seed).permutation(rows)
        assert self.pairs is not None
        return scenes, np.split(rows, [self.pairs, self.pairs + 500])

    @cached_property
    def is_wrong(self) -> np.ndarray:
        wrong: np.ndarray = np.arange(self.pairs or 0) < round(self.wrong * (self.pairs or 0))
        return wrong

    @cached_property
    def pool(self) -> NegativeBatch:
        scenes, (rows, *_) = self._rows
        said = rows.copy()
        said[self.is_wrong] = np.roll(rows[self.is_wrong], 1)  # each has the caption of another
        images, texts = scenes.inputs(rows)[0], scenes.inputs(said)[1]
        return NegativeBatch(inputs=(images.to(self.dtype), texts.to(self.dtype)), image=np.arange(len(rows)))

    @cached_property
    def target(self) -> NegativeBatch:
        scenes, (_, rows, _) = self._rows
        return recorded(scenes, rows, self.dtype)

    @cached_property
    def validation(self) -> NegativeBatch:
        scenes, (*_, rows) = self._rows
        return recorded(scenes, rows, self.dtype)


def one_caption(pairs: PairSet, dtype: torch.dtype) -> NegativeBatch:
    return recorded(pairs, np.unique(pairs.image, return_index=True)[1], dtype)


def recorded(pairs: PairSet, rows: np.ndarray, dtype: torch.dtype) -> NegativeBatch:
    """Pairs of distinct images, numbered as they come."""
    images, texts = pairs.inputs(rows)
    return NegativeBatch(inputs=(images.to(dtype), texts.to(dtype)), image=np.arange(len(rows)))


@torch.no_grad()
def losses_on(problem: Problem, space: Space) -> FloatArray:
    """Loss of every target pair in the problem's contexts (T,)."""
    terms = []
    for context in problem.target:
        u, t = space.embed(context.inputs)
        terms.append(problem.objective.terms(u, t).double().cpu().numpy())
    return np.concatenate(terms)


def target_loss(problem: Problem, path: Trajectory) -> float:
    """The target loss at the end of a path."""
    return float(losses_on(problem, space_at(path.space, path.final)).mean())


def table() -> dict[str, Callable[[Problem], FloatArray]]:
    """What is measured: the whole table, and other forms of those in units of the loss."""

    def of(make: Callable[[], Estimator]) -> Callable[[Problem], FloatArray]:
        return lambda problem: score_all(make(), problem)

    def damped(factor: float, problem: Problem) -> FloatArray:
        path = problem.trajectory
        assert path is not None
        rates = sum(path.rate(index) for index in range(len(path.batches)))
        damping = damping_of(CurvatureConfig(damping_factor=factor), rates, path.config.weight_decay)
        return score_all(Ecif(), replace(problem, damping=damping))

    def sketched(rank: int) -> Callable[[Problem], FloatArray]:
        return of(partial(Ecif, solver="woodbury", curvature=CurvatureConfig(rank=rank, max_rank=rank)))

    found = {name: of(make) for name, make in TABLE.items()}
    return found | {
        "ecif, early stopping": partial(damped, 1.0),
        "ecif, damping factor 10": partial(damped, 10.0),
        "ecif, damping factor 1000": partial(damped, 1000.0),
        "nystrom, rank 4": sketched(4),
        "nystrom, rank 128": sketched(128),
        "ecif, taylor": of(partial(Ecif, form="taylor")),
        "ecif, own role": of(partial(Ecif, role="own")),
        "ecif, negative role": of(partial(Ecif, role="negative")),
        "unrolled, whole": of(partial(Unrolled, form="whole")),
        "unrolled, taylor": of(partial(Unrolled, form="taylor")),
    }


def score_all(estimator: Estimator, problem: Problem) -> FloatArray:
    """Scores of the whole pool, whose pairs the problem's own path holds."""
    path = problem.trajectory
    assert path is not None
    rows = np.arange(problem.pool_size)
    pool = NegativeBatch(inputs=path.inputs(rows), image=rows)
    return scores(
        estimator, problem, [batch_of(pool, part) for part in np.array_split(rows, max(1, len(rows) // 1024))]
    )


def tuned(study: Study) -> Study:
    """The study at the learning rate whose proxy of all pairs has the lowest loss on dev's second tar."""

    def losses() -> dict[str, Any]:
        found = {}
        for rate in RATES[study.rule]:
            trial = replace(study, config=replace(study.config, learning_rate=rate))
            problem = trial.problem(0, study.validation)
            found[str(rate)] = float(losses_on(problem, problem.space).mean())
        return found

    found = cached(study.world.cache, ["rates", study.key], losses, TRAINING)
    best = min(found, key=lambda rate: found[rate])
    return replace(study, config=replace(study.config, learning_rate=float(best)))
