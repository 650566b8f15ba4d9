"""The main job's order of work, where it is not seen from outside."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from influencespace import pipeline
from influencespace.config import RunConfig
from influencespace.data.artifacts import Manifest, write_manifest
from influencespace.engine.local import LocalEngine


@pytest.mark.parametrize("changed", [False, True])
def test_results_of_other_data_go_before_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """However it ends: `show` and `export` would take them for those of the data that are there now."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    inputs = {"pool": "new" if changed else "old"}
    write_manifest(tmp_path / "split", Manifest(stage="split", fingerprint="f", inputs={"pool": "old"}))
    for name in pipeline.RESULTS:
        (tmp_path / name).touch()
    embedded = {role: SimpleNamespace(fingerprint=mark) for role, mark in inputs.items()}
    monkeypatch.setattr(pipeline, "embed_roles", lambda *_: embedded)
    monkeypatch.setattr(pipeline, "split", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline._run(RunConfig(), tmp_path, LocalEngine())
    assert all((tmp_path / name).exists() is not changed for name in pipeline.RESULTS)
