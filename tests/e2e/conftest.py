"""A small synthetic world, a tiny encoder, and the real command line in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from influencespace import cli, pipeline
from influencespace.config import load_config
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.engine.local import LocalEngine
from influencespace.stages.ingest.fit_encoder import FitEncoder
from influencespace.stages.ingest.shards import ROLES

# Settings under which every stage still has work to do, but little.
SMALL = (
    "proxy.train.batch_size=48",
    "proxy.train.steps=40",
    "proxy.train.dimension=32",
    "proxy.choose_steps=false",
    "proxy.folds=2",
    "proxy.negative_batches=2",
    "curvature.rank=8",
    "influence.quantiles=8",
    "influence.control_samples=60",
    "train.seeds=[0]",
)
STAGES = (*(f"embed/{role}" for role in ROLES), "split", *(stage.name for stage in pipeline.STAGES))
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def environment() -> Iterator[dict[str, str]]:
    """Ray's own files in a short temporary folder, one thread, no hub."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="is-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        settings = {
            "HOME": folder,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        yield kept | settings


@pytest.fixture(scope="session")
def influencespace(environment: dict[str, str]) -> Command:
    """Runs `influencespace ARGUMENTS` and gives the finished process."""

    def command(*arguments: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*arguments),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return command


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The same in this process, for what is refused before anything begins: a process of its own takes seconds to import."""
    monkeypatch.setattr(cli, "end_on_sigterm", lambda: None)

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        monkeypatch.setattr(sys, "argv", ["influencespace", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, ended.value.code, said.out, said.err)

    return command


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "influencespace.cli", *map(str, arguments)]


@contextmanager
def begun(arguments: Sequence[object], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The command line at work in a process group of its own, of which nothing is left after the block, however it ends."""
    driver = subprocess.Popen(
        command_line(*arguments),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that run in the background of a shell are deaf to Ctrl-C, and so would be what they start
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield driver
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pairs to curate, 80 for the target, 80 to test on; an encoder of a few steps."""
    folder = tmp_path_factory.mktemp("world")
    sizes = {"pretrain": 200, "pool": 300, "target": 80, "test": 80}
    write_world(folder, WorldConfig(seed=1, shard_size=100, **sizes))
    FitEncoder(shards=str(folder / "pretrain"), out=folder / "encoder", steps=15, seed=0)()
    return folder


@pytest.fixture(scope="session")
def finished(influencespace: Command, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    done = influencespace(*run_arguments(world, out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "curated" in done.stdout
    return out


def run_arguments(world: Path, out: Path, *settings: str) -> list[object]:
    """The command that curates the small world into `out`."""
    chosen = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    return [
        "run",
        "--data",
        world / "pool",
        "--target",
        world / "target",
        "--test",
        world / "test",
        "--encoder",
        world / "encoder",
        "--out",
        out,
        *chosen,
    ]


def trained(path: Path) -> bytes:
    """The image head of a trained proxy; its file also holds how long the training took."""
    return load_file(path)["image"].numpy().tobytes()


def working_folder(out: Path, stage: str) -> Path | None:
    """Where a stage is at work; None where it is not."""
    folder = out / stage
    return next(folder.parent.glob(f".{folder.name}-*"), None)


def times(run: Path) -> dict[str, int]:
    """When each stage was finished."""
    return {stage: (run / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}


def run_here(world: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """The same job by the plain loop in this process, and its summary; `data__pool` stands for data.pool."""
    small = dict(setting.split("=", 1) for setting in SMALL)
    data = {f"data.{role}": str(world / role) for role in ROLES}
    other = {key.replace("__", "."): value for key, value in settings.items()}
    config = load_config(None, small | data | {"embed.encoder": str(world / "encoder")} | other)
    return pipeline.curate(config, out, LocalEngine()).summary()
