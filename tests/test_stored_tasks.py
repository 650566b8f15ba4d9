"""What is asked of a finished run in an object store has the answers of the same run in a folder."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from influencespace.data.artifacts import copy_file, file_digest, remove
from influencespace.data.locations import folder_of
from influencespace.data.mirror import files_below, here, is_file
from influencespace.engine.local import LocalEngine
from influencespace.pipeline import load_run
from influencespace.report.page import write_report
from influencespace.run import Run
from influencespace.stages.scoring.trace import TraceConfig
from influencespace.tasks.choose import clean, coreset
from influencespace.tasks.detect import detect_run, ranking_stage
from influencespace.tasks.forget import forget_run
from influencespace.tasks.score import score_run, scoring_stage
from influencespace.tasks.trace import query_by_uid, trace_run
from influencespace.tasks.verify import verify_run
from tests.object_store import forget_between_tasks


@pytest.fixture
def runs(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Run]:
    """The small run in a folder, and in a store of which each task sees nothing yet."""
    monkeypatch.setenv("INFLUENCESPACE_MIRROR", str(tmp_path / "machine"))
    local, stored = tmp_path / "run", folder_of(f"memory://{tmp_path.name}/run", "--out")
    shutil.copytree(small_run, local, ignore=shutil.ignore_patterns(".*"))
    for path in files_below(local):
        copy_file(path, stored / path.relative_to(local))
    forget_between_tasks(tmp_path / "machine", monkeypatch)
    return load_run(local), load_run(stored)


def scored(run: Run) -> list[Path]:
    return [score_run(run, scoring_stage("grad_dot", {}), LocalEngine())[0]]


def traced(run: Run) -> list[Path]:
    query = query_by_uid(run, str(run.test.column("uid")[0]))
    config = TraceConfig(top=3, index_dimension=32)
    (scan,) = trace_run(run, [query], config, LocalEngine())
    again = [one["uid"] for one in trace_run(run, [query], config, LocalEngine(), index=True)[0]["harmful"]]
    assert len(again) == 3
    return [Path(scan["paths"]["trace.json"])]


def detected(run: Run) -> list[Path]:
    by_run = detect_run(run, None, None, LocalEngine())["paths"]
    by_other = detect_run(run, ranking_stage("norm_sim", {}), None, LocalEngine())["paths"]
    return [Path(path) for paths in (by_run, by_other) for path in paths.values()]


def chosen(run: Run) -> list[Path]:
    return [clean(run, 0.2).path, clean(run, None).path, coreset(run, 20).path]


def forgotten(run: Run) -> list[Path]:
    uids = run.curated()["uid"].to_pylist()[:4]
    return [Path(forget_run(run, uids, steps=2)["paths"]["proxy.safetensors"])]


def reported(run: Run) -> list[Path]:
    return [write_report(run.folder), run.report()]


def exported(run: Run) -> list[Path]:
    out = run.folder.with_name("export")
    run.export("npy", out / "npy")
    run.export("parquet", out / "parquet", shard_size=50)
    return [path for path in files_below(out) if path.suffix in (".parquet", ".npy")]


@pytest.mark.parametrize(
    "task", [scored, traced, detected, chosen, forgotten, reported, exported], ids=lambda task: task.__name__
)
def test_a_run_in_a_store_answers_alike(runs: tuple[Run, Run], task: Callable[[Run], list[Path]]) -> None:
    local, stored = (task(run) for run in runs)
    assert local
    assert all(is_file(path) for path in stored)  # in the store, and not only here
    assert [path.name for path in stored] == [path.name for path in local]
    assert [file_digest(path) for path in stored] == [file_digest(path) for path in local]


def test_a_run_in_a_store_is_verified(runs: tuple[Run, Run]) -> None:
    stored = runs[1].folder
    assert verify_run(stored) == []
    remove(stored / "cluster" / "clusters.parquet")
    assert [str(problem.fault) for problem in verify_run(stored)] == [
        f"{stored}/cluster/clusters.parquet is missing"
    ]
    copy = here(stored / "summary.json")
    status = copy.stat()
    copy.write_bytes(b"x" * status.st_size)  # the copy is at fault, and not the object
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(verify_run(stored)) == 1


def test_a_summary_in_a_store_is_the_run_s_own(runs: tuple[Run, Run]) -> None:
    local, stored = runs
    assert stored.summary() == local.summary()
    assert stored.curated().equals(local.curated())
    assert list(stored.curated_batches("uid")) == list(local.curated_batches("uid"))
