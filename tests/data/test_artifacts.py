"""Files appear whole or not at all; a manifest means done."""

import dataclasses
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.artifacts import (
    File,
    Manifest,
    atomic_path,
    file_digest,
    fingerprint,
    folder_digest,
    manifest_or_fault,
    read_manifest,
    reopen,
    write_manifest,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_a_path_appears_whole_when_the_block_ends_well(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "a.txt") as aside:
        aside.write_text("whole")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new" / "a.txt").read_text() == "whole"


def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")

    def write_half() -> None:
        with atomic_path(tmp_path / "a.txt") as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


@given(json_values)
def test_a_fingerprint_survives_a_round_trip_through_json(value: object) -> None:
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value)))


def test_a_fingerprint_reads_dataclasses_and_paths() -> None:
    @dataclasses.dataclass
    class Config:
        path: Path
        sizes: tuple[int, ...] = (1, 2)

    assert fingerprint(Config(Path("a"))) == fingerprint({"path": "a", "sizes": [1, 2]})
    assert fingerprint(Config(Path("a"))) != fingerprint(Config(Path("b")))
    with pytest.raises(TypeError, match="no stable JSON form"):
        fingerprint(object())


def test_digests_follow_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "a").write_text("content")
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "two")
    assert file_digest(tmp_path / "one" / "deep" / "a") == file_digest(tmp_path / "two" / "deep" / "a")
    (tmp_path / "two" / ".cache").write_text("hidden")
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "two")
    (tmp_path / "two" / "b").write_text("more")
    assert folder_digest(tmp_path / "one") != folder_digest(tmp_path / "two")


def test_a_manifest_reads_back(tmp_path: Path) -> None:
    files = {"a.npy": File(size=1, digest="d"), "deep/b.parquet": File(size=2, digest="e", rows=3)}
    details: dict[str, Any] = {"nan": float("nan"), "by number": {2: "two", 10: "ten"}}
    manifest = Manifest(stage="embed", fingerprint="f", rows_in=3, rows_out=2, rejected=1, files=files)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    write_manifest(tmp_path, replace(manifest, details=details))
    read = read_manifest(tmp_path)
    assert read is not None
    assert read.details["by number"] == {"2": "two", "10": "ten"}


@given(st.data())
def test_a_number_edited_in_a_manifest_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("edited")
    files = {"a": File(size=12, digest="0" * 32)}
    write_manifest(folder, Manifest(stage="s", fingerprint="f" * 32, rows_in=7, rows_out=7, files=files))
    path = folder / "manifest.json"
    text = path.read_text()
    places = [place for place, letter in enumerate(text) if letter.isdigit()]
    place = data.draw(st.sampled_from(places))
    changed = "2" if text[place] != "2" else "3"
    path.write_text(text[:place] + changed + text[place + 1 :])
    assert manifest_or_fault(folder) == "was changed after it was written"
    assert read_manifest(folder) is None


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is not JSON"),
        (b'{"stage": "em', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is of another version"),
        (b'{"stage": "embed", "fingerprint": "f"}', "is of another version"),
    ],
)
def test_a_damaged_manifest_is_none(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert manifest_or_fault(tmp_path) == fault
    assert read_manifest(tmp_path) is None


def test_a_folder_in_the_place_of_a_manifest_is_none(tmp_path: Path) -> None:
    assert manifest_or_fault(tmp_path) == "is missing"
    (tmp_path / "manifest.json").mkdir()
    assert manifest_or_fault(tmp_path) == "is a folder, not a file"


def test_content_follows_settings_and_files_but_no_times(tmp_path: Path) -> None:
    made = Manifest(stage="s", fingerprint="f", files={"a": File(size=1, digest="d")}, seconds=1.0)
    assert made.content == replace(made, seconds=2.0, versions={"torch": "3"}).content
    assert made.content != replace(made, fingerprint="g").content
    assert made.content != replace(made, files={"a": File(size=1, digest="e")}).content
    assert made.content != replace(made, files={"b": File(size=1, digest="d")}).content


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What is synced from now on, and which files were in its folder then."""
    seen: list[tuple[str, list[str]]] = []
    sync = os.fsync

    def watched(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        folder = path if path.is_dir() else path.parent
        seen.append((path.name, sorted(file.name for file in folder.iterdir())))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="the files of a process are listed on Linux")
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, synced: list[tuple[str, list[str]]]
) -> None:
    """A machine that loses power leaves the old file or the new one, never an empty one of the new name."""
    with atomic_path(tmp_path / "a") as aside:
        aside.write_text("content")
        hidden = aside.name
    assert synced == [(hidden, [hidden]), (tmp_path.name, ["a"])]


@pytest.mark.skipif(sys.platform != "linux", reason="the files of a process are listed on Linux")
def test_a_folder_is_known_to_be_unfinished_before_its_files_are_replaced(
    tmp_path: Path, synced: list[tuple[str, list[str]]]
) -> None:
    write_manifest(tmp_path, Manifest(stage="s", fingerprint="f"))
    synced.clear()
    reopen(tmp_path)
    assert synced == [(tmp_path.name, [])]


def test_a_lost_row_is_an_error_and_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="3 rows in, but 1 kept and 1 rejected"):
        write_manifest(tmp_path, Manifest(stage="embed", fingerprint="f", rows_in=3, rows_out=1, rejected=1))
    assert read_manifest(tmp_path) is None


def test_reopening_removes_the_manifest_and_what_a_kill_left_half_written(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a", Manifest(stage="embed", fingerprint="f"))
    with atomic_path(tmp_path / "a" / "data") as killed:
        killed.touch()
    killed.write_text("half")
    (tmp_path / "a" / "data").write_text("kept")
    reopen(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["data"]
