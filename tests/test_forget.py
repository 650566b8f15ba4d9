"""The forget command over a small run: what it writes, what it says of unknown uids, and its refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from influencespace.cli import app
from influencespace.errors import InputError
from influencespace.pipeline import load_run
from influencespace.run import Run
from influencespace.stages.proxies.proxy import ALL, Proxy
from influencespace.tasks.forget import forget_run, read_uids


@pytest.fixture(scope="module")
def run(small_run: Path) -> Run:
    return load_run(small_run)


@pytest.fixture(scope="module")
def uids(run: Run) -> list[str]:
    uids: list[str] = run.curated()["uid"].to_pylist()
    return uids


def test_with_the_steps_of_the_training_it_is_the_retrained_proxy(run: Run, uids: list[str]) -> None:
    result = forget_run(run, uids[:8], steps=10, check=True)
    assert (result["deleted"], result["kept"], result["unknown"]) == (8, 142, 0)
    assert result["steps"] == result["steps_of_training"] == 10
    assert result["check"]["distance_to_retrained"] < 1e-3  # float32
    loss, retrained = result["loss_of_deleted"], result["check"]["loss_of_deleted_retrained"]
    assert loss["after"] == pytest.approx(retrained[0], rel=1e-4)
    assert loss["after"] > loss["before"]
    assert len(retrained) == 4


def test_what_is_written(run: Run, uids: list[str]) -> None:
    result = forget_run(run, uids[8:16])
    assert "check" not in result
    assert 1 <= result["steps"] <= result["steps_of_training"]
    paths = {name: Path(path) for name, path in result["paths"].items()}
    assert paths["forget.json"].parent.parent == run.at("forget")
    assert json.loads(paths["forget.json"].read_text()) | {"paths": result["paths"]} == result
    edited, heads = load_file(paths["proxy.safetensors"]), Proxy(run.at("proxies"), ALL).heads
    assert edited.keys() == heads.state_dict().keys()
    for name, value in heads.state_dict().items():
        assert edited[name].shape == value.shape
        assert torch.isfinite(edited[name]).all()
        assert not torch.equal(edited[name], value)
    for measured in (result["gradient_norm_on_kept"], result["loss_of_deleted"]):
        assert all(np.isfinite(value) and value > 0 for value in measured.values())


def test_more_steps_agree_better_with_half_as_many(run: Run, uids: list[str]) -> None:
    few, many = (forget_run(run, uids[:30], steps=steps) for steps in (2, 10))
    half = "distance_to_edit_of_half_the_steps"
    assert many[half] < few[half]
    assert few["doubtful"] == (few[half] > 0.5)
    assert forget_run(run, uids[:30], steps=1)["doubtful"]
    assert forget_run(run, uids[:30], steps=1)[half] is None


def test_order_and_repeats_are_irrelevant_and_a_finished_edit_is_kept(run: Run, uids: list[str]) -> None:
    first = forget_run(run, uids[20:24])
    again = forget_run(run, [*uids[20:24][::-1], uids[20]])
    assert again == first  # seconds, too: nothing was done anew
    assert forget_run(run, uids[20:25])["paths"] != first["paths"]
    assert "check" in forget_run(run, uids[20:24], check=True)


def test_unknown_uids_are_counted_and_listed(run: Run, uids: list[str]) -> None:
    result = forget_run(run, [uids[0], "nobody", "nothing"])
    assert (result["deleted"], result["unknown"], result["unknown_uids"]) == (1, 2, ["nobody", "nothing"])
    assert forget_run(run, [uids[0]])["unknown_uids"] == []


def test_uids_are_read_from_text_and_parquet(tmp_path: Path) -> None:
    text, table = tmp_path / "uids.txt", tmp_path / "uids.parquet"
    text.write_text("b\n\n a \nb\n")
    pq.write_table(pa.table({"uid": ["b", "a", "b"], "score": [1, 2, 3]}), table)
    assert read_uids(text) == read_uids(table) == ["b", "a"]


def test_refusals(run: Run, uids: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of the 1 uid\(s\) is of this run's pool \(first: nobody\)"):
        forget_run(run, ["nobody"])
    with pytest.raises(InputError, match="none given"):
        forget_run(run, [])
    with pytest.raises(InputError, match="all 150 pairs"):
        forget_run(run, uids)
    with pytest.raises(InputError, match="train a proxy on the kept pairs instead"):
        forget_run(run, uids[3:])
    with pytest.raises(InputError, match="holds no finished run"):
        forget_run(replace(run, folder=tmp_path), uids[:3])
    empty, table = tmp_path / "empty.txt", tmp_path / "other.parquet"
    empty.write_text("\n\n")
    pq.write_table(pa.table({"name": ["a"]}), table)
    for path, reason in (
        (empty, "names no pair"),
        (tmp_path / "missing.txt", "cannot be read"),
        (table, "has the columns name"),
    ):
        with pytest.raises(InputError, match=reason):
            read_uids(path)


def test_the_command(run: Run, uids: list[str], tmp_path: Path) -> None:
    file = tmp_path / "uids.txt"
    file.write_text("\n".join([*uids[40:45], "nobody"]))
    done = CliRunner().invoke(app, ["forget", str(run.folder), "--uids", str(file), "--check"])
    assert done.exit_code == 0, done.output
    assert "5 pairs forgotten, 145 kept" in done.output
    assert "unknown uids, not of this pool: 1" in done.output
    assert "distance_to_retrained: " in done.output
    assert "proxy.safetensors" in done.output
