"""A run whose data and folder lie in an object store: the same results, whatever machine works and whatever fails meanwhile."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import begun, command_line, run_arguments, run_here

from influencespace.data.artifacts import copy_file, file_digest, read_manifest
from influencespace.data.integrity import is_done
from influencespace.data.locations import folder_of
from influencespace.data.mirror import files_below, here, is_file, listing
from influencespace.data.stores import filesystem
from influencespace.stages.ingest.shards import ROLES
from tests.object_store import forget_between_tasks

pytestmark = pytest.mark.e2e


@pytest.fixture
def shards(bucket: str, world: Path) -> str:
    """The URL of the small world's data."""
    for role in ROLES:
        filesystem("s3").put(f"{world / role}/", f"{bucket}/world/{role}/", recursive=True)
    return f"{bucket}/world"


@pytest.fixture
def storage(s3: Any, environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of commands that work in the store."""
    return environment | s3.environment | {"INFLUENCESPACE_MIRROR": str(tmp_path / "machine")}


def arguments_of(world: Path, shards: str, out: str) -> list[str]:
    """The command that curates the small world's data there into a folder there."""
    arguments = [str(argument) for argument in run_arguments(world, Path("OUT"))]
    roles = {str(world / role): f"{shards}/{role}" for role in ROLES}
    return [{"OUT": out}.get(one, roles.get(one, one)) for one in arguments]


def done(arguments: list[str], environment: dict[str, str]) -> str:
    """What a command printed that ended well."""
    ended = subprocess.run(
        command_line(*arguments), env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def curated(url: str) -> str:
    return file_digest(folder_of(url, "RUN") / "curated.parquet")


@pytest.fixture(scope="module")
def by_loop(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job on this machine alone."""
    out = tmp_path_factory.mktemp("loop") / "run"
    run_here(world, out)
    return out


def stages_of(run: Path) -> dict[str, str]:
    """The content of every finished stage."""
    manifests = [
        path.parent for path in files_below(run) if path.name == "manifest.json" and path.parent != run
    ]
    found = {folder.relative_to(run).as_posix(): read_manifest(folder) for folder in manifests}
    return {name: manifest.content for name, manifest in found.items() if manifest is not None}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every task is done as if on a machine of its own: what lies here is gone when one begins."""
    return forget_between_tasks(tmp_path / "machine", monkeypatch)


def test_a_task_needs_nothing_that_another_left_on_its_machine(
    world: Path, bucket: str, by_loop: Path, tasks: list[str]
) -> None:
    run_here(world, folder_of(f"{bucket}/run", "--out"))
    assert len(tasks) > 20
    run = folder_of(f"{bucket}/run", "RUN")
    assert curated(f"{bucket}/run") == file_digest(by_loop / "curated.parquet")
    stages = stages_of(run)
    assert stages == stages_of(by_loop)
    for name in stages:
        manifest = read_manifest(run / name)
        assert manifest is not None
        assert is_done(run / name, manifest.fingerprint)
    left = {path.relative_to(run).as_posix() for path in files_below(run)}
    assert left == {path.relative_to(by_loop).as_posix() for path in files_below(by_loop)} - {".lock"}


def test_a_busy_store_changes_no_result(world: Path, s3: Any, bucket: str, by_loop: Path) -> None:
    s3.every, before = 31, s3.refused
    try:
        run_here(world, folder_of(f"{bucket}/run", "--out"))
    finally:
        s3.every = 0
    assert s3.refused - before > 10
    assert curated(f"{bucket}/run") == file_digest(by_loop / "curated.parquet")


@pytest.mark.slow
def test_commands_work_on_a_run_in_a_store(
    world: Path, shards: str, bucket: str, finished: Path, storage: dict[str, str], tmp_path: Path
) -> None:
    """Data, run folder and export; the commands afterwards on another machine."""
    out = f"{bucket}/runs/mine"
    printed = done(arguments_of(world, shards, out), storage)
    assert f"{out}/report.html" in printed
    assert "influencespace-mirror" not in printed
    assert curated(out) == file_digest(finished / "curated.parquet")
    elsewhere = storage | {"INFLUENCESPACE_MIRROR": str(tmp_path / "elsewhere")}
    assert f"{out}/report.html" in done(["show", out], elsewhere)
    assert f"{out}: every file is as it was written" in done(["verify", out], elsewhere)
    export = ["export", out, "--to", "webdataset", "--out", f"{bucket}/export", "--shard-size", "100"]
    assert f"pairs written to {bucket}/export" in done(export, elsewhere)
    tars = listing(folder_of(f"{bucket}/export", "--out"), "*.tar")
    assert len(tars) > 1
    assert done(export, storage)  # there already
    again = [str(tmp_path / "local") if one == f"{bucket}/export" else one for one in export]
    done(again, storage)
    assert [file_digest(path) for path in tars] == [
        file_digest(path) for path in listing(tmp_path / "local", "*.tar")
    ]
    assert f"{out}/detect/" in done(["detect", out], elsewhere)
    assert is_file(folder_of(out, "RUN") / "detect" / "pooled" / "detect.json")
    text = b"".join(
        here(path).read_bytes()
        for path in files_below(folder_of(out, "RUN"))
        if path.suffix in (".json", ".yaml", ".html")
    )
    assert storage["AWS_SECRET_ACCESS_KEY"].encode() not in text
    assert b"influencespace-mirror" not in text


@pytest.mark.slow
def test_what_is_damaged_in_a_store_is_made_again(
    world: Path, bucket: str, by_loop: Path, storage: dict[str, str]
) -> None:
    out = f"{bucket}/run"
    run = folder_of(out, "--out")
    run_here(world, run)
    filesystem("s3").pipe_file(f"{out}/selection/curated.parquet", b"damaged")
    verify = subprocess.run(
        command_line("verify", out), env=storage, capture_output=True, text=True, timeout=300, check=False
    )
    assert verify.returncode == 1
    assert f"{out}/selection/curated.parquet has 7 bytes" in verify.stdout
    done(["repair", out], storage)
    assert file_digest(run / "selection" / "curated.parquet") == file_digest(by_loop / "curated.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["embed/pool", "proxies", "selection"])
def test_a_killed_run_is_finished_by_another_machine_and_a_second_one_is_refused(
    world: Path, shards: str, bucket: str, finished: Path, storage: dict[str, str], tmp_path: Path, stage: str
) -> None:
    out = f"{bucket}/run"
    arguments = arguments_of(world, shards, out)
    folder = folder_of(out, "RUN") / stage
    elsewhere = storage | {"INFLUENCESPACE_MIRROR": str(tmp_path / "elsewhere")}
    with begun(arguments, storage) as driver:
        deadline = time.monotonic() + 400
        while not listing(folder.parent, f".{folder.name}-*"):
            assert driver.poll() is None, driver.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(
            command_line(*arguments), env=elsewhere, capture_output=True, text=True, timeout=300, check=False
        )
        assert second.returncode == 2
        assert f"another command is working in {out} (process {driver.pid} on " in second.stderr
        assert driver.poll() is None
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not is_file(folder_of(out, "RUN") / "curated.parquet")
    done(arguments, elsewhere)
    assert curated(out) == file_digest(finished / "curated.parquet")
    assert not listing(folder_of(out, "RUN"), ".*")


@pytest.mark.slow
def test_a_sweep_searches_a_run_in_a_store(
    world: Path, bucket: str, by_loop: Path, storage: dict[str, str]
) -> None:
    """Ray Tune keeps its state there as well, and none of it is left."""
    out = f"{bucket}/run"
    run = folder_of(out, "--out")
    for path in files_below(by_loop):
        copy_file(path, run / path.relative_to(by_loop))
    arguments = [str(one) for one in run_arguments(world, Path("OUT"))][1:]
    arguments[arguments.index("OUT")] = out
    assert f"use it: influencespace run {out}/sweep/best.yaml" in done(
        ["sweep", *arguments, "--trials", "2"], storage
    )
    names = {path.relative_to(run / "sweep").as_posix() for path in files_below(run / "sweep")}
    assert {name for name in names if not name.startswith("trial")} == {"manifest.json", "best.yaml"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials were found"),
        ({"AWS_PROFILE": "nobody"}, "Is the URL, the profile or AWS_ENDPOINT_URL mistyped?"),
        ({}, "there is no such bucket"),
    ],
    ids=["credentials", "profile", "bucket"],
)
def test_what_a_store_refuses_is_one_line(
    storage: dict[str, str], changed: dict[str, str], said: str, world: Path
) -> None:
    environment = {name: value for name, value in (storage | changed).items() if value}
    arguments = [
        "run",
        "--data",
        str(world / "pool"),
        "--encoder",
        str(world / "encoder"),
        "--out",
        "s3://nobody-s/run",
    ]
    ended = subprocess.run(
        command_line(*arguments), env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert said in ended.stderr.splitlines()[-1]
