"""Storage faults in a finished run: every one is noticed, by the same command and by `verify`, and mended to the same files."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import FAULTS, MANIFEST_FAULTS, Fault, become_folder, copy_run, edit, flip, remove, truncate
from typer.testing import CliRunner

from influencespace import pipeline
from influencespace.cli import app
from influencespace.config import load_config
from influencespace.data import integrity
from influencespace.data.artifacts import MANIFEST, file_digest, read_manifest
from influencespace.engine.local import LocalEngine
from influencespace.errors import InputError
from influencespace.pipeline import load_run
from influencespace.tasks import verify as verifying
from influencespace.tasks.verify import Problem, advice, repair_run, verify_run

EMBEDDED = ("embed/pool", "embed/target", "embed/test")
ARTIFACTS = (*EMBEDDED, "split", *(str(stage.name) for stage in pipeline.STAGES))


@pytest.fixture(scope="module")
def source(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this module's own, lest other tests have left something in it."""
    run = copy_run(small_run, tmp_path_factory.mktemp("source") / "run")
    pipeline.curate(load_config(run / "config.yaml"), run, LocalEngine())
    return run


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    return copy_run(source, tmp_path / "run")


def digests(run: Path) -> dict[str, str]:
    """Of every file of the stages, and of the decision."""
    files = {
        f"{name}/{file}": file_digest(run / name / file)
        for name in ARTIFACTS
        for file in read_manifest(run / name).files  # type: ignore[union-attr]
    }
    return files | {"curated.parquet": file_digest(run / "curated.parquet")}


def files_of(run: Path) -> Iterator[tuple[str, str]]:
    for name in ARTIFACTS:
        manifest = read_manifest(run / name)
        assert manifest is not None
        yield from ((name, file) for file in manifest.files)


def again(run: Path) -> None:
    """The same command."""
    pipeline.curate(load_config(run / "config.yaml"), run, LocalEngine())


def repair(run: Path) -> None:
    repair_run(run, verify_run(run), LocalEngine())


def test_a_sound_run_has_no_problem(source: Path) -> None:
    assert verify_run(source) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_every_fault_of_every_file(run: Path, source: Path, fault: Fault) -> None:
    names = [*files_of(run), *(("", file) for file in ("config.yaml", *pipeline.RESULTS))]
    for artifact, file in names:
        fault(run / artifact / file)
    found = {problem.fault.path: problem for problem in verify_run(run)}
    for artifact, file in names:
        problem = found.pop(run / artifact / file)
        assert problem.artifact == artifact
        assert FAULTS[fault] in problem.fault.what
    assert not [path for path in found if path.name != "nowhere"]


@pytest.mark.parametrize("fault", [*MANIFEST_FAULTS, remove])
@pytest.mark.parametrize("name", [*ARTIFACTS, ""])
def test_verify_finds_every_fault_of_every_manifest(run: Path, name: str, fault: Fault) -> None:
    fault(run / name / MANIFEST)
    (problem,) = verify_run(run)
    assert problem.fault.path == run / name / MANIFEST
    assert problem.artifact == name


def test_verify_reads_large_files_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "CHEAP", 1)
    for artifact, file in files_of(run):
        flip(run / artifact / file)
    assert len(verify_run(run)) == len(list(files_of(run)))


@pytest.mark.parametrize("way", [again, repair])
@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_damaged_run_ends_in_the_same_files(
    run: Path, source: Path, name: str, way: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [file for artifact, file in files_of(run) if artifact == name]
    faults = [*FAULTS] if files else [edit]
    files = files or [MANIFEST]
    turn = ARTIFACTS.index(name) + len(faults) // 2 * (way is repair)
    path = run / name / files[turn % len(files)]
    faults[turn % len(faults)](path)
    way(run)
    assert digests(run) == digests(source)
    if way is again:
        assert f"{name}: done again, as {path} " in capsys.readouterr().err
    assert verify_run(run) == []


@pytest.mark.parametrize("fault", [*MANIFEST_FAULTS, remove])
def test_a_run_without_a_sound_manifest_ends_in_the_same_files(run: Path, source: Path, fault: Fault) -> None:
    fault(run / "redundancy" / MANIFEST)
    again(run)
    assert digests(run) == digests(source)
    assert verify_run(run) == []


@pytest.mark.parametrize("way", [again, repair])
def test_damaged_results_are_written_again(
    run: Path, source: Path, way: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run / "curated.parquet")
    truncate(run / "summary.json")
    remove(run / "report.html")
    way(run)
    assert digests(run) == digests(source)
    assert json.loads((run / "summary.json").read_text())["kept_fraction"]
    assert verify_run(run) == []
    if way is again:
        assert f"results: written again, as {run / 'curated.parquet'} was changed" in capsys.readouterr().err


def test_results_that_changed_are_not_read(run: Path) -> None:
    """A number edited in the summary, a byte of the decision: neither is shown, nor exported."""
    path = run / "summary.json"
    before = path.read_text()
    opened = load_run(run)
    path.write_text(before.replace('"kept_fraction": 0.8', '"kept_fraction": 0.9'))
    with pytest.raises(
        InputError, match=r"summary\.json was changed .* `influencespace repair .*` makes it again"
    ):
        opened.summary()
    path.write_text(before)
    flip(run / "curated.parquet")
    with pytest.raises(InputError, match=r"curated\.parquet was changed"):
        opened.curated()
    flip(run / "report.html")
    with pytest.raises(InputError, match=r"report\.html was changed"):
        opened.report()


def test_a_run_with_a_damaged_pool_is_not_opened(run: Path) -> None:
    path = next(run / name / file for name, file in files_of(run) if name == "embed/pool")
    flip(path)
    with pytest.raises(InputError, match=r"was changed .* `influencespace repair .*` makes it again"):
        load_run(run)


def test_what_is_left_over_is_found_and_removed(run: Path, source: Path) -> None:
    left = [
        run / ".curated.parquet.0123.tmp",
        run / "split" / ".x.0123.tmp",
        run / "cluster" / "x" / "stranger",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    problems = verify_run(run)
    assert {problem.fault.path for problem in problems} == set(left)
    assert {advice(run, problem) for problem in problems} == {f"`influencespace repair {run}` removes it"}
    repair(run)
    assert verify_run(run) == []
    assert digests(run) == digests(source)


def test_what_may_have_read_damage_is_made_again_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is too large to be read whole before every use may have been damaged for long."""
    monkeypatch.setattr(verifying, "is_cheap", lambda manifest, name: False)
    times = {name: (run / name / MANIFEST).stat().st_mtime_ns for name in ARTIFACTS}
    path = next(run / name / file for name, file in files_of(run) if name == "redundancy")
    flip(path)
    repair(run)
    changed = {name for name in ARTIFACTS if (run / name / MANIFEST).stat().st_mtime_ns != times[name]}
    needed = {str(stage.name): set(stage.needs) for stage in pipeline.STAGES}
    expected = {"redundancy"}
    for name, needs in needed.items():
        if needs & expected:
            expected.add(name)
    assert changed == expected


def test_a_changed_config_is_restored_from_what_the_results_record(run: Path, source: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    (problem,) = verify_run(run)
    assert problem.fault.path == path
    repair(run)
    assert path.read_bytes() == (source / "config.yaml").read_bytes()
    assert digests(run) == digests(source)


def test_rows_of_stages_are_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = read_manifest(run / "split")
    assert split is not None
    split.details["rows"]["pool"] += 1
    monkeypatch.setattr(
        verifying,
        "manifest_or_fault",
        lambda folder: split if folder.name == "split" else integrity.manifest_or_fault(folder),
    )
    assert {problem.fault.what for problem in verify_run(run)} == {
        "counts 150 pairs, and the split has 151",
        "has 150 rows, and the split has 151",
    }


def test_an_unfinished_run_is_sound_and_a_folder_is_no_run(run: Path, tmp_path: Path) -> None:
    for name in (MANIFEST, *pipeline.RESULTS):
        (run / name).unlink()
    shutil.rmtree(run / "train")
    shutil.rmtree(run / "evaluate")
    assert verify_run(run) == []
    assert not verifying.is_finished(run)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="holds no run"):
        verify_run(tmp_path / "other")


def test_what_a_command_wrote_is_removed_and_the_command_named(run: Path) -> None:
    shutil.copytree(run / "redundancy", run / "scores" / "ecif")
    path = next(path for path in (run / "scores" / "ecif").iterdir() if path.name != MANIFEST)
    flip(path)
    (problem,) = verify_run(run)
    assert advice(run, problem) == (
        f"`influencespace repair {run}` removes it, and `influencespace score` makes it again"
    )
    repair(run)
    assert not (run / "scores" / "ecif").exists()


def test_the_command_prints_a_line_for_each_fault_and_ends_with_1(run: Path) -> None:
    cli = CliRunner()
    sound = cli.invoke(app, ["verify", str(run)])
    assert sound.exit_code == 0
    assert "every file is as it was written" in sound.stdout
    edit(run / "cluster" / MANIFEST)
    remove(run / "report.html")
    found = cli.invoke(app, ["verify", str(run)])
    assert found.exit_code == 1
    assert found.stdout.splitlines() == [
        f"{run}/cluster/manifest.json was changed after it was written: `influencespace repair {run}` makes it again",
        f"{run}/report.html is missing: `influencespace repair {run}` makes it again",
    ]
    assert isinstance(cli.invoke(app, ["verify", str(run / "nowhere")]).exception, InputError)


def test_a_stage_folder_that_became_a_file_is_found(run: Path, source: Path) -> None:
    shutil.rmtree(run / "cluster")
    (run / "cluster").write_text("a file")
    assert [problem.artifact for problem in verify_run(run)] == ["cluster"]
    repair(run)
    assert digests(run) == digests(source)


def test_a_problem_says_nothing_of_what_is_sound(run: Path) -> None:
    become_folder(run / "cluster" / "clusters.parquet")
    (problem,) = verify_run(run)
    assert isinstance(problem, Problem)
    assert not problem.unread
