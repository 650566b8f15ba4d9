"""A file that is not as it was written is noticed: cheap ones whenever they are read again, large ones by their size."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import FAULTS, Fault, flip

from influencespace.data import integrity
from influencespace.data.artifacts import MANIFEST, Manifest, file_digest, read_manifest, write_manifest
from influencespace.data.integrity import (
    artifact_files,
    cheap_faults,
    damage,
    describe_tasks,
    file_fault,
    is_cheap,
    is_done,
)

FILES = ("a.npy", "deep/er/b.parquet", "deep/c.bin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished folder with files below others, and what is no part of it."""
    folder = tmp_path / "stage"
    (folder / "deep" / "er").mkdir(parents=True)
    np.save(folder / "a.npy", np.arange(10))
    pq.write_table(pa.table({"row": range(7)}), folder / "deep" / "er" / "b.parquet")
    (folder / "deep" / "c.bin").write_bytes(bytes(range(256)) * 4)
    for name in (".half.tmp", "deep/.hidden", "buckets/a-0.arrow"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not of it")
    files = {name: file for task in describe_tasks(folder) for name, file in task().items()}
    write_manifest(folder, Manifest(stage="s", fingerprint="f", files=files))
    return folder


def test_files_are_described_by_size_digest_and_rows(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert sorted(manifest.files) == sorted(FILES) == sorted(artifact_files(folder))
    for name, file in manifest.files.items():
        assert file.size == (folder / name).stat().st_size
        assert file.digest == file_digest(folder / name)
        assert file.rows == (7 if name.endswith(".parquet") else None)
        assert file_fault(folder / name, file) is None


def test_large_files_are_described_alone_and_small_ones_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (together,) = describe_tasks(folder)
    monkeypatch.setattr(integrity, "CHEAP", 1)
    alone = describe_tasks(folder)
    assert [task.names for task in alone] == [(name,) for name in sorted(FILES)]
    assert {name: file for task in alone for name, file in task().items()} == together()
    assert describe_tasks(folder.parent / "nothing") == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_noticed(folder: Path, name: str, fault: Fault) -> None:
    assert is_done(folder, "f")
    assert not damage(folder, "f")
    fault(folder / name)
    assert not is_done(folder, "f")
    (found,) = damage(folder, "f")
    assert found.path == folder / name
    assert FAULTS[fault] in found.what


def test_what_cannot_be_read_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(integrity, "file_digest", broken)
    assert {fault.what for fault in damage(folder, "f")} == {"cannot be read (Input/output error)"}


@pytest.mark.parametrize("fault", FAULTS)
def test_of_large_files_the_size_is_checked_and_the_content_by_choice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    large = "deep/c.bin"
    monkeypatch.setattr(integrity, "CHEAP", sum(f.size for f in manifest.files.values()) - 1)
    assert [name for name in manifest.files if not is_cheap(manifest, name)] == [large]
    fault(folder / large)
    assert bool(cheap_faults(folder, manifest)) is (fault is not flip)
    assert file_fault(folder / large, manifest.files[large])


def test_a_folder_of_another_fingerprint_is_not_done_and_not_damaged(folder: Path) -> None:
    flip(folder / "a.npy")
    assert not is_done(folder, "g")
    assert not damage(folder, "g")
    shutil.rmtree(folder)
    assert not is_done(folder, "f")
    assert not damage(folder, "f")


def test_a_damaged_manifest_is_damage(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"rows_in": 0', '"rows_in": 1'))
    assert [str(fault) for fault in damage(folder, "f")] == [f"{path} was changed after it was written"]
    write_manifest(folder, replace(manifest, rows_in=1, rows_out=1))
    assert not damage(folder, "f")
