"""One fake run for all tests of the report; a test that changes it works on a copy."""

import json
import shutil
from pathlib import Path
from typing import Any

import fake_run
import pytest
from hypothesis import settings

settings.register_profile("report", deadline=None, max_examples=40)
settings.load_profile("report")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    fake_run.write_run(folder / "mine", folder / "data")
    return folder / "mine"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy whose artifacts a test may change; the shards are shared."""
    return Path(shutil.copytree(finished_run, tmp_path / "mine"))


@pytest.fixture
def summary(finished_run: Path) -> dict[str, Any]:
    """A fresh copy of the summary."""
    loaded: dict[str, Any] = json.loads((finished_run / "summary.json").read_text())
    return loaded
