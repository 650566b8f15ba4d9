"""The lock of a folder in a store: one process at a time, whatever became of the others."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from influencespace.data import store_lock
from influencespace.data.locations import LOCK, alone_in, folder_of
from influencespace.data.mirror import exists, here
from influencespace.errors import InputError

ENTER = """
import sys, time
from influencespace.data.locations import alone_in, folder_of
from influencespace.errors import InputError
print("ready", flush=True)
sys.stdin.readline()
try:
    with alone_in(folder_of({url!r}, "--out")):
        print("in", flush=True)
        sys.stdin.readline()
except InputError as error:
    print(error, flush=True)
"""


class Process:
    """Another process that enters the folder at `url` when told to."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENTER.format(url=url)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.says() == "ready"

    def says(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self._process.communicate("\n", timeout=60)


@pytest.fixture(params=["memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "s3":
        return folder_of(f"{request.getfixturevalue('bucket')}/run", "--out")
    monkeypatch.setenv("INFLUENCESPACE_MIRROR", str(tmp_path))
    return folder_of(f"memory://{tmp_path.name}/run", "--out")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "BEAT", 0.1)
    monkeypatch.setattr(store_lock, "POLL", 0.05)
    monkeypatch.setattr(store_lock, "PATIENCE", 0.5)


STRANGER = {
    "token": "t",
    "pid": 123,
    "host": "elsewhere",
    "machine": "another",
    "started": "1",
    "since": "noon",
    "beat": 0,
}


def test_a_folder_is_held_and_free_again(folder: Path) -> None:
    with alone_in(folder):
        with alone_in(folder):  # the process itself may enter again
            pass
        assert exists(folder / LOCK)
    assert not exists(folder / LOCK)
    with pytest.raises(KeyboardInterrupt), alone_in(folder):
        raise KeyboardInterrupt
    assert not exists(folder / LOCK)


def test_of_two_processes_at_once_exactly_one_gets_in(bucket: str) -> None:
    for attempt in range(3):
        both = [Process(f"{bucket}/run-{attempt}") for _ in range(2)]
        for one in both:
            one.tell()
        answers = [one.says() for one in both]
        assert sorted(answer == "in" for answer in answers) == [False, True], answers
        assert any(
            f"another command is working in {bucket}/run-{attempt} (process" in answer for answer in answers
        )
        for one in both:
            one.end()


def test_a_process_that_was_killed_here_holds_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = Process(f"{bucket}/run")
    killed.tell()
    assert killed.says() == "in"
    folder = folder_of(f"{bucket}/run", "--out")
    with (
        pytest.raises(
            InputError, match=r"another command is working in s3://.*/run \(process \d+ on .* since 20"
        ),
        alone_in(folder),
    ):
        pass
    killed.kill()
    monkeypatch.setattr(store_lock, "PATIENCE", float("inf"))
    with alone_in(folder):
        assert json.loads(here(folder / LOCK).read_bytes())["pid"] == os.getpid()


@pytest.mark.usefixtures("quick")
def test_a_lock_without_a_sign_of_life_is_taken_over(folder: Path) -> None:
    assert store_lock.put_if(folder / LOCK, STRANGER, None)
    with alone_in(folder):
        assert json.loads(here(folder / LOCK).read_bytes())["host"] != "elsewhere"
    assert not exists(folder / LOCK)


@pytest.mark.usefixtures("quick")
def test_a_lock_that_is_written_anew_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "PATIENCE", float("inf"))
    ended = threading.Event()
    tag = store_lock.put_if(folder / LOCK, STRANGER, None)

    def beat() -> None:
        nonlocal tag
        number = 0
        while not ended.wait(0.1):
            number += 1
            tag = store_lock.put_if(folder / LOCK, STRANGER | {"beat": number}, tag)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match="process 123 on elsewhere since noon"), alone_in(folder):
            pass
    finally:
        ended.set()
        thread.join()
    assert tag is not None  # the refused one did not touch it


@pytest.fixture
def hears_interrupts() -> Iterator[None]:
    """As in a terminal: what starts the tests, or another test, may have made their process deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("quick", "hears_interrupts")
def test_who_has_lost_the_lock_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lose_it() -> None:
        with alone_in(folder):
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                tag, owner = store_lock._read(folder / LOCK)
                if (
                    owner != STRANGER
                ):  # a beat between may have written it anew, and the simulated store may let both write
                    store_lock.put_if(folder / LOCK, STRANGER, tag)
                time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        lose_it()
    assert "was taken over by another command" in capsys.readouterr().err
    assert json.loads(here(folder / LOCK).read_bytes()) == STRANGER  # it is not ours to remove


@pytest.mark.parametrize("tag", [None, "old"])
def test_only_one_of_two_conditional_writings_counts(folder: Path, tag: Any) -> None:
    path = folder / LOCK
    first = store_lock.put_if(path, STRANGER | {"token": "0"}, None)
    if tag:
        tag, first = first, store_lock.put_if(path, STRANGER | {"token": "1"}, first)
    assert first
    assert store_lock.put_if(path, STRANGER | {"token": "2"}, tag) is None
    assert store_lock.put_if(path, json.loads(here(path).read_bytes()), tag) == first  # the answer was lost
    assert store_lock.put_if(path, STRANGER | {"token": "3"}, first)


def test_a_bucket_that_is_missing_is_named(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLUENCESPACE_MIRROR", str(tmp_path))
    folder = folder_of("s3://there-is-no-such-bucket/run", "--out")
    with (
        pytest.raises(InputError, match="s3://there-is-no-such-bucket/run: there is no such bucket"),
        alone_in(folder),
    ):
        pass
