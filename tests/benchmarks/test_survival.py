"""The benchmark of survival: what it takes for equal, for an actor, and for the processes of a run."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.speed import survival
from benchmarks.speed.damage import FAULTS, targets_of
from benchmarks.speed.killing import KINDS, Command, Lost, Strike, descendants, end_all, kind_of
from influencespace.data.artifacts import MANIFEST, File, Manifest, write_manifest
from influencespace.data.integrity import describe


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with two finished stages and results."""
    folder = tmp_path / "run"
    for name in ("cluster", "embed/pool"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.bin").write_bytes(name.encode() * 10)
        files = {"a.bin": describe(folder / name / "a.bin")}
        write_manifest(folder / name, Manifest(stage=name, fingerprint="f", files=files))
    (folder / "curated.parquet").write_bytes(b"decision")
    results = {"curated.parquet": File(size=8, digest="d")}
    write_manifest(folder, Manifest(stage="results", fingerprint="f", files=results))
    return folder


@pytest.fixture(autouse=True)
def no_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(path: Path) -> File:
        return File(size=path.stat().st_size, digest=path.read_bytes().hex())

    monkeypatch.setattr(survival, "describe", plain)


def test_digests_are_of_the_files_as_they_are_now(run: Path) -> None:
    before = survival.digests(run)
    assert set(before) == {"curated.parquet", "cluster/a.bin", "embed/pool/a.bin"}
    for name in before:
        copy = shutil.copytree(run, run.with_name(name.replace("/", "-")))
        FAULTS["a bit flipped"](copy / name)
        after = survival.digests(copy)
        assert {key for key in before if before[key] != after[key]} == {name}
    shutil.rmtree(run / "cluster")
    assert set(survival.digests(run)) == {"curated.parquet", "embed/pool/a.bin"}


def test_every_file_of_every_stage_and_every_manifest_is_damaged(run: Path) -> None:
    names = {path.relative_to(run).as_posix() for path in targets_of(run)}
    of_stages = {f"{stage}/{file}" for stage in ("cluster", "embed/pool") for file in ("a.bin", MANIFEST)}
    assert names == of_stages | {MANIFEST, "curated.parquet"}


def test_moments_are_seeded_and_within_the_work() -> None:
    first, second = (survival.strikes(random.Random("7"), 100.0, 10, KINDS) for _ in range(2))
    assert first == second != survival.strikes(random.Random("8"), 100.0, 10, KINDS)
    assert all(strike.after >= 0 for strike in first)
    assert sum(strike.after for strike in first) <= 90
    assert {strike.kind for strike in first} <= set(KINDS)


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::attempt", "worker"),
        ("ray::IDLE", ""),
        ("ray::DashboardAgent", ""),
        ("ray::RuntimeEnvAgent", ""),
        ("ray::_Worker.attempt", "actor"),
        ("ray::MapWorker(ReadChunks)", "actor"),
        ("python -m influencespace.cli", ""),
    ],
)
def test_kinds_of_processes(title: str, kind: str) -> None:
    assert kind_of(title) == kind


def test_the_family_of_a_process_is_found_and_ended() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 60
        while not (family := descendants(parent.pid)) and time.monotonic() < until:
            time.sleep(0.05)
        assert len(family) == 1
        parent.kill()
        parent.wait()
        end_all(family, seconds=0.1)
        end_all(family, seconds=60)
        assert not [pid for pid in family if Path(f"/proc/{pid}/cmdline").exists() and alive(pid)]
    finally:
        parent.kill()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


class Scripted(Command):
    """A command that ends after so many strikes."""

    def __init__(self, ends_after: int) -> None:
        super().__init__((), Path())
        self.ends_after, self.events = ends_after, list[str]()

    def start(self) -> None:
        self.events.append("start")

    def work_for(self, seconds: float) -> bool:
        return self.events.count("strike") < self.ends_after

    def strike(self, kind: str) -> Lost:
        self.events.append("strike")
        return Lost(kind, kind)

    def finish(self) -> float:
        self.events.append("finish")
        return 0.0


def test_a_command_that_fails_is_begun_again_and_one_that_ends_well_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program in place of the command line: it fails at first, then writes and stays, or ends well."""
    program = tmp_path / "program.py"
    lines = (
        "import pathlib, sys, time",
        "out = pathlib.Path(sys.argv[-1])",
        "out.mkdir(exist_ok=True)",
        "begun = out / 'begun'",
        "if not begun.exists(): begun.touch(); sys.exit(1)",
        "(out / 'work').write_text(str(time.time()))",
        "time.sleep(600 if sys.argv[3] == 'stay' else 0)",
    )
    program.write_text("\n".join(lines))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.orig_argv[0]} {program} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    stays = Command(("stay",), tmp_path / "stays")
    assert stays.work_for(0.1)
    assert stays.strike("worker") == Lost("driver", "driver for worker")
    ends = Command(("end",), tmp_path / "ends")
    assert not ends.work_for(600)
    process = ends.process
    assert ends.finish() >= 0
    assert ends.process is process


@pytest.mark.parametrize(("ends_after", "met"), [(0, 0), (1, 1), (9, 3)])
def test_a_command_is_struck_until_it_has_ended(ends_after: int, met: int) -> None:
    command = Scripted(ends_after)
    lost = survival.end_of(command, [Strike(1.0, "driver")] * 3)
    assert len(lost) == met
    assert command.events[-1] == "finish"
