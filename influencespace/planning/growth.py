"""How the work of each stage grows with the pool, and how far it can be divided: what two small slices cannot show.

A stage that is not listed grows with the pairs, is divided over all cores, and uses no GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from influencespace.config import RunConfig
from influencespace.stages.rivals.names import VALIDATED
from influencespace.stages.scoring.cluster_config import clusters, compared

Count = Callable[[RunConfig, int], float]
TRIALS, DESCENT = 14, 40
"""Trainings of a rival that is validated, and of metagradient descent, about."""
AS_DEAR = 1000
"""Pairs of its cluster that one is compared with in the time of all else that is done for it: clusters of slices are small, and
cannot show what large ones take. Of a run of a million pairs in 1,024 clusters: it took twice what slices had said."""


def all_pairs(config: RunConfig, pairs: int) -> float:
    """Work in proportion to the pairs."""
    return pairs


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Of one stage."""

    units: Count = all_pairs
    """The amount of work for a pool of so many pairs, in any unit."""
    width: Count | None = None
    """Workers that can share it at most; None: as many as there are."""
    gpu: bool = False
    """Whether its tasks compute on GPUs where there are any."""
    streamed: bool = False
    """Whether the driver's work goes on beside that of its workers: then seconds that nothing divided are of begin and end, and
    do not grow."""

    def most(self, config: RunConfig, pairs: int) -> float:
        """Tasks that can go on at once for a pool of so many pairs; infinity where any number can."""
        return self.width(config, pairs) if self.width else math.inf


def _draws(config: RunConfig, pairs: int) -> float:
    return float(config.proxy.first_steps(pairs) * config.proxy.train.batch_size)


def _proxies(config: RunConfig, pairs: int) -> float:
    return config.proxy.fold_count(pairs) + 1


def _trainings(config: RunConfig, pairs: int) -> float:
    return len(config.train.methods) * len(config.train.seeds_of(pairs))


def _ranked(config: RunConfig, pairs: int) -> float:
    """Scores take a pass over the pairs, a trial or a round of descent one training."""
    names = set(config.train.methods)
    trainings = TRIALS * len(names & set(VALIDATED)) + DESCENT * bool(names & {"mgd", "mgd_validated"})
    return pairs + trainings * _draws(config, pairs)


def _sample(config: RunConfig, pairs: int) -> float:
    return min(pairs, config.influence.max_samples)


def _bank(config: RunConfig, pairs: int) -> float:
    return min(pairs, config.proxy.negative_batches * config.proxy.train.batch_size)


def _cosines(config: RunConfig, pairs: int) -> float:
    return float(compared(config.cluster, pairs))


def _looked_at(config: RunConfig, pairs: int) -> float:
    near = min(pairs / clusters(config.cluster, pairs), config.redundancy.max_compared)
    return pairs * (1 + near / AS_DEAR)


GROWTH: dict[str, Growth] = {
    "proxies": Growth(
        units=lambda config, pairs: _draws(config, pairs) * _proxies(config, pairs), width=_proxies, gpu=True
    ),
    "cluster": Growth(units=_cosines, gpu=True),
    "redundancy": Growth(units=_looked_at),
    "curvature": Growth(units=_bank, gpu=True),
    "influence": Growth(units=_sample, gpu=True),
    "rivals": Growth(units=_ranked, gpu=True),
    "train": Growth(
        units=lambda config, pairs: _draws(config, pairs) * _trainings(config, pairs),
        width=_trainings,
        gpu=True,
    ),
    "evaluate": Growth(units=_trainings, width=_trainings, gpu=True),
}


def growth_of(stage: str, config: RunConfig) -> Growth:
    """Of a stage by its name; encoders are on GPUs, an import of embeddings is not."""
    if stage.startswith("embed/"):
        pictures = stage != "embed/pool" or config.data.embeddings is None
        return Growth(gpu=pictures, streamed=pictures)
    return GROWTH.get(stage, Growth())
