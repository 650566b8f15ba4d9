"""The page of the cost model, of invented measurements."""

from typing import Any

import pytest

from benchmarks.render import read
from benchmarks.scaling import PAGE, Measured, page
from influencespace.planning.cluster import parse_cluster


def row(stage: str, pairs: int, fixed: float, a_pair: float) -> dict[str, Any]:
    """A stage that takes `fixed` seconds alone and divides `a_pair` CPU seconds a pair over two cores."""
    return {
        "part": "runs",
        "stage": stage,
        "pairs": pairs,
        "rows": pairs,
        "seconds": fixed + a_pair * pairs / 2,
        "cpu_seconds": a_pair * pairs,
        "peak_mb": 700.0,
        "disk_mb": pairs / 1000,
        "reads_mb": pairs / 500,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    stages = {"embed/pool": 1e-4, "embed/target": 0.0, "cluster": 4e-4, "selection": 2e-4, "proxies": 1e-3}
    sizes = (10_000, 100_000, 1_000_000)
    return {
        "machine": {"cpus": 2},
        "seeds": [0],
        "commits": {"runs": "a" * 40},
        "code": {},
        "withdrawn": {},
        "incomplete": ["cost"],
        "targets": [],
        "table": [row(stage, pairs, 5.0, cost) for pairs in sizes for stage, cost in stages.items()],
    }


def test_unit_costs_are_those_of_the_two_largest_runs(result: dict[str, Any]) -> None:
    measured = Measured.of(result)
    assert measured.pairs == (100_000, 1_000_000)
    cost = measured.cost("selection", parse_cluster("10x(10 cores, 8 GB)"), 100_000_000)
    assert cost.seconds == pytest.approx(5 + 2e-4 * 1e8 / 100, rel=1e-6)
    assert cost.written == pytest.approx(1e8 * 1000, rel=1e-6)
    target = measured.cost("embed/target", parse_cluster("10x(10 cores, 8 GB)"), 100_000_000)
    assert target.seconds == pytest.approx(5)


def test_the_page_says_what_is_assumed_and_what_stops_scaling_first(result: dict[str, Any]) -> None:
    text = page(result)
    assert "Assumed, not measured" in text
    assert [line for line in text.splitlines() if line.startswith("| 1.28 B | 512 |")]
    assert text.count("proxies: tasks") > 0  # a few proxies, however many machines
    assert "Not all was measured yet: cost." in text


def test_one_size_is_too_few(result: dict[str, Any]) -> None:
    result["table"] = [one for one in result["table"] if one["pairs"] == 10_000]
    with pytest.raises(SystemExit, match="a line needs two"):
        page(result)


def test_the_page_is_of_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read("scale")), "run python benchmarks/scaling.py"
