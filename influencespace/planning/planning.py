"""The plan of a run: the data are counted, what cannot fit is refused, a slice is measured and scaled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from influencespace.config import RunConfig
from influencespace.engine.local import Engine
from influencespace.engine.placement import Resources
from influencespace.errors import InputError
from influencespace.pipeline import STAGES, check, data_stages
from influencespace.planning.bounds import check_disk, check_workers, existing
from influencespace.planning.cost_model import Cost, scaled
from influencespace.planning.dataset_stats import SetSize, dataset_stats
from influencespace.planning.slices import Slicer, Timings, measure_slices
from influencespace.run import Run, Stage

LIMIT = 400
"""Pairs of the usual slice."""
MIN_LIMIT = 64  # half of it is the smaller slice, which the split must be able to divide


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run, and what it needs."""

    sizes: Mapping[str, SetSize]
    """Of the roles that have data of their own."""
    costs: tuple[Cost, ...]
    """Of the stages, in order."""
    measured: int
    """Pairs of the pool that were measured; 0 where none were."""
    rounds: int
    """That the stages after the split are repeated at most."""

    def cost(self, stage: str) -> Cost:
        return next(cost for cost in self.costs if cost.stage == stage)

    @property
    def written(self) -> int:
        """Bytes on disk, as far as they are known."""
        return sum(cost.written or 0 for cost in self.costs)


def plan(
    config: RunConfig,
    limit: int,
    engine: Engine,
    folder: Path | str = ".",
    stages: Sequence[Stage] = STAGES,
) -> Plan:
    """Pairs, bytes, memory and time of each stage of a run of `config` in `folder`, before it runs.

    About `limit` pairs, and half as many, go through all stages on `engine`, in a folder beside the run's that is removed
    again; what they took is scaled to all pairs. With a limit of 0 the data are counted, and nothing is measured. Raises
    InputError for data, an encoder or settings that cannot be used, and for files or workers that certainly do not fit.
    """
    if limit and limit < MIN_LIMIT:
        raise InputError(
            f"--limit {limit}: give 0 to count only, or {MIN_LIMIT} pairs or more, such as {LIMIT}"
        )
    check(config)
    folder, sizes = Path(folder).expanduser().absolute(), dataset_stats(config)
    before = data_stages(config)
    workers = check_workers([*before, *stages], Run(folder=folder, config=config), engine)
    check_disk(sum(size.embedding_bytes for size in sizes.values()), folder)
    costs, measured = counted(sizes, workers), 0
    if limit:
        slicer = Slicer(config=config, sizes=sizes, workers=engine.cores)
        limit = min(limit, sizes["pool"].pairs)
        small, large = measure_slices(slicer, limit, existing(folder), engine, stages)
        once = [stage.name for stage in before]
        costs = [
            extrapolated(cost, small, large, sizes, rounds=1 if cost.stage in once else config.iterate)
            for cost in costs
        ]
        measured = large["embed/pool"].pairs
    made = Plan(sizes=sizes, costs=tuple(costs), measured=measured, rounds=config.iterate)
    check_disk(made.written, folder)
    return made


def counted(sizes: Mapping[str, SetSize], workers: Mapping[str, Resources]) -> list[Cost]:
    """What is known before anything was measured: what each worker needs, and of embedding its data and embeddings."""
    costs = {
        stage: Cost(stage=stage, worker=worker, memory=worker.memory or None)
        for stage, worker in workers.items()
    }
    for role, size in sizes.items():
        cost = costs[f"embed/{role}"]
        costs[cost.stage] = replace(cost, pairs=size.pairs, read=size.bytes, written=size.embedding_bytes)
    return list(costs.values())


def extrapolated(
    counted: Cost, small: Timings, large: Timings, sizes: Mapping[str, SetSize], *, rounds: int
) -> Cost:
    """The cost of a stage by two slices: embedding grows with its own role's pairs, all else with the pool's."""
    role = counted.stage.removeprefix("embed/") if counted.stage.startswith("embed/") else "pool"
    name = f"embed/{role}"
    pairs = small[name].pairs, large[name].pairs, sizes[role].pairs
    cost = scaled(small[counted.stage], large[counted.stage], pairs, worker=counted.worker, rounds=rounds)
    return replace(cost, read=counted.read or cost.read)
