"""What a stage takes on a cluster, from what its workers did on two slices."""

import math
from dataclasses import dataclass, replace

from influencespace.config import RunConfig
from influencespace.planning.cluster import Cluster
from influencespace.planning.cost_model import Cost, Timing, through
from influencespace.planning.growth import growth_of

ALONE, CORES, GPUS, FEW = "the driver", "cores", "GPUs", "tasks"
"""What bounds the time of a stage: work of the driver, the number of cores, of GPUs, or of tasks that can go on at once."""


@dataclass(frozen=True, kw_only=True)
class UnitCosts:
    """One stage, as measured: work that is divided over workers, and what is not, as lines through (units of work, seconds)
    of two slices."""

    stage: str
    units: tuple[float, float]
    working: tuple[float, float]
    """Seconds of workers with one core each, or on a GPU."""
    reading: tuple[float, float]
    """Seconds of readers that feed them, which GPUs do not help."""
    alone: tuple[float, float]
    """Seconds in which nothing was divided."""

    @classmethod
    def of(
        cls,
        small: Timing,
        large: Timing,
        units: tuple[float, float],
        cores: int,
        widths: tuple[float, float] = (math.inf, math.inf),
    ) -> "UnitCosts":
        """From two slices on an engine of so many cores, of so many tasks each that can go on at once."""

        def alone(timing: Timing, width: float) -> float:
            return max(0.0, timing.seconds - divided(timing.working, cores, width))

        return cls(
            stage=large.stage,
            units=units,
            working=(small.working - small.reading, large.working - large.reading),
            reading=(small.reading, large.reading),
            alone=(alone(small, widths[0]), alone(large, widths[1])),
        )

    def at(self, values: tuple[float, float], units: float) -> float:
        """One of the lines, at so many units."""
        return through((self.units[0], values[0]), (self.units[1], values[1]), units)


def divided(seconds: float, places: float, tasks: float) -> float:
    """Seconds of work in tasks of one size, some of which go on at once: three on two places take as long as four."""
    return seconds / places if math.isinf(tasks) else seconds * math.ceil(tasks / places) / tasks


def on_cluster(
    cost: Cost, costs: UnitCosts, cluster: Cluster, config: RunConfig, pairs: int, rounds: int = 1
) -> Cost:
    """The stage's cost with the seconds, the busy seconds of GPUs, and the bound of a cluster, for so many pairs of its role."""
    growth = growth_of(cost.stage, config)
    units = growth.units(config, pairs)
    working, reading, alone = (
        costs.at(values, units) for values in (costs.working, costs.reading, costs.alone)
    )
    alone = costs.alone[1] if growth.streamed else alone
    most = growth.most(config, pairs)
    if growth.gpu and cluster.gpus > 0:
        busy = working / cluster.cores_per_gpu
        by_gpus = divided(busy, cluster.gpus, most)
        by_cores = reading / cluster.cores
        shared, bound = max((by_gpus, GPUS if cluster.gpus < most else FEW), (by_cores, CORES))
    else:
        busy = 0.0
        shared = divided(working + reading, cluster.cores, most)
        bound = CORES if cluster.cores < most else FEW
    return replace(
        cost,
        seconds=rounds * (shared + alone),
        gpu_seconds=rounds * busy,
        bound=bound if shared > alone else ALONE,
    )
