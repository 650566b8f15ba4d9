"""Whether pairs that were chosen with heads serve a tower: the text tower tuned on them by low-rank adapters.

Flickr8k with captions shuffled on purpose; the images keep their stored embeddings. Every subset gets the same number
of steps. Needs the real data (INFLUENCESPACE_DATA or ../shared/data) and peft; see docs/benchmarks.md.
"""

import sys
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from common import TUNING, Benchmark, cached
from curation import Curation, Setting, World, measure_on_real_pairs, recall_by_image

from influencespace.core.batches import training_batches
from influencespace.core.metrics import bootstrap_means, interval
from influencespace.core.objective import Contrastive
from influencespace.data.artifacts import fingerprint
from influencespace.data.pair_set import PairSet
from influencespace.models.encoders import load_encoder
from influencespace.models.tuning import TunedTower, TuningConfig, adapt_text_tower, tune
from influencespace.stages.student import TargetHalves

BEATEN = ("everything", "random", "clip_score")
METHODS = ("curated", *BEATEN)
UNTUNED = "(untuned)"
RATES = (1e-4, 3e-4, 1e-3)
STEPS = 50
"""About a third of an epoch: two seconds a step on one core, and there are fifteen towers to tune."""


@dataclass(frozen=True)
class Transfer:
    """The text tower tuned on subsets of one dirty pool, by the loss and at the temperature of the student."""

    curation: Curation
    config: TuningConfig

    @property
    def objective(self) -> Contrastive:
        return self.curation.config.train.objective

    @cached_property
    def captions(self) -> list[str]:
        return [str(caption) for caption in self.curation.pool.column("caption")]

    def tower(self, seed: int) -> TunedTower:
        """The text tower before the first step."""
        return adapt_text_tower(load_encoder(self.curation.world.encoder), self.config.rank, seed)

    def tuned(self, weight: np.ndarray, seed: int) -> TunedTower:
        """The text tower after the configured steps on the pool by weight (n,)."""
        pool, config, tower = self.curation.pool, self.config, self.tower(seed)
        batches = training_batches(weight, pool.image, config.batch_size, config.steps, seed)
        tune(
            tower,
            lambda rows: (pool.inputs(rows)[0], [self.captions[row] for row in rows]),
            batches,
            self.objective,
            config,
        )
        return tower

    def choosing_loss(self, tower: TunedTower) -> float:
        """Loss on the half of the target that makes model choices."""
        halves = TargetHalves(self.curation.target, self.curation.config.seed)
        contexts = halves.contexts(halves.choosing, self.config.batch_size)
        u, t = embedded(tower, halves.target)
        terms = [self.objective.terms(u[rows], t[rows]) for rows in map(torch.from_numpy, contexts)]
        return float(torch.cat(terms).mean())

    def after_everything(self) -> dict[str, Any]:
        """The choosing loss of a tower tuned on everything."""
        return {"loss": self.choosing_loss(self.tuned(np.ones(len(self.curation.pool)), 0))}

    def retrained(self, weight: np.ndarray, seed: int) -> dict[str, Any]:
        """The recall of a tower tuned on the pool by weight (n,)."""
        return {"shares": self.recall(self.tuned(weight, seed))}

    def recall(self, tower: TunedTower) -> list[float]:
        """Each test image's share of the mean recall."""
        test = self.curation.test
        shares: list[float] = recall_by_image(*embedded(tower, test), test.image).tolist()
        return shares


@torch.no_grad()
def embedded(tower: TunedTower, pairs: PairSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored embeddings of the images and the tower's of the captions: two (n, D)."""
    t = tower.embed([str(caption) for caption in pairs.column("caption")])
    return pairs.inputs(slice(None))[0], t


def transfer(world: World, quick: bool, learning_rate: float) -> Transfer:
    setting = Setting(wrong=0.3, captions=2 if quick else 5, steps=100 if quick else 200)
    size = {"steps": 3, "batch_size": 32} if quick else {"steps": STEPS}
    return Transfer(Curation(world, setting), TuningConfig(learning_rate=learning_rate, **size))


def choosing_losses(world: World, quick: bool) -> dict[float, float]:
    """Loss on the choosing half of the target by learning rate, after tuning on everything; the test set is not seen."""
    losses = {}
    for rate in RATES:
        job = transfer(world, quick, rate)
        key = ["transfer, choosing", job.curation.setting, job.config]
        losses[rate] = cached(world.cache, key, job.after_everything, TUNING)["loss"]
    return losses


def learning_rate(bench: Benchmark, world: World, quick: bool) -> None:
    """The learning rate is chosen by what training on everything comes to; all other subsets get the same."""
    untuned = transfer(world, quick, RATES[0])
    bench.row(learning_rate=UNTUNED, choosing_loss=untuned.choosing_loss(untuned.tower(0)))
    for rate, loss in choosing_losses(world, quick).items():
        bench.row(learning_rate=f"{rate:g}", choosing_loss=loss)


def recall(bench: Benchmark, world: World, quick: bool) -> None:
    """Mean recall with the tuned text tower, paired over test images and seeds."""
    losses = choosing_losses(world, quick)
    job = transfer(world, quick, min(losses, key=lambda rate: losses[rate]))
    weights = {name: weight for name, weight in job.curation.weights().items() if name in METHODS}
    measured: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for seed in bench.seeds:
        for name, weight in weights.items():
            # by the weights themselves: a change of the rule tunes no other method's towers anew
            key = ["transfer", job.curation.setting, job.config, fingerprint(weight.tolist()), seed]
            make = partial(job.retrained, weight, seed)
            measured[name].append(cached(world.cache, key, make, TUNING)["shares"])
            print(f"  seed {seed}, {name}: {np.mean(measured[name][-1]):.3f}", flush=True)
    measured[UNTUNED] = [job.recall(job.tower(0))] * len(bench.seeds)
    shares = {name: np.array(values) for name, values in measured.items()}
    draws = {name: bootstrap_means(values) for name, values in shares.items()}
    gaps = {name: float(shares["curated"].mean() - shares[name].mean()) for name in shares}
    around = {name: interval(draws["curated"] - draws[name]) for name in shares}
    for name in shares:
        bench.row(
            method=name,
            mean_recall=float(shares[name].mean()),
            interval=list(interval(draws[name])),
            kept=float((weights[name] > 0).mean()) if name in weights else None,
            curated_minus_this=gaps[name],
            paired_interval=list(around[name]),
        )
    for name in BEATEN:
        bench.target(
            name=f"mean recall with a text tower tuned on curated minus {name}, 30% wrong",
            target="surely above 0",
            measured=gaps[name],
            interval=around[name],
            reached=around[name][0] > 0,
        )


PARTS = {"learning_rate": learning_rate, "recall": recall}


if __name__ == "__main__":
    sys.exit(measure_on_real_pairs(__doc__ or "", "transfer", ((0,), (0, 1, 2)), PARTS))
