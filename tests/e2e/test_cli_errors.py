"""What the user has to change is one clear line on stderr and exit code 2, never a traceback."""

import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from PIL import Image

pytestmark = pytest.mark.e2e

PROGRESS = re.compile(r"^\w+: [\d,]+ of [\d,]+ \w+, ")
Command = Callable[..., subprocess.CompletedProcess[str]]


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refused command."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()  # what was done before the error has lines of progress
    assert len([line for line in lines if not PROGRESS.search(line)]) == 1, done.stderr
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A tar with one pair."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "JPEG")
    path = tmp_path / "shards" / "0000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in (("0.jpg", picture.getvalue()), ("0.txt", b"a red square")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A language model: no dual encoder."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=8, **sizes))
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_wrong_path_is_named(refused: Command, bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.tar"
    done = refused("run", "--data", path, "--encoder", bert, "--out", tmp_path / "run")
    assert f"{path}: no such file or folder" in error_of(done)


def test_a_glob_that_finds_nothing_is_named(refused: Command, bert: Path, shard: Path) -> None:
    glob = shard.parent / "*.parquet"
    done = refused("run", "--data", glob, "--encoder", bert, "--out", shard.parent.parent / "run")
    assert f"{glob}: no .tar, .parquet, .json file there" in error_of(done)


def test_an_encoder_that_is_no_dual_encoder_is_named(refused: Command, bert: Path, shard: Path) -> None:
    done = refused("run", "--data", shard, "--encoder", bert, "--out", shard.parent / "run")
    line = error_of(done)
    assert f"encoder '{bert}' is a 'bert' model, not a dual encoder" in line
    assert "clip" in line


def test_a_config_with_a_typo_names_the_near_key(refused: Command, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: {pool: shards}\nclutser: {k: 4}\n")
    assert "did you mean cluster?" in error_of(refused("run", path, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("cluster.kk=4", "there is no cluster.kk; did you mean cluster.k?"),
        ("train.seeds=many", "train.seeds"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    refused: Command, tmp_path: Path, setting: str, reason: str
) -> None:
    done = refused("run", "--data", "x", "--set", setting, "--out", tmp_path / "run")
    assert reason in error_of(done)
    assert not (tmp_path / "run").exists()


def test_a_run_needs_data(refused: Command, tmp_path: Path) -> None:
    assert "no data was given: use --data" in error_of(refused("run", "--out", tmp_path / "run"))


def test_a_group_share_over_several_rounds_is_refused(
    refused: Command, shard: Path, bert: Path, tmp_path: Path
) -> None:
    settings = ("--set", "selection.min_group_share=0.5", "--set", "iterate=3")
    done = refused("run", "--data", shard, "--encoder", bert, "--out", tmp_path / "run", *settings)
    assert "set iterate to 1, or min_group_share to 0" in error_of(done)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--data", "x", "--encoder", "y"),
        ("demo",),
        ("sweep", "config.yaml"),
        ("export", "runs/mine", "--to", "npy"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_page_is_no_folder_to_write_into(
    refused: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = error_of(refused(*arguments, "--out", "https://host/folder"))
    reason = "the demo is small" if arguments[0] == "demo" else "no run and no export can be there"
    assert line.startswith(f"error: --out https://host/folder: {reason}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["show", "score", "clean"])
def test_a_run_is_not_looked_for_behind_a_page(refused: Command, command: str) -> None:
    assert "no run and no export can be there" in error_of(refused(command, "https://host/run"))


QUICK = """
import sys
from influencespace import cli
sys.argv = ["influencespace", *sys.argv[1:]]
try:
    cli.main()
finally:
    assert not {"torch", "ray", "transformers", "pyarrow"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["run", "--help"], 0), (["run"], 2), (["export", "x", "--to", "zip"], 2)],
)
def test_help_and_wrong_flags_import_no_library(
    environment: dict[str, str], arguments: list[str], code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUICK, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Error" not in done.stderr


def test_a_run_needs_a_folder(refused: Command) -> None:
    assert "Missing option '--out'" in error_of(refused("run", "--data", "x", "--encoder", "y"))


def test_an_unfinished_run_has_nothing_to_show_or_export(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    line = error_of(refused("show", tmp_path))
    assert f"{tmp_path} holds no finished run" in line
    assert "finished by the command that began it" in line
    done = refused("export", tmp_path, "--to", "npy", "--out", tmp_path / "out")
    assert str(tmp_path) in error_of(done)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_has_nothing_to_score_detect_or_trace(refused: Command, tmp_path: Path) -> None:
    for command in ("score", "detect"):
        assert f"{tmp_path} holds no finished run" in error_of(refused(command, tmp_path))
    assert "holds no finished run" in error_of(refused("trace", tmp_path, "--uid", "x"))


def test_an_unknown_export_format_names_the_known_ones(refused: Command, tmp_path: Path) -> None:
    line = error_of(refused("export", tmp_path, "--to", "zip", "--out", tmp_path / "out"))
    for name in ("zip", "npy", "webdataset", "parquet"):
        assert name in line


def test_the_installed_command_is_the_same(environment: dict[str, str], tmp_path: Path) -> None:
    script = shutil.which("influencespace", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("influencespace is not installed here")
    done = subprocess.run(
        [script, "show", str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert "holds no finished run" in error_of(done)
