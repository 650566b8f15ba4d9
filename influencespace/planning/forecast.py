"""What a stage takes on a cluster, from what its workers did on two slices."""

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
    def of(cls, small: Timing, large: Timing, units: tuple[float, float], cores: int) -> "UnitCosts":
        """From two slices on an engine of so many cores."""

        def alone(timing: Timing) -> float:
            return max(0.0, timing.seconds - timing.working / cores)

        return cls(
            stage=large.stage,
            units=units,
            working=(small.working - small.reading, large.working - large.reading),
            reading=(small.reading, large.reading),
            alone=(alone(small), alone(large)),
        )

    def at(self, values: tuple[float, float], units: float) -> float:
        """One of the lines, at so many units."""
        return through((self.units[0], values[0]), (self.units[1], values[1]), units)


def on_cluster(
    cost: Cost, costs: UnitCosts, cluster: Cluster, config: RunConfig, pairs: int, rounds: int = 1
) -> Cost:
    """The stage's cost with the seconds, the busy seconds of GPUs, and the bound of a cluster, for so many pairs of its role."""
    growth = growth_of(cost.stage, config)
    units = growth.units(config, pairs)
    working, reading, alone = (
        costs.at(values, units) for values in (costs.working, costs.reading, costs.alone)
    )
    most = growth.width(config, pairs) if growth.width else float("inf")
    on_gpus = growth.gpu and cluster.gpus > 0
    if on_gpus:
        busy = working / cluster.cores_per_gpu
        places = min(cluster.gpus, most)
        by_gpus, by_cores = busy / places, reading / cluster.cores
        divided, bound = max((by_gpus, GPUS if places < most else FEW), (by_cores, CORES))
    else:
        busy, places = 0.0, min(cluster.cores, most)
        divided, bound = (working + reading) / places, CORES if places < most else FEW
    return replace(
        cost,
        seconds=rounds * (divided + alone),
        gpu_seconds=rounds * busy,
        bound=bound if divided > alone else ALONE,
    )
