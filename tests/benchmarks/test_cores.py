import pytest

from benchmarks.speed.cores import speedups


def test_bare_processes_that_share_nothing_are_twice_as_quick() -> None:
    took = {
        "one": {"cluster": 10.0},
        "two": {"cluster": 8.0},
        "bare_alone": {"cluster": 3.0},
        "bare_both": {"cluster": 3.0},
    }
    assert speedups(took) == {"cluster": (pytest.approx(1.25), pytest.approx(2.0))}
    took["bare_both"]["cluster"] = 6.0  # they hinder one another as if there were one core
    assert speedups(took) == {"cluster": (pytest.approx(1.25), pytest.approx(1.0))}


def test_without_data_there_is_nothing() -> None:
    assert speedups({}) == {}
