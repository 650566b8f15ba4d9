"""The runner: what it lists, refuses, writes and keeps."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.bench import Bench, Benchmark, Results, run_parts
from benchmarks.cache import ROOT, OutOfTimeError
from benchmarks.run import NAMES, load, main
from benchmarks.wanted import (
    Wanted,
    above,
    at_least,
    at_most,
    between,
    not_significantly_below,
    significantly_above,
    significantly_below,
    within,
)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_loads_and_names_its_parts(name: str) -> None:
    benchmark = load(name)
    assert benchmark.parts
    assert set(benchmark.quick_seeds) <= set(range(5))
    path = ROOT / "benchmarks" / "results" / f"{name.split('/')[1]}.json"
    if path.is_file():  # a new one is not measured yet
        result = json.loads(path.read_text())
        assert result["benchmark"] == name
        assert set(result["commits"]) <= set(benchmark.parts)


def test_the_list_is_there_without_a_package_of_benchmarks_on_the_path(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a benchmark"),
        (["curation/qualty"], "no benchmark curation/qualty"),
        (["curation/quality", "--parts", "recal"], "has no part recal"),
        (["all", "--parts", "recall"], "name it alone"),
    ],
)
def test_what_does_not_exist_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_benchmark_without_its_data_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INFLUENCESPACE_DATA", str(tmp_path))
    assert main(["curation/quality", "--out", str(tmp_path / "out")]) == 0
    assert "skipped" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def benchmark_of(work: Any) -> Benchmark:
    benchmark = Benchmark()
    benchmark.part(first)
    benchmark.parts["second"] = work
    return benchmark


def first(bench: Bench) -> None:
    bench.row(value=0.5)
    bench.target("enough", at_least(1), 0.5)
    bench.target("nothing", at_least(1), None)


def measure(path: Path, work: Any, parts: tuple[str, ...]) -> dict[str, Any]:
    results = Results(path, "speed/towers", False, (0, 1))
    run_parts(results, benchmark_of(work), parts, path.parent / "cache", None)
    written: dict[str, Any] = json.loads(path.read_text())
    return written


def test_parts_are_kept_until_they_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "towers.json"
    written = measure(path, lambda bench: bench.row(value=1), ("first", "second"))
    assert written["incomplete"] == []
    assert [row["part"] for row in written["table"]] == ["first", "second"]
    assert [target["status"] for target in written["targets"]] == ["fails", "fails"]
    assert all(len(written["code"][part]) == 32 for part in ("first", "second"))

    def interrupted(bench: Bench) -> None:
        bench.row(value=2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(path, interrupted, ("second",))
    assert json.loads(path.read_text()) == written

    def cut(bench: Bench) -> None:
        bench.row(value=3)
        raise OutOfTimeError

    again = measure(path, cut, ("second",))
    assert again["incomplete"] == ["second"]
    assert [row["value"] for row in again["table"]] == [0.5, 3]


def test_what_was_withdrawn_is_there_again_once_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "towers.json"
    written = measure(path, lambda bench: bench.row(value=1), ("first", "second"))
    path.write_text(json.dumps(written | {"withdrawn": {"first": "why", "second": "why"}}))
    again = measure(path, lambda bench: bench.row(value=1), ("second",))
    assert again["withdrawn"] == {"first": "why"}


def test_another_kind_of_run_does_not_mix_with_the_first(tmp_path: Path) -> None:
    measure(tmp_path / "towers.json", first, ("first",))
    assert Results(tmp_path / "towers.json", "speed/towers", True, (0, 1)).kept == {}
    assert Results(tmp_path / "towers.json", "speed/towers", False, (0,)).kept == {}


def test_an_interrupt_ends_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bench: Bench) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load", lambda name: benchmark_of(interrupted))
    monkeypatch.setattr(run, "NAMES", ("speed/towers",))
    assert main(["speed/towers", "--out", str(tmp_path)]) == 130
    assert json.loads((tmp_path / "towers.json").read_text())["incomplete"] == ["second"]


@pytest.mark.parametrize(
    ("wanted", "passes", "fails"),
    [
        (at_least(1), (1.0, (0, 2)), (0.9, (0, 2))),
        (at_most(1), (1.0, (0, 2)), (1.1, (0, 2))),
        (above(1), (1.1, (0, 2)), (1.0, (0, 2))),
        (between(0, 1), (1.0, (0, 2)), (1.1, (0, 2))),
        (within(0.1, 1), (0.95, (0, 2)), (1.2, (0, 2))),
        (significantly_above(0), (0.1, (0.05, 0.2)), (0.1, (0.0, 0.2))),
        (significantly_below(0), (-0.1, (-0.2, -0.05)), (-0.1, (-0.2, 0.0))),
        (not_significantly_below(0), (-0.1, (-0.2, 0.0)), (-0.1, (-0.2, -0.05))),
    ],
)
def test_a_promise_passes_by_what_it_says(wanted: Wanted, passes: Any, fails: Any) -> None:
    assert wanted.holds(*passes)
    assert not wanted.holds(*fails)
