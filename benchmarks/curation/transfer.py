"""Whether pairs that were chosen with heads serve a tower: the text tower tuned on them by low-rank adapters.

Flickr8k with captions shuffled on purpose; the images keep their stored embeddings. Every subset gets the same number
of steps, and the learning rate of a few that does best with it on the half of the target that makes choices. Needs peft.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.cache import cached
from benchmarks.curation.curation import Curation, by_fold, identity, rotated
from benchmarks.curation.quality import wrong
from benchmarks.curation.retrain_eval import judged, together
from benchmarks.methods.tuning import TunedTower, TuningConfig, adapt_text_tower, tune
from influencespace.core.arrays import FloatArray
from influencespace.core.batches import training_batches
from influencespace.core.contrastive import Contrastive
from influencespace.data.artifacts import fingerprint
from influencespace.data.pair_set import PairSet
from influencespace.models.encoders import load_encoder

BENCHMARK = Benchmark(data="flickr8k")
BEATEN = ("everything", "random", "clip_score")
METHODS = ("curated", *BEATEN)
UNTUNED = "(untuned)"
RATES = (1e-4, 3e-4, 1e-3)
STEPS = 50
"""About a third of an epoch: two seconds a step on one core, and there are twenty towers or more to tune."""


@dataclass(frozen=True)
class Transfer:
    """The text tower tuned on subsets of one corrupted pool, by the loss and at the temperature of the proxy."""

    curation: Curation
    config: TuningConfig

    @property
    def objective(self) -> Contrastive:
        return self.curation.config.proxy.train.objective

    @cached_property
    def weights(self) -> dict[str, FloatArray]:
        return {name: weight for name, weight in self.curation.weights().items() if name in METHODS}

    def tower(self, seed: int) -> TunedTower:
        """The text tower before the first step."""
        return adapt_text_tower(load_encoder(self.curation.dataset.encoder), self.config.rank, seed)

    def tuned(self, weight: FloatArray, rate: float, seed: int) -> TunedTower:
        """The text tower after the configured steps on the pool by weight (n,)."""
        pool, config, tower = self.curation.pool, replace(self.config, learning_rate=rate), self.tower(seed)
        captions = [str(caption) for caption in pool.column("caption")]
        batches = training_batches(weight, pool.image, config.batch_size, config.steps, seed)
        tune(
            tower,
            lambda rows: (pool.inputs(rows)[0], [captions[row] for row in rows]),
            batches,
            self.objective,
            config,
        )
        return tower

    def measured(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """What a method's tower comes to; towers are kept by their weights."""
        pool, config = identity(self.curation.pool), replace(self.config, learning_rate=rate)
        about: list[Any] = ["untuned"]
        tower = partial(self.tower, 0)
        if method != UNTUNED:
            weight = self.weights[method]
            tower, about = partial(self.tuned, weight, rate, seed), [fingerprint(weight.tolist()), seed]
        sets = identity(self.curation.target), identity(self.curation.test)
        key = ["transfer", pool, *sets, self.objective, config, *about]
        return cached(self.curation.dataset.cache, key, lambda: self.judged(tower()))

    def judged(self, tower: TunedTower) -> dict[str, Any]:
        """Loss on the choosing half of the target, and each test image's share of the mean recall."""

        def embed(pairs: PairSet) -> tuple[Tensor, Tensor]:
            """Stored embeddings of the images and the tower's of the captions: two (n, D)."""
            t = tower.embed([str(caption) for caption in pairs.column("caption")])
            return pairs.inputs(slice(None))[0], t

        target, test = self.curation.target, self.curation.test
        return judged(embed, target, test, self.objective, self.config.batch_size)

    def loss(self, method: str, rate: float) -> float:
        """On the choosing half of the target; the test set is not seen."""
        return float(self.measured(method, rate, 0)["choosing_loss"])

    def losses(self, method: str) -> dict[float, float]:
        """Loss on the choosing half of the target by learning rate, as long as a higher one helps."""
        losses: dict[float, float] = {}
        for rate in RATES:
            losses[rate] = self.loss(method, rate)
            if losses[rate] > min(losses.values()):
                break
        return losses

    def recall(self, method: str, seed: int) -> list[float]:
        """Each test image's share of the mean recall, at the learning rate that was chosen."""
        rate = RATES[0]
        if method != UNTUNED:
            losses = self.losses(method)
            rate = min(losses, key=lambda rate: losses[rate])
        shares: list[float] = self.measured(method, rate, seed)["shares"]
        print(
            f"  fold {self.curation.setting.turn.fold}, seed {seed}, {method}: {np.mean(shares):.3f}",
            flush=True,
        )
        return shares


def transfers(bench: Bench) -> list[Transfer]:
    """One turn for each test set: towers take long."""
    setting = wrong(0.3, bench.pick(5, 2), bench.pick(200, 100))
    config = bench.pick(TuningConfig(steps=STEPS), TuningConfig(steps=3, batch_size=32))
    return [Transfer(fold[0], config) for fold in by_fold(rotated(bench, setting, Curation))]


@BENCHMARK.part
def learning_rate(bench: Bench) -> None:
    """The learning rate is chosen for every subset by itself."""
    for job in transfers(bench):
        fold = job.curation.setting.turn.fold
        losses = {UNTUNED: {"-": job.loss(UNTUNED, RATES[0])}}
        losses |= {method: {f"{rate:g}": x for rate, x in job.losses(method).items()} for method in METHODS}
        for method, by_rate in losses.items():
            for rate, loss in by_rate.items():
                bench.row(method=method, fold=fold, learning_rate=rate, choosing_loss=loss)


@BENCHMARK.part
def recall(bench: Bench) -> None:
    """Mean recall with the tuned text tower, paired over test images and seeds."""
    parts = [
        {
            "shares": {
                name: [job.recall(name, seed) for seed in bench.seeds] for name in (*METHODS, UNTUNED)
            },
            "kept": {name: float((weight > 0).mean()) for name, weight in job.weights.items()},
        }
        for job in transfers(bench)
    ]
    result = together([[part] for part in parts])
    for method in result.shares:
        bench.row(**result.row(method))
    for method in BEATEN:
        name = f"mean recall with a text tower tuned on curated minus {method}, 30% wrong"
        bench.target(name, wanted.significantly_above(0), *result.compared(method))
