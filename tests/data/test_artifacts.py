"""Files appear whole or not at all; a manifest means done."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.artifacts import (
    Manifest,
    atomic_path,
    file_digest,
    fingerprint,
    folder_digest,
    is_done,
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


def test_a_manifest_reads_back_and_means_done(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"x")
    manifest = Manifest(
        stage="embed", fingerprint="f", rows_in=3, rows_out=2, rejected=1, files={"a.npy": "d"}
    )
    assert not is_done(tmp_path, "f")
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert is_done(tmp_path, "f")
    assert not is_done(tmp_path, "another config")
    (tmp_path / "a.npy").unlink()
    assert not is_done(tmp_path, "f")


def test_a_lost_row_is_an_error_and_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="3 rows in, but 1 kept and 1 rejected"):
        write_manifest(tmp_path, Manifest(stage="embed", fingerprint="f", rows_in=3, rows_out=1, rejected=1))
    assert read_manifest(tmp_path) is None


def test_a_manifest_of_another_layout_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"old": true}')
    assert read_manifest(tmp_path) is None


def test_reopening_removes_the_manifest_and_what_a_kill_left_half_written(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a", Manifest(stage="embed", fingerprint="f"))
    with atomic_path(tmp_path / "a" / "data") as killed:
        killed.touch()
    killed.write_text("half")
    (tmp_path / "a" / "data").write_text("kept")
    reopen(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["data"]
