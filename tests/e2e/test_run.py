"""The whole job by the real command line: outputs, continuing, bad input, exports."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import STAGES, Command, command_line, run_arguments, run_here, times, trained, working_folder

from influencespace.data.artifacts import file_digest
from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import Sample

pytestmark = pytest.mark.e2e
METHODS = {"curated", "everything", "random", "clip_score", "neg_clip_loss"}


def test_a_run_leaves_subset_summary_and_page(finished: Path) -> None:
    table = pq.read_table(finished / "curated.parquet")
    assert table.column_names == ["uid", "kept", "weight", "score", "score_se", "stratum", "reason"]
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["methods"]) == METHODS
    assert summary["rows"] == {"pool": len(table), "target": 80, "test": 80}
    kept = table["kept"].to_numpy()
    assert summary["kept_fraction"] == pytest.approx(kept.mean())
    assert ((table["weight"].to_numpy() > 0) == kept).all()
    for method in summary["methods"].values():
        low, high = method["mean_recall_ci"]
        assert low <= method["mean_recall"] <= high
        assert method["steps"] == 40
    assert summary["methods"]["random"]["kept_fraction"] == pytest.approx(kept.mean())
    assert summary["methods"]["everything"]["kept_fraction"] == 1
    page = (finished / "report.html").read_text()
    assert "curated" in page
    folders = {path.parent.relative_to(finished).as_posix() for path in finished.rglob("manifest.json")}
    assert folders - {"sweep", "."} == set(
        STAGES
    )  # "." is of the results; tests share the run, and one of them sweeps over it


def test_the_same_command_again_does_nothing(influencespace: Command, world: Path, finished: Path) -> None:
    before = times(finished)
    again = influencespace(*run_arguments(world, finished))
    assert again.returncode == 0, again.stderr[-3000:]
    assert times(finished) == before


@pytest.mark.slow
def test_a_dynamic_proxy_is_trained_where_it_is_asked_for(
    influencespace: Command, world: Path, finished: Path, tmp_path: Path
) -> None:
    """In a copy of the finished run, of which only the training and what follows are done anew."""
    out = tmp_path / "dynamic"
    shutil.copytree(finished, out)
    before = times(out)
    asked = "train.methods=[curated,everything,dynamic]"
    done = influencespace(*run_arguments(world, out, asked, "train.refresh=15"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Dynamic" in done.stdout
    after = times(out)
    assert {stage for stage in STAGES if before[stage] != after[stage]} == {"train", "evaluate"}
    methods = json.loads((out / "summary.json").read_text())["methods"]
    assert set(methods) == {"curated", "everything", "dynamic"}
    assert methods["dynamic"]["kept_fraction"] == methods["curated"]["kept_fraction"] < 1
    assert methods["dynamic"]["steps"] == 40
    assert methods["dynamic"]["mean_recall"] > 0
    proxies = {name: trained(out / "train" / f"{name}-0.safetensors") for name in methods}
    assert len(set(proxies.values())) == 3
    assert proxies["curated"] == trained(finished / "train" / "curated-0.safetensors")


def test_a_changed_decision_recomputes_only_what_follows(world: Path, tmp_path: Path) -> None:
    """In this process, by the plain loop: three runs in one folder."""

    def finish(**settings: float) -> tuple[dict[str, int], str, float]:
        kept = run_here(world, tmp_path, **settings)["kept_fraction"]
        return times(tmp_path), file_digest(tmp_path / "curated.parquet"), kept

    before, digest, _ = finish()
    after, halved, kept = finish(selection__target_size=0.5)
    assert {stage for stage in STAGES if before[stage] != after[stage]} == {
        "selection",
        "rivals",
        "train",
        "evaluate",
    }
    assert kept == pytest.approx(0.5, abs=0.01)
    assert halved != digest
    assert finish()[1] == digest


@pytest.mark.parametrize("format", ["npy", "webdataset", "parquet"])
def test_exports_hold_the_kept_pairs(
    influencespace: Command, finished: Path, tmp_path: Path, format: str
) -> None:
    done = influencespace("export", finished, "--to", format, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    table = pq.read_table(finished / "curated.parquet").to_pydict()
    kept = {uid for uid, keep in zip(table["uid"], table["kept"]) if keep}
    if format == "npy":
        assert (tmp_path / "out" / "uids.npy").is_file()
        return
    found = {
        sample.uid
        for shard in list_shards(str(tmp_path / "out"))
        for sample in read_shard(shard)
        if isinstance(sample, Sample)
    }
    assert found == kept


def test_show_prints_the_table_again(influencespace: Command, finished: Path) -> None:
    done = influencespace("show", finished)
    assert done.returncode == 0
    assert "neg_clip_loss" in done.stdout or "negCLIPLoss" in done.stdout


def killed_in(stage: str, arguments: list[object], out: Path, environment: dict[str, str]) -> bool:
    """Start the run and kill -9 the driver while `stage` is at work; False where it was too quick to be caught."""
    driver = subprocess.Popen(
        command_line(*arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    manifest = out / stage / "manifest.json"
    deadline = time.monotonic() + 300
    while driver.poll() is None and time.monotonic() < deadline:
        if working_folder(out, stage) is not None and not manifest.exists():
            time.sleep(random.uniform(0, 0.1))
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            return not manifest.exists()
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    return False


def test_a_killed_run_continues_to_the_same_subset(
    influencespace: Command, environment: dict[str, str], world: Path, finished: Path, tmp_path: Path
) -> None:
    arguments = run_arguments(world, tmp_path / "killed")
    assert killed_in("proxies", arguments, tmp_path / "killed", environment)
    done = influencespace(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert file_digest(tmp_path / "killed" / "curated.parquet") == file_digest(finished / "curated.parquet")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_in_any_stage_changes_nothing(
    influencespace: Command,
    environment: dict[str, str],
    world: Path,
    finished: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    arguments = run_arguments(world, tmp_path / "killed")
    if not killed_in(stage, arguments, tmp_path / "killed", environment):
        pytest.skip(f"{stage} was too quick to be killed in")
    done = influencespace(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert file_digest(tmp_path / "killed" / "curated.parquet") == file_digest(finished / "curated.parquet")
