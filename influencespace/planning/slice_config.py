"""The settings of a slice: what they leave to the size of the pool is as for the whole pool, so that unit costs are its."""

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from influencespace.config import RunConfig
from influencespace.data.schema import ReadOptions
from influencespace.stages.scoring.cluster_config import MEAN_OVER_MIN, leaves

LARGE = 4000
"""A slice of so many pairs is beside one of a quarter, not of half: the larger the step between them, the less chance says."""


def smaller(limit: int) -> int:
    """Pairs of the smaller slice, beside one of `limit` pairs."""
    return limit // 4 if limit >= LARGE else limit // 2


@dataclass(frozen=True, kw_only=True)
class Sliced:
    """Settings of slices of at most `limit` pairs of a pool of `whole` pairs, for so many workers."""

    config: RunConfig
    limit: int
    whole: int
    workers: int

    def of(self, pairs: int) -> RunConfig:
        """The settings of a slice of about so many pairs, without its data; training passes it as often as the whole pool."""
        config, cluster, proxy = self.config, self.config.cluster, self.config.proxy
        if cluster.k == "auto":  # as many as of the whole pool, or as both slices can hold
            most = max(1, smaller(self.limit) // MEAN_OVER_MIN)
            cluster = replace(cluster, k=min(leaves(cluster, self.whole), most))
        first = proxy.first_steps(self.whole)
        changed = replace(
            config,
            proxy=replace(
                proxy,
                train=replace(proxy.train, steps=-(-first * pairs // self.whole)),
                folds=proxy.fold_count(self.whole),
                max_doublings=int(math.log2(proxy.max_steps(self.whole) / first)),
            ),
            cluster=cluster,
            train=replace(config.train, seeds=config.train.seeds_of(self.whole)),
            embed=replace(config.embed, read=ReadOptions(), keep_chunks=False),
            # Whether so few pairs help or harm says nothing: all are kept, lest nothing is left to train on.
            selection=replace(config.selection, tau_low=-1e6),
            iterate=1,
        )
        sliced: RunConfig = _with_buckets(changed, pairs, self.whole, self.workers)
        return sliced


def _with_buckets(settings: Any, pairs: int, whole: int, workers: int) -> Any:
    """Settings whose `bucket_size`, in every section, cuts `pairs` for as many of the workers as have one of `whole`."""
    changed = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            changed[field.name] = _with_buckets(value, pairs, whole, workers)
        elif field.name == "bucket_size":
            changed[field.name] = -(-pairs // min(workers, -(-whole // value)))
    return replace(settings, **changed)
