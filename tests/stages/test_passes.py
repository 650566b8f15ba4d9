"""Passes over ranges: the same bits in whatever order the ranges end, and an error that says which one failed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.engine.local import LocalEngine, TaskError, merge_all
from influencespace.run import Workers
from influencespace.stages import passes as module
from influencespace.stages.passes import RangePasses, Read

SIZE = 10


class Shuffled(LocalEngine):
    """Tasks end in an order of its own."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def map(self, factory: Any, tasks: Any, **more: Any) -> Iterator[Any]:
        yield from super().map(factory, [tasks[i] for i in self.order if i < len(tasks)], **more)


class Brackets:
    """A statistic that shows which states were merged with which."""

    def observe(self, read: tuple[int, int]) -> str:
        return f"{read[0]}-{read[1]}"

    def merge(self, left: str, right: str) -> str:
        return f"({left} {right})"


def span(start: int, stop: int) -> tuple[int, int]:
    return start, stop


def fold(engine: LocalEngine, rows: int, read: Read = span) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RANGE", SIZE)
        return RangePasses(Workers(engine=engine, folder=Path(), stage="test")).fold(Brackets(), read, rows)


@given(rows=st.integers(1, 95), order=st.permutations(range(10)))
def test_states_are_merged_alike_in_whatever_order_ranges_end(rows: int, order: list[int]) -> None:
    ranges = (f"{start}-{min(start + SIZE, rows)}" for start in range(0, rows, SIZE))
    assert fold(Shuffled(order), rows) == merge_all(ranges, Brackets().merge)


def test_a_pool_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        fold(LocalEngine(), 0)


def test_an_error_names_the_rows() -> None:
    def read(start: int, stop: int) -> tuple[int, int]:
        if start:
            raise RuntimeError("not readable")
        return start, stop

    with pytest.raises(TaskError, match="Brackets of rows 10 to 20"):
        fold(LocalEngine(), 25, read)
