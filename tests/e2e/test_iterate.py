"""Several rounds: each curates what the one before kept, the best one is taken, and no pair is lost on the way."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import run_here, trained

from influencespace import pipeline
from influencespace.data.artifacts import file_digest, read_manifest
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import LocalEngine
from influencespace.stages.selection.selection import KeptRows

pytestmark = pytest.mark.e2e
# A threshold amid the scores, and no margin, so that every round prunes some pairs.
SETTINGS = {"iterate": 3, "proxy__train__steps": 100, "selection__tau_low": 0.0, "selection__margin_se": 0.0}
FOLDERS = ("", "round-1", "round-2")


class Idle(LocalEngine):
    """An engine that is given no work but to look up which pairs a round kept."""

    def map(self, factory: Any, tasks: Any, **options: Any) -> Iterator[Any]:
        assert all(isinstance(task, KeptRows) for task in tasks)
        return super().map(factory, tasks, **options)

    def pool(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("there was nothing to do")


def run_with_losses(
    world: Path, out: Path, losses: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> dict[str, Any]:
    """A run whose rounds are made to have these target losses."""
    planned = dict(zip(("mine", "round-1", "round-2"), losses))
    monkeypatch.setattr(pipeline.Round, "target_loss", property(lambda self: planned[self.run.folder.name]))
    return run_here(world, out, **SETTINGS | settings)


@pytest.fixture(scope="module")
def rounds(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose target loss falls in each of three rounds."""
    out = tmp_path_factory.mktemp("rounds") / "mine"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_with_losses(world, out, (3.0, 2.0, 1.0), monkeypatch)
    return out


def decisions(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "curated.parquet").set_index("uid")


def test_each_round_curates_what_the_one_before_kept(rounds: Path) -> None:
    everything = [str(uid) for uid in PairSet(rounds / "embed" / "pool").column("uid")]
    left = everything
    for folder in FOLDERS:
        selection, size = rounds / folder / "selection", len(left)
        for stage in ("proxies", "cluster", "influence"):
            manifest = read_manifest(rounds / folder / stage)
            assert manifest is not None
            assert manifest.rows_out == size
        table = decisions(selection)
        assert table.index.tolist() == everything
        assert set(table.index[table["kept"]]) < set(left)
        left = table.index[table["kept"]].tolist()
        if folder != FOLDERS[-1]:
            chosen = PairSet(rounds / "embed" / "pool", rounds / folder / "kept.npy").column("uid")
            assert list(chosen) == left


def test_a_pair_keeps_the_decision_of_the_round_that_dropped_it(rounds: Path) -> None:
    tables = [decisions(rounds / folder / "selection") for folder in FOLDERS]
    for before, after in pairwise(tables):
        dropped = before.index[~before["kept"]]
        assert len(dropped)
        pd.testing.assert_frame_equal(after.loc[dropped], before.loc[dropped])
        seen = before.index[before["kept"]]
        assert (after.loc[seen, "score"] != before.loc[seen, "score"]).mean() > 0.9
    for table in tables:
        assert ((table["weight"] > 0) == table["kept"]).all()
        assert ((table["reason"] == "kept") == table["kept"]).all()
        assert table.loc[table["kept"], "weight"].mean() == pytest.approx(1, rel=1e-5)


def test_every_method_chooses_among_all_pairs_in_every_round(rounds: Path) -> None:
    for folder in FOLDERS:
        kept = decisions(rounds / folder / "selection")["kept"].to_numpy()
        weights = read_columns(rounds / folder / "rivals" / "weights.parquet")
        assert set(weights) == {"random", "clip_score", "neg_clip_loss"}
        for name, weight in weights.items():
            assert len(weight) == len(kept), name
            assert (weight > 0).sum() == kept.sum(), name


def test_the_best_round_is_taken_and_all_are_reported(
    world: Path, rounds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run_with_losses(world, rounds, (3.0, 2.0, 1.0), monkeypatch)
    assert [each["target_loss"] for each in summary["rounds"]] == [3.0, 2.0, 1.0]
    assert [Path(each["folder"]) for each in summary["rounds"]] == [rounds / folder for folder in FOLDERS]
    best = rounds / "round-2"
    assert file_digest(rounds / "curated.parquet") == file_digest(best / "selection" / "curated.parquet")
    table = decisions(rounds)
    assert len(table) == summary["rows"]["pool"]
    assert summary["reasons"] == table["reason"].value_counts().to_dict()
    shares = {name: method["kept_fraction"] for name, method in summary["methods"].items()}
    assert shares.pop("everything") == 1
    assert set(shares.values()) == {summary["kept_fraction"]} == {table["kept"].mean()}
    evaluated = read_manifest(best / "evaluate")
    assert evaluated is not None
    assert summary["methods"] == evaluated.details["methods"]


@pytest.mark.parametrize(
    ("losses", "made", "best"),
    [((1.0, 2.0), 2, ""), ((1.0, 1.0), 2, ""), ((3.0, 1.0, 2.0), 3, "round-1")],
)
def test_rounds_end_when_the_target_loss_stops_falling(
    world: Path,
    rounds: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, ...],
    made: int,
    best: str,
) -> None:
    summary = run_with_losses(world, rounds, losses, monkeypatch)
    assert len(summary["rounds"]) == made
    expected = rounds / best / "selection" / "curated.parquet"
    assert file_digest(rounds / "curated.parquet") == file_digest(expected)
    assert ("evaluate (round 3)" in summary["stages"]) == (made == 3)


def test_the_losses_are_those_of_the_curated_proxies(world: Path, rounds: Path) -> None:
    """The same run by its own losses: they fall up to the last round but one."""
    summary = run_here(world, rounds, **SETTINGS)
    losses = [each["target_loss"] for each in summary["rounds"]]
    for folder, loss in zip(FOLDERS, losses):
        evaluated = read_manifest(rounds / folder / "evaluate")
        assert evaluated is not None
        assert loss == evaluated.details["target_loss"]["curated"]
    falls = np.diff(losses) < 0
    assert falls[:-1].all()
    assert len(losses) == 3 or not falls[-1]
    best = rounds / FOLDERS[int(np.argmin(losses))] / "selection" / "curated.parquet"
    assert file_digest(rounds / "curated.parquet") == file_digest(best)


def test_a_second_call_does_nothing(world: Path, rounds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = sorted(path for path in rounds.rglob("manifest.json") if path.parent != rounds)
    before = [path.stat().st_mtime_ns for path in manifests]
    monkeypatch.setitem(run_here.__globals__, "LocalEngine", Idle)
    again = run_with_losses(world, rounds, (3.0, 2.0, 1.0), monkeypatch)
    assert len(again["rounds"]) == 3
    assert [path.stat().st_mtime_ns for path in manifests] == before


def test_dynamic_proxies_of_a_later_round_weigh_what_it_has_scored(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"iterate": 2, "train__methods": ["curated", "dynamic"], "train__refresh": 40}
    run_with_losses(world, tmp_path / "mine", (2.0, 1.0), monkeypatch, **settings)
    for folder in FOLDERS[:2]:
        train = tmp_path / "mine" / folder / "train"
        assert trained(train / "dynamic-0.safetensors") != trained(train / "curated-0.safetensors")
