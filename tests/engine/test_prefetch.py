"""Work ahead keeps the order, stays within bounds, and hands on what goes wrong."""

import threading
import time
from collections.abc import Iterator

import pytest

from influencespace.engine.prefetch import prefetch


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(prefetch(range(20), slow_first, threads=4, ahead=3)) == [i * i for i in range(20)]


def test_no_more_than_so_many_items_are_drawn_early() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(100):
            drawn += 1
            yield item

    results = prefetch(items(), abs, threads=2, ahead=3)
    assert next(results) == 0
    time.sleep(0.05)
    assert drawn <= 1 + 3 + 2
    results.close()
    assert drawn < 100


def test_errors_of_items_and_of_work_come_out_in_their_turn() -> None:
    def items() -> Iterator[int]:
        yield from (3, 2)
        raise OSError("the shard is gone")

    results = prefetch(items(), lambda item: 6 // item, threads=1, ahead=2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(OSError, match="the shard is gone"):
        next(results)
    with pytest.raises(ZeroDivisionError):
        list(prefetch([1, 0, 1], lambda item: 1 // item, threads=2, ahead=2))


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    for stop in (0, 1, 5):
        results = prefetch(range(50), abs, threads=2, ahead=2)
        for _ in range(stop):
            next(results)
        results.close()
    assert threading.active_count() == before
