"""Tables and figures from JSON: nothing of a quick run, nothing that is withdrawn."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures, render

RESULT: dict[str, Any] = {
    "benchmark": "speed/towers",
    "quick": False,
    "seeds": [0],
    "machine": {"cpus": 2},
    "incomplete": ["late"],
    "withdrawn": {"void": "judged by the wrong split"},
    "commits": {"price": "a" * 40, "void": "b" * 40},
    "code": {"price": "c" * 32},
    "targets": [
        {"part": "price", "name": "cheap", "target": "at most 2", "measured": 1.5, "interval": [1.0, 2.0]}
        | {"status": "passes"}
    ],
    "table": [
        {"part": "price", "ratio": 1.5, "route": "scoring", "size": 1},
        {"part": "price", "ratio": None, "route": "embedding", "size": 2},
    ],
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "towers.json").write_text(json.dumps(RESULT))
    return tmp_path


def page(mark: str, results: Path) -> str:
    return render.rendered(f"before\n<!-- {mark} -->\nold\n<!-- end -->\nafter\n", results)


def test_a_table_takes_the_place_of_the_old_one(results: Path) -> None:
    text = page("table: towers price", results)
    assert text.startswith("before\n<!-- table: towers price -->\n| route | ratio | size |\n")
    assert "| scoring | 1.500 | 1 |\n| embedding | - | 2 |\n" in text
    assert "price at commit aaaaaaaaaa, code cccccccccc." in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert render.rendered(text, results) == text


def test_promises_and_pivots(results: Path) -> None:
    assert "| cheap | at most 2 | 1.500 [1.000, 2.000] | passes |" in page("table: towers", results)
    assert "Not all was measured yet: late." in page("table: towers", results)
    assert "| route | 1 | 2 |\n| --- | --- | --- |\n| scoring | 1.500 | - |" in page(
        "pivot: towers route size ratio", results
    )


@pytest.mark.parametrize("mark", ["table: towers void", "pivot: towers method scenario recall"])
def test_what_is_withdrawn_is_named_and_not_shown(results: Path, mark: str) -> None:
    text = page(mark, results)
    assert "Withdrawn (void): judged by the wrong split." in text
    assert "|" not in text


def test_quick_and_missing_results_are_refused(results: Path) -> None:
    (results / "towers.json").write_text(json.dumps(RESULT | {"quick": True}))
    for name in ("towers", "missing"):
        with pytest.raises(SystemExit, match=f"{name}.json is"):
            page(f"table: {name}", results)


def test_all_marked_tables_of_the_documents_can_be_made() -> None:
    for path in (render.ROOT / "README.md", *render.DOCS.rglob("*.md")):
        assert "(no rows of part" not in render.rendered(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", ["recall", "calibration", "ablations"])
def test_figures_are_drawn_from_rows_and_not_without(name: str, tmp_path: Path) -> None:
    recall = {"part": "recall", "method": "curated", "mean_recall": 2.0, "interval": [1.0, 3.0]}
    point = {"part": "points", "truth": "sampling_weights", "estimator": "ecif", "weight": 0.5}
    setting = {"part": "k", "setting": "k", "value": "1", **dict.fromkeys(figures.SERIES, 0.5)}
    rows = [recall, point | {"predicted": [1.0, 2.0], "real": [1.0, 2.0]}, setting, setting | {"value": "2"}]
    draw = getattr(figures, name)
    assert draw({"table": [], "seeds": [0]}) is None
    path = tmp_path / "figure.svg"
    texts = []
    for _ in range(2):
        figures.save(draw({"table": rows, "seeds": [0]}), path)
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    assert texts[0].startswith("<?xml")
