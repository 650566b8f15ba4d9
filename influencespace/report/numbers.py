"""Numbers as people read them; MISSING for what is not known."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from influencespace.engine.progress import duration

MISSING = "–"
MIN_VALUE = 1e-30  # anything below is zero but for rounding
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None, digits: int = 2) -> str:
    """With a real minus; what rounds to zero has none."""
    return f"{value:z,.{digits}f}".replace("-", "−") if is_number(value) else MISSING


def signed(value: float | None, digits: int = 2) -> str:
    """With its sign, unless it rounds to zero."""
    return "+" * (is_number(value) and round(value, digits) > 0) + number(value, digits)


def interval(ci: Sequence[float | None] | None, *, sign: bool = False) -> str:
    """`ci` is (low, high)."""
    show = signed if sign else number
    return f"{show(ci[0])} to {show(ci[1])}" if ci else MISSING


def percent(fraction: float | None) -> str:
    return f"{100 * fraction:.1f} %" if is_number(fraction) else MISSING


def count(value: float | None) -> str:
    return number(value, 0)


def seconds(value: float | None) -> str:
    if not is_number(value):
        return MISSING
    return f"{value:.1f}s" if value < 60 else duration(value)


def gigabytes(value: float | None) -> str:
    return f"{number(value / 1e9)} GB" if is_number(value) else MISSING


@dataclass(frozen=True)
class Unit:
    """A power of ten that makes small numbers readable."""

    exponent: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Unit":
        """The power of 1,000 below the largest of `values`."""
        largest = max((abs(value) for value in values if is_number(value)), default=0.0)
        return cls(0 if largest < MIN_VALUE else 3 * math.floor(math.log10(largest) / 3))

    def scaled(self, value: float) -> float:
        """`value` in this unit."""
        return value / 10.0**self.exponent

    def show(self, value: float) -> str:
        """About three digits, in this unit."""
        scaled = self.scaled(value)
        return number(scaled, 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0)

    @property
    def name(self) -> str:
        power = str(self.exponent).translate(_SUPERSCRIPTS)
        return f"10{power} of target loss" if self.exponent else "target loss"
