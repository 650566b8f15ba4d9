"""The main job's order of work, where it is not seen from outside."""

from pathlib import Path
from typing import Any

import pytest

from influencespace import pipeline
from influencespace.config import RunConfig, load_config
from influencespace.data.artifacts import MANIFEST, Manifest, write_manifest
from influencespace.engine.local import Engine, LocalEngine
from influencespace.errors import InputError
from influencespace.pipeline import check
from influencespace.run import Run, Stage, stage_fingerprint
from influencespace.stages.ingest.split import Split


@pytest.mark.parametrize("changed", [False, True])
def test_results_of_other_data_are_removed_before_the_data_are_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """However the run ends: `show` and `export` would take them for those of the data that are there now."""

    def killed(stage: Stage, run: Run, engine: Engine) -> Manifest:
        raise KeyboardInterrupt

    def embedded(fingerprint: str) -> None:
        write_manifest(tmp_path / "embed" / "pool", Manifest(stage="embed/pool", fingerprint=fingerprint))

    embedded("old")
    mark, _ = stage_fingerprint(Split(), Run(folder=tmp_path, config=RunConfig()))
    write_manifest(tmp_path / "split", Manifest(stage="split", fingerprint=mark))
    for name in pipeline.RESULTS:
        (tmp_path / name).touch()
    if changed:
        embedded("new")
    monkeypatch.setattr(pipeline, "data_stages", lambda config: (Split(),))
    monkeypatch.setattr(pipeline, "carry_out", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline._curate(RunConfig(), tmp_path, LocalEngine(), pipeline.STAGES)
    assert all((tmp_path / name).exists() is not changed for name in pipeline.RESULTS)


def test_results_of_another_config_are_removed_before_the_run_begins(tmp_path: Path) -> None:
    """The same config keeps them: a run that is repeated and interrupted has lost nothing."""

    def write() -> None:
        for name in pipeline.RESULTS:
            (tmp_path / name).touch()
        write_manifest(tmp_path, Manifest(stage="results", fingerprint="f"))

    pipeline.open_folder(RunConfig(), tmp_path)
    write()
    pipeline.open_folder(RunConfig(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", MANIFEST, *pipeline.RESULTS}
    pipeline.open_folder(RunConfig(seed=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert load_config(tmp_path / "config.yaml").seed == 1


@pytest.mark.parametrize("setting", [{"selection.unit": "cluster"}, {"selection.tau_high": 0.5}])
def test_weights_of_clusters_do_not_change_while_training(tmp_path: Path, setting: dict[str, Any]) -> None:
    settings = {"data.pool": "x", "embed.encoder": "x", "train.methods": ["curated", "dynamic"], **setting}
    with pytest.raises(InputError, match="leave dynamic out"):
        check(load_config(None, settings))
