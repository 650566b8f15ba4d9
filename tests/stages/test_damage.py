"""Files that change after a stage has finished: it is done again, to the same files, and what follows stays as it was."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from chain import BY_NAME, NAMES, Idle, beside, carry, needed, times
from faults import FAULTS, MANIFEST_FAULTS, Fault, become_folder, copy_run, flip, remove

from influencespace.data.artifacts import MANIFEST, write_manifest
from influencespace.data.integrity import damage, describe
from influencespace.errors import InputError
from influencespace.run import Run, carry_out

every_stage = pytest.mark.parametrize("name", BY_NAME)


def own_copy(truth: Run, folder: Path, name: str) -> Run:
    """A run with one stage of its own, and links to those that it needs."""
    run = beside(truth, folder, name)
    shutil.copytree(truth.at(name), run.at(name))
    return run


@every_stage
def test_every_damage_of_every_file_is_noticed(truth: Run, name: str, tmp_path: Path) -> None:
    run, manifest = own_copy(truth, tmp_path, name), truth.manifest(name)
    assert not damage(run.at(name), manifest.fingerprint)
    faults: list[tuple[str, Fault, str]] = [
        (file, fault, words) for file in manifest.files for fault, words in FAULTS.items()
    ]
    faults += [(MANIFEST, fault, words) for fault, words in MANIFEST_FAULTS.items()]
    for file, fault, words in faults:
        path = run.at(name) / file
        fault(path)
        (found,) = damage(run.at(name), manifest.fingerprint)
        assert found.path == path
        assert words in found.what
        with pytest.raises(AssertionError, match="nothing to do"):
            carry(run, name, engine=Idle())
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        shutil.copyfile(truth.at(name) / file, path)
    assert not damage(run.at(name), manifest.fingerprint)


@every_stage
def test_a_damaged_stage_is_done_again_to_the_same_files(
    truth: Run, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, manifest = own_copy(truth, tmp_path, name), truth.manifest(name)
    file = next(iter(manifest.files))
    fault = [*FAULTS][list(BY_NAME).index(name) % len(FAULTS)]
    fault(run.at(name) / file)
    assert carry(run, name).files == manifest.files
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "done again" in line]
    assert line == f"{name}: done again, as {run.at(name) / file} {line.rpartition(file)[2].strip()}"
    assert FAULTS[fault] in line
    assert carry(run, name, engine=Idle()).files == manifest.files
    assert "done again" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_a_stage_without_a_sound_manifest_is_done_again(truth: Run, fault: Fault, tmp_path: Path) -> None:
    run = own_copy(truth, tmp_path, "redundancy")
    fault(run.at("redundancy") / MANIFEST)
    assert carry(run, "redundancy").files == truth.manifest("redundancy").files


def test_a_file_in_the_place_of_the_folder_of_a_stage_is_replaced(truth: Run, tmp_path: Path) -> None:
    run = beside(truth, tmp_path, "redundancy")
    run.at("redundancy").write_text("a file")
    assert carry(run, "redundancy").files == truth.manifest("redundancy").files


def test_what_follows_a_stage_that_came_back_as_it_was_stays(truth: Run, tmp_path: Path) -> None:
    folder = copy_run(truth.folder, tmp_path / "run")
    run = beside(truth, folder)
    before = {name: times(run.at(name)) for name in NAMES}
    for file in run.manifest("proxies").files:
        flip(run.at("proxies") / file)
    remove(run.at("cluster") / next(iter(run.manifest("cluster").files)))
    carry(run)
    assert {name for name in NAMES if times(run.at(name)) != before[name]} == {"proxies", "cluster"}
    assert {name: run.manifest(name).files for name in NAMES} == {
        name: truth.manifest(name).files for name in NAMES
    }


def test_what_was_made_from_other_files_is_made_again(truth: Run, tmp_path: Path) -> None:
    """By the same settings: a stage that is done again on another machine may come out otherwise in the last digits."""
    run = own_copy(truth, tmp_path, "train")
    assert carry(run, "train", engine=Idle()) == truth.manifest("train")
    run.at("selection").unlink()  # the link
    shutil.copytree(truth.at("selection"), run.at("selection"))
    flip(run.at("selection") / "curated.parquet")
    files = {name: describe(run.at("selection") / name) for name in truth.manifest("selection").files}
    write_manifest(run.at("selection"), replace(truth.manifest("selection"), files=files))
    with pytest.raises(AssertionError, match="nothing to do"):
        carry(run, "train", engine=Idle())


def test_a_damaged_need_of_another_command_is_named_with_what_to_do(truth: Run, tmp_path: Path) -> None:
    """A command on a finished run trains nothing anew without being asked."""
    run = beside(truth, tmp_path, "scores/ecif")
    for name in needed("scores/ecif"):
        (tmp_path / name).unlink()
        shutil.copytree(truth.at(name), tmp_path / name)
    path = run.at("proxies") / "all.safetensors"
    flip(path)
    with pytest.raises(
        InputError, match=r"all\.safetensors was changed .* `influencespace repair .*` makes it again"
    ):
        carry_out(BY_NAME["scores/ecif"], run, Idle())
    become_folder(run.at("proxies") / MANIFEST)
    with pytest.raises(
        InputError, match=r"manifest\.json is a folder.* `influencespace repair .*` makes it again"
    ):
        carry_out(BY_NAME["scores/ecif"], run, Idle())


@every_stage
def test_a_whole_stage_that_is_damaged_before_it_takes_its_place_is_done_again(
    truth: Run, name: str, tmp_path: Path
) -> None:
    """No file of it counts as a finished unit of work."""
    run, folder = beside(truth, tmp_path, name), truth.at(name)
    mark = truth.manifest(name).fingerprint[:16]
    working = run.at(name).with_name(f".{folder.name}-{mark}")
    shutil.copytree(folder, working)
    for file in truth.manifest(name).files:
        flip(working / file)
    assert carry(run, name).files == truth.manifest(name).files
