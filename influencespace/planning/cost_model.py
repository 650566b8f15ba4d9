"""From two measured slices to the whole: every figure is a constant and a part in proportion to the pairs."""

from dataclasses import dataclass

from influencespace.engine.placement import Resources


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One stage on a slice of the data."""

    stage: str
    pairs: int
    """That came in; 0 where the stage does not count them."""
    read: int
    """Bytes of the artifacts that it depends on."""
    written: int
    """Bytes that stay on disk."""
    memory: int
    """Peak bytes of one worker; 0 where nothing was measured."""
    seconds: float
    working: float = 0.0
    """Seconds of all workers together."""
    reading: float = 0.0
    """Of them, those of readers that feed others."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage needs on the whole data; None where it is not known."""

    stage: str
    worker: Resources
    """What each of its workers declares that it needs."""
    pairs: int | None = None
    read: int | None = None
    written: int | None = None
    memory: int | None = None
    seconds: float | None = None
    gpu_seconds: float | None = None
    """Of all GPUs together, busy; of a cluster."""
    bound: str = ""
    """What bounds the time on a cluster."""


def through(small: tuple[float, float], large: tuple[float, float], pairs: float) -> float:
    """The amount for `pairs` on the line through (pairs, amount) of two slices; for the larger slice its own amount.

    What does not grow is taken as constant. What grows faster than the pairs, or was measured on one size alone, is taken as
    proportional. So the line has a constant and a slope of which neither is negative.
    """
    (few, little), (many, much) = small, large
    slope = min(max(0.0, (much - little) / (many - few)), much / many) if many > few else much / many
    return much + slope * (pairs - many)


def scaled(
    small: Timing,
    large: Timing,
    pairs: tuple[int, int, int],
    *,
    worker: Resources,
    rounds: int = 1,
    units: tuple[float, float, float] | None = None,
) -> Cost:
    """The cost of a stage that is carried out `rounds` times; memory is that of the larger slice.

    `pairs` are those of the small slice, of the large one and of the whole data, of the role that the stage works on; `units` are
    the amounts of its work, where that is not in proportion to the pairs.
    """

    def amount(before: float, after: float, of: tuple[float, float, float] = pairs) -> float:
        return through((of[0], before), (of[1], after), of[2])

    return Cost(
        stage=large.stage,
        worker=worker,
        pairs=round(amount(small.pairs, large.pairs)) or None,
        read=round(rounds * amount(small.read, large.read)),
        written=round(rounds * amount(small.written, large.written)),
        memory=max(large.memory, worker.memory) or None,
        seconds=rounds * amount(small.seconds, large.seconds, units or pairs),
    )
