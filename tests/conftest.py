"""Shared by all tests: one thread for torch (the machines have two cores), one Ray, real data where it can be found."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# The same examples every time, as slowly as the machine likes; `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("fixed")
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("INFLUENCESPACE_DATA", TESTS.parents[1] / "shared" / "data"))
    if not (folder / "flickr8k").is_dir():
        pytest.skip(f"no real data in {folder}; set INFLUENCESPACE_DATA")
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over 150 pairs, by the plain loop; tests leave it as they found it."""
    from influencespace import pipeline
    from influencespace.config import load_config
    from influencespace.data.synthetic import WorldConfig, write_world
    from influencespace.engine.local import LocalEngine
    from influencespace.stages.ingest.fit_encoder import FitEncoder

    folder = tmp_path_factory.mktemp("small")
    sizes = {"pretrain": 100, "pool": 150, "target": 60, "test": 40}
    write_world(folder / "world", WorldConfig(seed=1, **sizes))
    FitEncoder(shards=str(folder / "world" / "pretrain"), out=folder / "encoder", steps=3, seed=0)()
    small: dict[str, Any] = {"proxy.train.batch_size": 24, "proxy.train.steps": 10}
    small |= {"proxy.choose_steps": False, "proxy.folds": 2, "train.seeds": [0]}
    small |= {"train.methods": ["curated"], "selection.weighting": "influence", "selection.target_size": 0.8}
    roles = {f"data.{role}": str(folder / "world" / role) for role in ("pool", "target", "test")}
    config = load_config(None, small | roles | {"embed.encoder": str(folder / "encoder")})
    pipeline.curate(config, folder / "run", LocalEngine())
    return folder / "run"


@pytest.fixture(scope="session")
def ray_engine() -> Iterator[Any]:
    """One RayEngine for all tests of a process, of 8 logical CPUs, with its own home and a short temporary folder."""
    from influencespace.engine.session import start_ray

    with tempfile.TemporaryDirectory(prefix="is-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {"HOME": folder, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        # Workers unpickle the factories of the tests by the name of their module.
        rooms = [str(path) for path in (TESTS, *TESTS.iterdir()) if path.is_dir()]
        environment["PYTHONPATH"] = os.pathsep.join([*rooms, os.environ.get("PYTHONPATH", "")])
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RAY_ADDRESS", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            with start_ray(num_cpus=8) as engine:
                yield engine


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """An S3 server on loopback: see `tests/object_store.py`."""
    from tests.object_store import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket of it; this machine's mirror is a folder of the test."""
    import uuid

    from influencespace.data.stores import filesystem

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    filesystem("s3").mkdir(name)
    monkeypatch.setenv("INFLUENCESPACE_MIRROR", str(tmp_path / "machine"))
    return f"s3://{name}"
