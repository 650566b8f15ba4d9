"""Choices from a finished run: what is cleaned away, what stands for the rest, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from influencespace.errors import InputError
from influencespace.tasks.choose import Method, clean, coreset


@pytest.fixture
def run(small_run: Path) -> Path:
    return small_run


def columns(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = pq.read_table(path).to_pydict()
    return found


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.95])
def test_the_lowest_scores_are_cleaned_away(run: Path, fraction: float) -> None:
    choice = clean(run, fraction)
    found, before = columns(choice.path), columns(run / "curated.parquet")
    assert found["uid"] == before["uid"]
    assert found.keys() == before.keys()
    kept, score = np.array(found["kept"]), np.array(found["score"])
    assert choice.chosen == kept.sum() == 150 - round(fraction * 150)
    assert choice.of == 150
    if fraction:
        assert score[kept].min() >= score[~kept].max()
    assert (np.array(found["weight"]) == kept).all()
    assert {reason for reason, keep in zip(found["reason"], found["kept"]) if not keep} <= {"lowest score"}


def test_auto_is_the_decision_of_the_run(run: Path) -> None:
    choice = clean(run, None)
    found, curated = columns(choice.path), columns(run / "curated.parquet")
    assert found.pop("weight") == [float(keep) for keep in curated["kept"]]
    assert len(set(curated.pop("weight"))) > 2  # the run's own weights follow influence
    assert found == curated
    assert choice.chosen == sum(curated["kept"])


@pytest.mark.parametrize("method", ["d2", "k_center", "herding", "diversity"])
def test_a_coreset_is_of_kept_pairs_and_a_smaller_one_is_its_prefix(run: Path, method: Method) -> None:
    curated = columns(run / "curated.parquet")
    kept = {uid for uid, keep in zip(curated["uid"], curated["kept"]) if keep}
    large, small = coreset(run, 30, method), coreset(run, 0.1, method)
    found = columns(large.path)
    assert (large.chosen, large.of, small.chosen) == (30, 150, 15)
    assert found["rank"] == list(range(1, 31))
    assert len(set(found["uid"])) == 30
    assert set(found["uid"]) <= kept
    assert columns(small.path)["uid"] == found["uid"][:15]
    of_uid = dict(zip(curated["uid"], curated["score"]))
    assert found["score"] == [of_uid[uid] for uid in found["uid"]]


def test_d2_prefers_pairs_that_help_more_than_coverage_alone_does(run: Path) -> None:
    means = {name: np.mean(columns(coreset(run, 20, name).path)["score"]) for name in ("d2", "k_center")}
    assert means["d2"] > means["k_center"]


def test_refusals(run: Path, tmp_path: Path) -> None:
    for fraction in (-0.1, 1.0, 7.0):
        with pytest.raises(InputError, match="fraction is"):
            clean(run, fraction)
    for size in (0, -3, np.inf, np.nan):
        with pytest.raises(InputError, match="give a share of the pool"):
            coreset(run, size)
    for size in (0.001, 149):
        with pytest.raises(InputError, match="pairs, and the run kept"):
            coreset(run, size)
    with pytest.raises(InputError, match="holds no finished run"):
        clean(tmp_path, None)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    try:
        with pytest.raises(InputError, match="holds no finished run"):
            coreset(run, 10)
    finally:
        (run / "summary.json").write_text(json.dumps(summary))
