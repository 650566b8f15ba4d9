"""What a promise asks for: in words, and as a test of what was measured and its 95 % interval."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

Interval = tuple[float, float]


@dataclass(frozen=True)
class Wanted:
    """`holds(value, interval)` is what the words say."""

    words: str
    holds: Callable[[float, Interval], bool]


def _bounded(words: str, holds: Callable[[float, float, Interval], bool]) -> Callable[[float], Wanted]:
    return lambda bound: Wanted(words.format(bound), partial(holds, bound))


at_least = _bounded("at least {:g}", lambda bound, value, _: value >= bound)
at_most = _bounded("at most {:g}", lambda bound, value, _: value <= bound)
above = _bounded("above {:g}", lambda bound, value, _: value > bound)
significantly_above = _bounded(
    "significantly above {:g} (95 % CI)", lambda bound, _, around: around[0] > bound
)
significantly_below = _bounded(
    "significantly below {:g} (95 % CI)", lambda bound, _, around: around[1] < bound
)
not_significantly_below = _bounded(
    "not significantly below {:g} (95 % CI)", lambda bound, _, around: around[1] >= bound
)
one_quantile = Wanted("within one quantile", lambda value, _: abs(value) <= 1)


def between(low: float, high: float) -> Wanted:
    return Wanted(f"{low:g} to {high:g}", lambda value, _: low <= value <= high)


def within(distance: float, of: float) -> Wanted:
    return Wanted(f"within {distance:g} of {of:.3f}", lambda value, _: abs(value - of) <= distance)
