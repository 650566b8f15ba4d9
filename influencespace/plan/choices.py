"""What a run finds out by itself, and the most that it can be."""

from dataclasses import dataclass

from influencespace.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a run finds out by itself: at most this, or what a calibration found."""

    steps: int
    tried: int
    """Steps of all proxies among which `steps` was chosen."""
    rank: int
    levels: tuple[int, ...]
    """Clusters of each level of the tree."""


def most_choices(config: RunConfig, pairs: int) -> Choices:
    """The longest training, the configured rank, and all levels that `pairs` allow."""
    doublings = config.proxy.max_doublings if config.proxy.choose_steps else 0
    steps = config.proxy.first_steps(pairs)
    return Choices(
        steps=steps * 2**doublings,
        tried=steps * (2 ** (doublings + 1) - 1),
        rank=config.curvature.rank,
        levels=most_levels(config, pairs),
    )


def most_levels(config: RunConfig, pairs: int) -> tuple[int, ...]:
    """Clusters of each level if the Davies-Bouldin index never settles."""
    given = config.cluster
    if given.k != "auto":
        return (min(given.k, pairs),)
    most = max(1, pairs // given.least_size)
    levels = [min(given.first, most)]
    while 2 * levels[-1] <= most:
        levels.append(2 * levels[-1])
    return tuple(levels)
