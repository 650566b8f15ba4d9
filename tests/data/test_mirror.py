"""Folders in object stores: what one machine writes another reads, and a kill at any moment leaves nothing half done."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influencespace.data import mirror, stores
from influencespace.data.artifacts import (
    MANIFEST,
    Manifest,
    atomic_path,
    folder_digest,
    read_manifest,
    remove,
    rename,
    write_json,
    write_manifest,
)
from influencespace.data.buckets import BUCKETS, remove_work
from influencespace.data.integrity import artifact_files, cheap_faults, describe, is_done
from influencespace.data.locations import alone_in, folder_of
from influencespace.data.mirror import (
    exists,
    files_below,
    here,
    is_file,
    is_folder,
    listing,
    shown,
    size_of,
    url_of,
)
from influencespace.errors import InputError

Machine = Callable[[str], Path]


@pytest.fixture(params=["memory", "s3"])
def machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives the run folder as the machine of a name sees it: each has a mirror of its own."""
    if request.param == "s3":
        url = f"{request.getfixturevalue('bucket')}/deep/run"
    else:
        url = f"memory://{tmp_path.name}/run"

    def folder(name: str) -> Path:
        monkeypatch.setenv("INFLUENCESPACE_MIRROR", str(tmp_path / name))
        return folder_of(url, "--out")

    return folder


def write(path: Path, text: str) -> None:
    with atomic_path(path) as aside:
        aside.write_text(text)


def test_a_copy_knows_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLUENCESPACE_MIRROR", str(tmp_path))
    path = folder_of("memory://bucket/a run/of mine/", "--out")
    assert tmp_path in path.parents
    assert url_of(path / "x.json") == "memory://bucket/a run/of mine/x.json"
    assert path == folder_of(Path("memory://bucket/a run/of mine"), "--out")
    assert shown(f"error: {path / 'x'} is damaged; see {tmp_path}/y") == (
        f"error: memory://bucket/a run/of mine/x is damaged; see {tmp_path}/y"
    )


def test_what_one_machine_writes_another_reads(machine: Machine) -> None:
    a, b = machine("a"), machine("b")
    write(a / "deep" / "x.txt", "first")
    assert not (b / "deep").exists()
    assert is_file(b / "deep" / "x.txt")
    assert is_folder(b / "deep")
    assert size_of(b / "deep" / "x.txt") == 5
    assert not (b / "deep").exists()  # to ask is not to fetch
    assert here(b / "deep" / "x.txt").read_text() == "first"


def test_a_copy_is_fetched_again_only_where_its_object_has_changed(machine: Machine) -> None:
    a, b = machine("a") / "x.txt", machine("b") / "x.txt"
    write(a, "first")
    before = here(b).stat()
    assert here(b).stat() == before
    assert here(a).stat().st_mtime_ns == before.st_mtime_ns  # of the same version
    write(a, "other")  # as long as the first
    assert here(b).read_text() == "other"
    b.write_text("wrong")  # by somebody else
    assert here(b).read_text() == "other"


def test_what_the_store_does_not_hold_is_not_there(machine: Machine) -> None:
    a, b = machine("a"), machine("b")
    write(a / "folder" / "x.txt", "text")
    here(b / "folder" / "x.txt")
    remove(a / "folder")
    assert (b / "folder" / "x.txt").exists()  # the copy of another machine stays, and is not believed
    for path in (a / "folder" / "x.txt", b / "folder" / "x.txt"):
        assert not exists(path)
        with pytest.raises(FileNotFoundError):
            here(path)
        with pytest.raises(FileNotFoundError):
            size_of(path)
    assert not is_folder(b / "folder")
    assert files_below(b) == listing(b) == []


def test_folders_list_what_the_store_holds(machine: Machine) -> None:
    a, b = machine("a"), machine("b")
    for name in ("x.txt", ".hidden", "one/y.txt", "one/two/z.txt", "oneself/w.txt"):
        write(a / name, name)
    (b / "left.txt").parent.mkdir(parents=True)
    (b / "left.txt").touch()
    assert listing(b) == [b / ".hidden", b / "one", b / "oneself", b / "x.txt"]
    assert listing(b, "*.txt") == [b / "x.txt"]
    assert listing(b, ".*") == [b / ".hidden"]
    assert files_below(b / "one") == [b / "one" / "two" / "z.txt", b / "one" / "y.txt"]
    assert folder_digest(a / "one") == folder_digest(b / "one")
    remove(b / "one")
    assert listing(a) == [a / ".hidden", a / "oneself", a / "x.txt"]
    remove(b / "x.txt")
    remove(b / "x.txt")  # or nothing
    assert listing(a, "*.txt") == []


def test_a_writer_that_fails_leaves_nothing(machine: Machine) -> None:
    path = machine("a") / "x.txt"

    def fail() -> None:
        with atomic_path(path) as aside:
            aside.write_text("half")
            raise OSError("no")

    with pytest.raises(OSError, match="no"):
        fail()
    assert not exists(path)
    assert list(path.parent.iterdir()) == []


def finished(folder: Path, content: str = "content") -> Manifest:
    """A small artifact, written as a stage does."""
    write(folder / "x.txt", content)
    write(folder / "deep" / "y.txt", content)
    files = {name: describe(folder / name) for name in artifact_files(folder)}
    assert sorted(files) == ["deep/y.txt", "x.txt"]
    manifest = Manifest(stage="stage", fingerprint=content, files=files)
    write_manifest(folder, manifest)
    return manifest


def test_an_artifact_is_whole_on_every_machine(machine: Machine) -> None:
    a, b = machine("a") / "stage", machine("b") / "stage"
    manifest = finished(a)
    assert read_manifest(b) == manifest
    assert is_done(b, "content")
    write(a / "x.txt", "altered")
    assert [fault.what for fault in cheap_faults(b, manifest)] == ["was changed after it was written"]
    remove(a / "x.txt")
    assert [fault.what for fault in cheap_faults(b, manifest)] == ["is missing"]


def test_large_files_are_checked_by_one_list(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = machine("a") / "stage", machine("b") / "stage"
    manifest = finished(a)
    monkeypatch.setattr("influencespace.data.integrity.CHEAP", 0)
    assert cheap_faults(b, manifest) == []
    assert files_here(b) == []  # nothing was fetched
    write(a / "x.txt", "longer than it was")
    assert [fault.what for fault in cheap_faults(b, manifest)] == ["has 18 bytes, not 7"]


def files_here(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_work_is_removed_and_the_artifact_stays(machine: Machine) -> None:
    a, b = machine("a") / "stage", machine("b") / "stage"
    finished(a)
    for name in (f"{BUCKETS}/x.arrow", ".run.arrow", ".ray/deep/x"):
        write(a / name, "work")
    here(b / ".run.arrow")
    remove_work(b)
    assert {path.relative_to(a).as_posix() for path in files_below(a)} == {MANIFEST, "x.txt", "deep/y.txt"}
    assert files_here(b) == []


def test_a_renamed_folder_is_not_fetched_again(machine: Machine) -> None:
    old, new = machine("a") / ".stage-1", machine("a") / "stage"
    finished(old)
    before = {path.name: path.stat().st_ino for path in files_here(old)}
    rename(old, new)
    assert not exists(old)
    assert is_done(new, "content")
    assert {path.name: path.stat().st_ino for path in files_here(new)} == before


class Killed(BaseException):
    """The end of a process, which nothing answers."""


@pytest.mark.parametrize("action", ["rename", "remove"])
def test_a_kill_after_any_request_leaves_no_half_of_an_artifact(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """What has a manifest has all its files; and the same again ends well, on a machine with an empty mirror."""
    ask, left = mirror.ask, 0

    def counted(path: Path, request: Any) -> Any:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return ask(path, request)

    def act(name: str) -> None:
        root = machine(name)
        remove(root / "stage") if action == "remove" else rename(root / ".work", root / "stage")

    for requests in range(1, 100):
        root = machine("a")
        finished(root / ("stage" if action == "remove" else ".work"))
        monkeypatch.setattr(mirror, "ask", counted)
        left = requests
        try:
            act("a")
            ended = True
        except Killed:
            ended = False
        monkeypatch.setattr(mirror, "ask", ask)
        for folder in (machine("b") / "stage", machine("b") / ".work"):
            assert read_manifest(folder) is None or is_done(folder, "content")
        if action == "rename":
            assert any(is_done(machine("b") / name, "content") for name in ("stage", ".work"))
        if ended:
            break
        if action == "remove" or is_done(machine("b") / ".work", "content"):
            act("b")
        assert (read_manifest(machine("a") / "stage") is None) is (action == "remove")
        for name in ("stage", ".work"):
            remove(machine("a") / name)
    assert ended
    assert requests > 3


def test_a_kill_between_store_and_copy_is_no_loss(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = machine("a") / "x.txt"
    write(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        write(path, "new")
    monkeypatch.undo()
    assert here(path).read_text() == "new"


def test_plain_paths_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "ask", None)
    write(tmp_path / "stage" / "x.txt", "text")
    assert here(tmp_path / "stage" / "x.txt") == tmp_path / "stage" / "x.txt"
    assert here(tmp_path / "none") == tmp_path / "none"
    assert listing(tmp_path, "st*") == [tmp_path / "stage"]
    assert files_below(tmp_path) == [tmp_path / "stage" / "x.txt"]
    rename(tmp_path / "stage", tmp_path / "other")
    remove(tmp_path / "other" / "x.txt")
    assert exists(tmp_path / "other")
    assert not exists(tmp_path / "stage")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BACK_OFF", (0.0,) * 3)
    monkeypatch.setattr(stores, "RETRIED", type(stores.RETRIED)())


@pytest.mark.usefixtures("at_once")
def test_a_busy_store_is_asked_again_and_that_is_counted() -> None:
    answers = iter([OSError(errno.EBUSY, "SlowDown"), TimeoutError(), None])

    def request(store: Any, url: str) -> str:
        if (error := next(answers)) is not None:
            raise error
        return "answer"

    assert stores.ask("memory://x/y", request) == "answer"
    assert stores.RETRIED == {"OSError": 1, "TimeoutError": 1}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("error", "kind", "text", "tries"),
    [
        (OSError(errno.EBUSY, "Please reduce"), ConnectionError, "memory://x/y: .*Please reduce", 4),
        (PermissionError("Access Denied"), InputError, r"not allowed \(Access Denied\)", 1),
        (type("NoCredentialsError", (Exception,), {})(), InputError, "no credentials were found", 1),
        (FileNotFoundError("gone"), FileNotFoundError, "gone", 1),
        (OSError(errno.ENOSPC, "full"), OSError, "full", 1),
        (ZeroDivisionError("a fault of ours"), ZeroDivisionError, "a fault of ours", 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_a_store_are_for_people(
    error: Exception, kind: type[Exception], text: str, tries: int
) -> None:
    asked = 0

    def request(store: Any, url: str) -> None:
        nonlocal asked
        asked += 1
        raise error

    with pytest.raises(kind, match=text):
        stores.ask("memory://x/y", request)
    assert asked == tries


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str, **_: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    stores.filesystem.cache_clear()
    monkeypatch.setattr(stores.fsspec, "filesystem", missing)
    with pytest.raises(InputError, match=r"pip install 'influencespace\[s3\]'"):
        folder_of("s3://bucket/run", "--out")


def test_throttled_requests_of_s3_end_well_and_are_counted(
    s3: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRIED", type(stores.RETRIED)())
    folder = folder_of(f"{bucket}/run", "--out")
    s3.every, before = 3, s3.refused
    try:
        for number in range(6):
            write_json(folder / f"{number}.json", number)
        shutil.rmtree(tmp_path / "machine")
        assert [here(path).read_text() for path in listing(folder)] == [f"{number}\n" for number in range(6)]
    finally:
        s3.every = 0
    assert s3.refused > before
    assert stores.RETRIED["SlowDown"] >= s3.refused - before


def test_secrets_stay_in_the_environment(s3: Any, bucket: str, tmp_path: Path) -> None:
    folder = folder_of(f"{bucket}/run", "--out")
    with alone_in(folder):
        finished(folder)
        written = b"".join(here(path).read_bytes() for path in files_below(folder))
    assert b'"token"' in written  # that of the lock
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in written
