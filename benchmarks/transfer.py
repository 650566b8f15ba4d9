"""Whether pairs that were chosen with heads serve a tower: the text tower tuned on them by low-rank adapters.

Flickr8k with captions shuffled on purpose; the images keep their stored embeddings. Every subset gets the same number
of steps, and the learning rate of a few that does best with it on the half of the target that makes choices. Needs the
real data (INFLUENCESPACE_DATA or ../shared/data) and peft; see docs/benchmarks.md.
"""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from common import TUNING, Benchmark, cached
from curation import Curation, recall_by_image
from retrained import Retrained
from world import Setting, World, measure_on_real_pairs

from influencespace.core.batches import training_batches
from influencespace.core.contrastive import Contrastive
from influencespace.data.artifacts import fingerprint
from influencespace.data.pair_set import PairSet
from influencespace.models.encoders import load_encoder
from benchmarks.methods.tuning import TunedTower, TuningConfig, adapt_text_tower, tune
from influencespace.stages.proxies.proxies import TargetHalves

BEATEN = ("everything", "random", "clip_score")
METHODS = ("curated", *BEATEN)
UNTUNED = "(untuned)"
RATES = (1e-4, 3e-4, 1e-3)
STEPS = 50
"""About a third of an epoch: two seconds a step on one core, and there are twenty towers or more to tune."""
TARS = (0, 1)


@dataclass(frozen=True)
class Transfer:
    """The text tower tuned on subsets of one dirty pool, by the loss and at the temperature of the proxy."""

    curation: Curation
    config: TuningConfig

    @property
    def objective(self) -> Contrastive:
        return self.curation.config.train.objective

    @cached_property
    def captions(self) -> list[str]:
        return [str(caption) for caption in self.curation.pool.column("caption")]

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        return {name: weight for name, weight in self.curation.weights().items() if name in METHODS}

    def tower(self, seed: int) -> TunedTower:
        """The text tower before the first step."""
        return adapt_text_tower(load_encoder(self.curation.world.encoder), self.config.rank, seed)

    def tuned(self, weight: np.ndarray, rate: float, seed: int) -> TunedTower:
        """The text tower after the configured steps on the pool by weight (n,)."""
        pool, config, tower = self.curation.pool, replace(self.config, learning_rate=rate), self.tower(seed)
        batches = training_batches(weight, pool.image, config.batch_size, config.steps, seed)
        tune(
            tower,
            lambda rows: (pool.inputs(rows)[0], [self.captions[row] for row in rows]),
            batches,
            self.objective,
            config,
        )
        return tower

    def measured(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """What a method's tower comes to on both tars of dev; towers are kept by their weights."""
        weight = self.weights[method]
        pool, config = self.curation.pool.table.manifest, replace(self.config, learning_rate=rate)
        return cached(
            self.curation.world.cache,
            ["transfer", pool.fingerprint, self.objective, config, fingerprint(weight.tolist()), seed],
            lambda: self.on_dev(self.tuned(weight, rate, seed)),
            TUNING,
        )

    def on_dev(self, tower: TunedTower) -> dict[str, Any]:
        """Loss on the choosing half of each tar of dev, and each image's share of its mean recall."""
        losses, shares = [], []
        for tar in TARS:
            halves = TargetHalves(self.curation.world.dev(tar), self.curation.config.seed)
            contexts = halves.contexts(halves.choosing, self.config.batch_size)
            u, t = embedded(tower, halves.target)
            terms = [self.objective.terms(u[rows], t[rows]) for rows in map(torch.from_numpy, contexts)]
            losses.append(float(torch.cat(terms).mean()))
            shares.append(recall_by_image(u, t, halves.target.image).tolist())
        return {"choosing_loss": losses, "shares": shares}

    @property
    def untuned(self) -> dict[str, Any]:
        key = ["transfer, untuned", self.config.batch_size]
        return cached(self.curation.world.cache, key, lambda: self.on_dev(self.tower(0)), TUNING)

    def losses(self, method: str) -> dict[float, float]:
        """Loss on the choosing half of the target by learning rate, as long as a higher one helps; the test set is not seen."""
        target, found = self.curation.setting.target, dict[float, float]()
        for rate in RATES:
            found[rate] = self.measured(method, rate, 0)["choosing_loss"][target]
            if found[rate] > min(found.values()):
                break
        return found

    def recall(self, method: str, seed: int) -> list[float]:
        """Each test image's share of the mean recall, at the learning rate that was chosen."""
        test = 1 - self.curation.setting.target
        if method == UNTUNED:
            shares: list[float] = self.untuned["shares"][test]
            return shares
        losses = self.losses(method)
        shares = self.measured(method, min(losses, key=lambda rate: losses[rate]), seed)["shares"][test]
        print(f"  target {1 - test}, seed {seed}, {method}: {np.mean(shares):.3f}", flush=True)
        return shares


@torch.no_grad()
def embedded(tower: TunedTower, pairs: PairSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored embeddings of the images and the tower's of the captions: two (n, D)."""
    t = tower.embed([str(caption) for caption in pairs.column("caption")])
    return pairs.inputs(slice(None))[0], t


def transfers(world: World, quick: bool) -> list[Transfer]:
    """Dev's two tars swapped."""
    setting = Setting(wrong=0.3, captions=2 if quick else 5, steps=100 if quick else 200)
    config = TuningConfig(steps=3, batch_size=32) if quick else TuningConfig(steps=STEPS)
    targets = TARS[:1] if quick else TARS
    return [Transfer(Curation(world, replace(setting, target=target)), config) for target in targets]


def learning_rate(bench: Benchmark, world: World, quick: bool) -> None:
    """The learning rate is chosen for every subset by itself."""
    for job in transfers(world, quick):
        target = job.curation.setting.target
        bench.row(
            method=UNTUNED,
            target=target,
            learning_rate="-",
            choosing_loss=job.untuned["choosing_loss"][target],
        )
        for method in METHODS:
            for rate, loss in job.losses(method).items():
                bench.row(method=method, target=target, learning_rate=f"{rate:g}", choosing_loss=loss)


def recall(bench: Benchmark, world: World, quick: bool) -> None:
    """Mean recall with the tuned text tower, paired over test images and seeds."""
    jobs = transfers(world, quick)

    def shares(method: str) -> np.ndarray:
        each = [[job.recall(method, seed) for seed in bench.seeds] for job in jobs]
        return np.concatenate([np.array(values) for values in each], 1)

    found = Retrained(
        shares={method: shares(method) for method in (*METHODS, UNTUNED)},
        kept={
            method: float(np.mean([(job.weights[method] > 0).mean() for job in jobs])) for method in METHODS
        },
    )
    for method in found.shares:
        bench.row(**found.row(method))
    for method in BEATEN:
        gap, around = found.compared(method)
        bench.target(
            name=f"mean recall with a text tower tuned on curated minus {method}, 30% wrong",
            target="surely above 0",
            measured=gap,
            interval=around,
            reached=around[0] > 0,
        )


PARTS = {"learning_rate": learning_rate, "recall": recall}


if __name__ == "__main__":
    sys.exit(measure_on_real_pairs(__doc__ or "", "transfer", ((0,), (0, 1, 2)), PARTS))
