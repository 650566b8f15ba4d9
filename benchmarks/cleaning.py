"""Data cleaning by accuracy: class folders of which 20 % of the pictures lie in the wrong one, cleaned by each estimator.

A proxy (heads over a tiny CLIP's embeddings) is trained on the pool with the class prompts as captions. Each estimator
scores the pool for a clean target; the proxy is trained again without the tenth that it finds most harmful, and without the
tenth that it finds most valuable, at equal steps, and judged by zero-shot accuracy on clean pictures. The planted truth judges
only.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from classes import NAMES, ClassWorld, folder_classes, recorded, right, true_classes
from common import ESTIMATING, TRAINING, Benchmark, arguments, cached
from study import FloatArray, table
from torch import Tensor

from influencespace.core.batches import training_batches
from influencespace.core.metrics import auroc, bootstrap_means, interval
from influencespace.core.select import top_fraction
from influencespace.data.artifacts import fingerprint
from influencespace.estimators.influence import NegativeBatch
from influencespace.estimators.proxy_problem import proxy_problem, rows_of
from influencespace.models.heads import initial_heads
from influencespace.models.training import HeadsConfig, train_heads

WRONG, REMOVED = 0.2, 0.1
RIVALS = ("random", "ekfac", "trak", "tracin", "clip_score")
METHODS = (
    "ecif",
    "ecif, early stopping",
    "nystrom",
    "unrolled",
    "grad_dot",
    "less",
    "neg_clip_loss",
    *RIVALS,
)


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """One pool with wrong names, and how its proxies are trained."""

    world: ClassWorld
    config: HeadsConfig
    retrainings: int
    one_a_name: bool = False
    """Whether the image rule keeps equal captions apart too, so that no batch has false negatives."""

    @property
    def key(self) -> str:
        return fingerprint([self.world.key, self.config, self.retrainings, self.one_a_name])

    @cached_property
    def pool(self) -> NegativeBatch:
        """Many pairs share a caption, and so do pairs of a batch: false negatives, as in the paper, but where kept apart."""
        pairs = self.world.pairs("pool")
        return recorded(pairs, folder_classes(pairs) if self.one_a_name else pairs.image)

    @cached_property
    def wrong(self) -> np.ndarray:
        pairs = self.world.pairs("pool")
        moved: np.ndarray = true_classes(pairs) != folder_classes(pairs)
        return moved

    @cached_property
    def target(self) -> NegativeBatch:
        """One picture a class in each context: its loss is then that of classifying by prompts, as accuracy is judged."""
        pairs = self.world.pairs("target")
        return recorded(pairs, folder_classes(pairs))

    @cached_property
    def test(self) -> tuple[NegativeBatch, np.ndarray]:
        """Clean pictures and what each shows."""
        pairs = self.world.pairs("test")
        return recorded(pairs, pairs.image), true_classes(pairs)

    @cached_property
    def prompts(self) -> Tensor:
        return self.world.prompts()

    @cached_property
    def scores(self) -> dict[str, FloatArray]:
        """Of every pair (N,), by every method."""

        def make() -> dict[str, Any]:
            problem = proxy_problem(self.pool, self.target, self.config, seed=self.world.seed)
            return {name: table()[name](problem).tolist() for name in METHODS}

        found = cached(self.world.cache, ["cleaning scores", self.key, METHODS], make, ESTIMATING)
        return {name: np.array(found[name]) for name in METHODS}

    def rights(self, kept: np.ndarray) -> dict[str, Any]:
        """Which test pictures proxies of the kept pairs name rightly (retrainings, n)."""
        images, texts = self.pool.inputs
        (test, shown), config = self.test, self.config
        found = []
        for number in range(self.retrainings):
            seed = self.world.seed + 1000 * (number + 1)
            heads = initial_heads(images.shape[1], texts.shape[1], config.dimension, seed)
            batches = training_batches(
                kept.astype(np.float64), self.pool.image, config.batch_size, config.steps, seed
            )
            trained = train_heads(partial(rows_of, self.pool.inputs), batches, heads, config).heads
            found.append(right(trained, test, self.prompts, shown).astype(int).tolist())
        return {"right": found}


def without(score: FloatArray, share: float, harmful: bool) -> np.ndarray:
    """The pairs (N,) that are kept when a share of them, those of lowest score or those of highest, is removed."""
    known = np.where(np.isfinite(score), score, np.nanmean(score))
    return top_fraction(known if harmful else -known, len(score) - round(share * len(score)))


def accuracies(cleaning: Cleaning, kept: np.ndarray) -> FloatArray:
    """Per cent of right names, (retrainings, n) of 0 and 100."""
    key = ["cleaning", cleaning.key, fingerprint(kept.tolist())]
    found = cached(cleaning.world.cache, key, partial(cleaning.rights, kept), TRAINING)["right"]
    return 100 * np.array(found, np.float64)


@dataclass(frozen=True)
class Result:
    """Of one choice in every pool: accuracy by retraining and test picture, and how much of what was removed was wrong."""

    accuracy: FloatArray  # (pools * retrainings, n)
    wrong_of_removed: float | None

    @cached_property
    def draws(self) -> FloatArray:
        """Of the mean; two results are resampled alike."""
        return bootstrap_means(self.accuracy)

    @property
    def cells(self) -> dict[str, Any]:
        return {
            "accuracy": float(self.accuracy.mean()),
            "interval": list(interval(self.draws)),
            "wrong_of_removed": self.wrong_of_removed,
        }

    def minus(self, other: "Result") -> tuple[float, tuple[float, float]]:
        """Mean difference of accuracy and its paired interval."""
        return float((self.accuracy - other.accuracy).mean()), interval(self.draws - other.draws)


def retrained(cleanings: Sequence[Cleaning], choose: Callable[[Cleaning], np.ndarray]) -> Result:
    found, wrong = [], []
    for cleaning in cleanings:
        kept = choose(cleaning)
        found.append(accuracies(cleaning, kept))
        wrong += [] if kept.all() else [float(cleaning.wrong[~kept].mean())]
    return Result(np.concatenate(found), float(np.mean(wrong)) if wrong else None)


def by_score(name: str, share: float, harmful: bool = True) -> Callable[[Cleaning], np.ndarray]:
    return lambda cleaning: without(cleaning.scores[name], share, harmful)


def everything(cleaning: Cleaning) -> np.ndarray:
    return np.ones(len(cleaning.wrong), bool)


def compared(
    bench: Benchmark, cleanings: Sequence[Cleaning], share: float, harmful: bool
) -> dict[str, Result]:
    """A row for every method."""
    found = {"everything": retrained(cleanings, everything)}
    if harmful:
        found["oracle"] = retrained(cleanings, lambda cleaning: ~cleaning.wrong)
    for name in METHODS:
        found[name] = retrained(cleanings, by_score(name, share, harmful))
    for name, result in found.items():
        bench.row(method=name, **result.cells)
    return found


def harmful_part(share: float, bench: Benchmark, cleanings: Sequence[Cleaning]) -> None:
    """Accuracy without the most harmful share, by every method."""
    found = compared(bench, cleanings, share, harmful=True)
    for rival in RIVALS:
        difference, around = found["ecif"].minus(found[rival])
        bench.target(
            name=f"accuracy without the most harmful {share:.0%} by ecif, minus that by {rival}",
            target="above 0",
            measured=difference,
            interval=around,
            reached=difference > 0,
        )


def valuable_part(bench: Benchmark, cleanings: Sequence[Cleaning]) -> None:
    """Accuracy without the most valuable tenth, by every method."""
    found = compared(bench, cleanings, REMOVED, harmful=False)
    difference, around = found["ecif"].minus(found["random"])
    bench.target(
        name=f"accuracy without the most valuable {REMOVED:.0%} by ecif, minus that without a random {REMOVED:.0%}",
        target="surely below 0",
        measured=difference,
        interval=around,
        reached=around[1] < 0,
    )


def false_negatives_part(bench: Benchmark, cleanings: Sequence[Cleaning]) -> None:
    """What equal captions in a batch do: the same with at most one picture a name in batches, contexts and bank."""
    for apart in (False, True):
        config = replace(cleanings[0].config, batch_size=len(NAMES))
        same = [replace(cleaning, config=config, one_a_name=apart) for cleaning in cleanings]
        batches = "one picture a name" if apart else "as they come"
        aurocs = [auroc(-cleaning.scores["ecif"], cleaning.wrong) for cleaning in same]
        for method, choose in {"everything": everything, "ecif": by_score("ecif", REMOVED)}.items():
            result = retrained(same, choose)
            found = float(np.mean(aurocs)) if method == "ecif" else None
            bench.row(batches=batches, method=method, **result.cells, auroc=found)


PARTS: dict[str, Callable[[Benchmark, Sequence[Cleaning]], None]] = {
    "harmful": partial(harmful_part, REMOVED),
    "valuable": valuable_part,
    "all_wrong": partial(harmful_part, WRONG),
    "false_negatives": false_negatives_part,
}


def main() -> int:
    options = arguments(__doc__ or "", "cleaning", parts=tuple(PARTS))
    quick = options.quick
    bench = Benchmark("cleaning", quick, options.out, seeds=(0,) if quick else (0, 1, 2, 3, 4))
    # of 1e-3, 3e-3 and 1e-2 about where accuracy levels off, found before any method was tried
    config = HeadsConfig(dimension=64, batch_size=64, steps=100 if quick else 200, learning_rate=3e-3)
    pool, target, test = (480, 480, 480) if quick else (960, 480, 1920)
    cleanings = [
        Cleaning(
            world=ClassWorld(
                cache=options.cache,
                seed=seed,
                pool=pool,
                wrong=WRONG,
                target=target,
                test=test,
                encoder_steps=60 if quick else 300,
            ),
            config=config,
            retrainings=1 if quick else 2,
        )
        for seed in bench.seeds
    ]
    bench.measure(options.parts, lambda part: PARTS[part](bench, cleanings), tuple(PARTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
