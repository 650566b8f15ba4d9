"""The main job's order of work, where it is not seen from outside."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from influencespace import pipeline
from influencespace.config import RunConfig
from influencespace.data.artifacts import Manifest, write_manifest
from influencespace.engine.local import Engine, LocalEngine
from influencespace.run import Run, Stage


@dataclass(frozen=True)
class Finished:
    """A stage that has its manifest already."""

    name: str


@pytest.mark.parametrize("changed", [False, True])
def test_results_of_other_data_are_removed_before_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """However it ends: `show` and `export` would take them for those of the data that are there now."""

    def carried_out(stage: Stage, run: Run, engine: Engine) -> Manifest:
        if stage.name != "split":
            raise KeyboardInterrupt
        return Manifest(stage="split", fingerprint="f", inputs={"embed/pool": "new" if changed else "old"})

    write_manifest(tmp_path / "split", Manifest(stage="split", fingerprint="f", inputs={"embed/pool": "old"}))
    for name in pipeline.RESULTS:
        (tmp_path / name).touch()
    monkeypatch.setattr(pipeline, "data_stages", lambda config: (Finished("split"),))
    monkeypatch.setattr(pipeline, "pair_sets", lambda run: {})
    monkeypatch.setattr(pipeline, "carry_out", carried_out)
    with pytest.raises(KeyboardInterrupt):
        pipeline._curate(RunConfig(), tmp_path, LocalEngine(), pipeline.STAGES)
    assert all((tmp_path / name).exists() is not changed for name in pipeline.RESULTS)
