"""The plan of a run: the data are counted, what cannot fit is refused, a slice is measured and scaled."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from influencespace.config import RunConfig
from influencespace.engine.local import Engine
from influencespace.engine.placement import Resources
from influencespace.errors import InputError
from influencespace.pipeline import STAGES, check, data_stages
from influencespace.planning.bounds import check_disk, check_workers, existing
from influencespace.planning.cluster import Cluster
from influencespace.planning.cost_model import Cost, scaled
from influencespace.planning.dataset_stats import SetSize, dataset_stats
from influencespace.planning.forecast import UnitCosts, on_cluster
from influencespace.planning.growth import growth_of
from influencespace.planning.measuring import Slice, measure_slices
from influencespace.planning.slice_config import Sliced, smaller
from influencespace.planning.slices import Slicer
from influencespace.run import Run, Stage

USUAL, SHARE, MOST = 20_000, 25, 100_000
"""Pairs of the usual slice; of a larger pool one in so many, at most so many."""
MIN_LIMIT = 64  # half of it is the smaller slice, which the split must be able to divide


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run, and what it needs."""

    sizes: Mapping[str, SetSize]
    """Of the roles that have data of their own."""
    costs: tuple[Cost, ...]
    """Of the stages, in order."""
    measured: int
    """Pairs on which the stages after embedding were measured; 0 where nothing was."""
    embedded: int
    """Pairs of the pool whose pictures were embedded for that; 0 where its embeddings are provided."""
    rounds: int
    """That the stages after the split are repeated at most."""
    cluster: Cluster | None = None
    """Where the run is to be; None: here."""

    def cost(self, stage: str) -> Cost:
        return next(cost for cost in self.costs if cost.stage == stage)

    @property
    def written(self) -> int:
        """Bytes on disk, as far as they are known."""
        return sum(cost.written or 0 for cost in self.costs)


def usual_limit(pairs: int) -> int:
    """Pairs of the slice of a pool of so many that is measured where no number is given."""
    return min(pairs, max(USUAL, min(MOST, pairs // SHARE)))


def plan(
    config: RunConfig,
    limit: int | None,
    engine: Engine,
    folder: Path | str = ".",
    stages: Sequence[Stage] = STAGES,
    *,
    cluster: Cluster | None = None,
    pairs: int | None = None,
) -> Plan:
    """Pairs, bytes, memory and time of each stage of a run of `config` in `folder`, before it runs.

    Stored embeddings of at most `limit` pairs (None: `usual_limit`), and of fewer, go through all stages on `engine`, in a folder
    beside the run's that is removed again; of a pool of pictures they are made of some that are embedded. What that took is
    scaled to all pairs. With a limit of 0 the data are counted, and nothing is measured. With `pairs` the pool is taken to have
    so many, like those that are there, and with a `cluster` the run is on its machines: then lack of disk here is no reason to
    refuse. Raises InputError for data, an encoder or settings that cannot be used, and for files or workers that certainly do not
    fit.
    """
    if limit and limit < MIN_LIMIT:
        raise InputError(
            f"--limit {limit}: give 0 to count only, or {MIN_LIMIT} pairs or more, such as {USUAL}"
        )
    check(config)
    if cluster and limit == 0:
        raise InputError("--cluster needs a measured slice: leave out --limit 0")
    folder, there = Path(folder).expanduser().absolute(), dataset_stats(config)
    before = data_stages(config)
    machines = cluster.machines if cluster else engine.machines
    workers = check_workers([*before, *stages], Run(folder=folder, config=config), machines)
    sizes = there if pairs is None else {**there, "pool": there["pool"].scaled(pairs)}
    here = cluster is None and pairs is None
    largest = max(
        size.embedding_bytes for size in sizes.values()
    )  # beside its buckets lie its chunks until it is merged
    if here:
        check_disk(largest + sum(size.embedding_bytes for size in sizes.values()), folder)
    costs = counted(sizes, workers)
    made = Plan(sizes=sizes, costs=costs, measured=0, embedded=0, rounds=config.iterate, cluster=cluster)
    if limit != 0:
        whole = sizes["pool"].pairs
        most = whole if config.data.embeddings is None else there["pool"].pairs
        limit = min(limit or usual_limit(whole), most)
        sliced = Sliced(config=config, limit=limit, whole=whole, workers=engine.cores)
        print(
            f"plan: all stages after embedding are carried out on slices of {smaller(limit):,} and {limit:,} of {whole:,} pairs, "
            "to measure them",
            file=sys.stderr,
            flush=True,
        )
        pairs_there = {role: size.pairs for role, size in there.items()}
        few, many = measure_slices(Slicer(sliced=sliced), pairs_there, existing(folder), engine, stages)
        made = _measured(made, Slices(few, many, sliced), once=[str(stage.name) for stage in before])
    if here:
        check_disk(made.written, folder)
    return made


def _measured(made: Plan, slices: "Slices", once: Sequence[str]) -> Plan:
    """The plan with what slices tell of its stages, all of which but some are carried out in every round."""
    costs = tuple(
        slices.cost(cost, made.sizes, made.cluster, rounds=1 if cost.stage in once else made.rounds)
        for cost in made.costs
    )
    imported = slices.sliced.config.data.embeddings is not None
    embedded = 0 if imported else slices.many.pairs_of("embed/pool")
    return replace(made, costs=costs, measured=slices.many.pairs, embedded=embedded)


def counted(sizes: Mapping[str, SetSize], workers: Mapping[str, Resources]) -> tuple[Cost, ...]:
    """What is known before anything was measured: what each worker needs, and of embedding its data and embeddings."""
    costs = {
        stage: Cost(stage=stage, worker=worker, memory=worker.memory or None)
        for stage, worker in workers.items()
    }
    for role, size in sizes.items():
        cost = costs[f"embed/{role}"]
        costs[cost.stage] = replace(cost, pairs=size.pairs, read=size.bytes, written=size.embedding_bytes)
    return tuple(costs.values())


@dataclass(frozen=True)
class Slices:
    """What two slices took."""

    few: Slice
    many: Slice
    sliced: Sliced

    def cost(
        self, counted: Cost, sizes: Mapping[str, SetSize], cluster: Cluster | None, *, rounds: int
    ) -> Cost:
        """The cost of a stage: embedding grows with its own role's pairs, all else with the pool's."""
        stage, whole = counted.stage, self.sliced.config
        role = stage.removeprefix("embed/") if stage.startswith("embed/") else "pool"
        configs = self.few.config, self.many.config, whole
        pairs = self.few.pairs_of(stage), self.many.pairs_of(stage), sizes[role].pairs
        growth = growth_of(stage, whole)
        few, many, all_units = (growth.units(config, count) for config, count in zip(configs, pairs))
        small, large = self.few.timings[stage], self.many.timings[stage]
        cost = scaled(small, large, pairs, worker=counted.worker, rounds=rounds, units=(few, many, all_units))
        cost = replace(cost, read=counted.read or cost.read)
        if cluster is None:
            return cost
        widths = growth.most(configs[0], pairs[0]), growth.most(configs[1], pairs[1])
        unit_costs = UnitCosts.of(small, large, (few, many), self.sliced.workers, widths)
        return on_cluster(cost, unit_costs, cluster, whole, pairs[2], rounds)
