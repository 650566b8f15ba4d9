"""Laws of every stage: rows are kept account of, work is done once, a killed run continues, Ray equals the plain loop."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import (
    STAGES,
    Careful,
    Chain,
    Counting,
    Idle,
    Killed,
    Losing,
    World,
    assert_equal_results,
    proxy_config,
    results,
    times,
)
from planted import plant

from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import MANIFEST, read_manifest
from influencespace.data.buckets import write_bucket
from influencespace.engine.local import run_once, run_task
from influencespace.engine.ray_engine import RayEngine
from influencespace.estimators.influence import CurvatureConfig
from influencespace.stages.proxies import proxies
from influencespace.stages.scoring import cluster, influence
from influencespace.stages.scoring.cluster import ClusterConfig
from influencespace.stages.scoring.curvature import TargetConfig
from influencespace.stages.scoring.influence import InfluenceConfig
from influencespace.stages.selection import redundancy
from influencespace.stages.selection.redundancy import RedundancyConfig
from influencespace.stages.training.train import TrainConfig

OF_PAIRS = (
    "proxy",
    "cluster",
    "redundancy",
    "attribute",
    "fairness",
    "curate",
)  # stages with a row for every pair of the pool
# what a changed setting leaves as it was
CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "proxy": ({"proxy": proxy_config(steps=21)}, {"cluster"}),
    "cluster": ({"cluster": ClusterConfig(k=3)}, {"proxy", "curvature"}),
    "curvature": (
        {"curvature": CurvatureConfig(rank=16, damping_factor=50)},
        {"proxy", "cluster", "redundancy"},
    ),
    "redundancy": (
        {"redundancy": RedundancyConfig(text=0.8)},
        {"proxy", "cluster", "curvature", "attribute", "fairness"},
    ),
    "curate": (
        {"select": SelectionConfig(tau_low=0.1)},
        {"proxy", "cluster", "redundancy", "curvature", "attribute", "fairness"},
    ),
    "train": ({"train": TrainConfig(seeds=(5,))}, set(STAGES) - {"train", "evaluate"}),
}


def continued(chain: Chain, out: Path, **changes: Any) -> Chain:
    """A chain that works into `out`, on what the given chain has done."""
    return replace(chain, out=out, source_folder=chain.source, **changes)


@pytest.mark.parametrize("stage", STAGES)
def test_every_row_is_accounted_for(truth: Chain, stage: str) -> None:
    manifest = truth.manifest(stage)
    assert manifest.stage == stage
    assert manifest.rows_in == manifest.rows_out + manifest.rejected
    if stage in OF_PAIRS:
        assert manifest.rows_in == len(truth.world.pool)
    files = {path.name for path in (truth.out / stage).iterdir() if path.is_file()}
    assert files == {*manifest.files, MANIFEST}


@pytest.mark.parametrize("stage", STAGES)
def test_tasks_that_are_begun_again_change_nothing(truth: Chain, stage: str, tmp_path: Path) -> None:
    chain = continued(truth, tmp_path, engine=Losing())
    chain.run(stage)
    assert_equal_results(tmp_path / stage, truth.out / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_call_does_nothing(truth: Chain, stage: str) -> None:
    before = times(truth.out / stage)
    write_bucket(
        truth.out / stage, "of a run that was killed behind its manifest", 0, "", {"x": np.arange(2)}
    )
    again = replace(truth, engine=Idle()).run(stage)
    assert again == truth.manifest(stage)
    assert times(truth.out / stage) == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_manifest_or_file_is_done_again_to_the_same(
    truth: Chain, stage: str, tmp_path: Path
) -> None:
    chain = continued(truth, tmp_path)
    shutil.copytree(truth.out / stage, tmp_path / stage)
    (tmp_path / stage / MANIFEST).unlink()
    chain.run(stage)
    assert_equal_results(truth.out / stage, tmp_path / stage)
    lost = next(
        path
        for path in sorted((tmp_path / stage).iterdir())
        if path.suffix == ".parquet" or stage in ("curvature", "train")
    )
    lost.unlink()
    chain.run(stage)
    assert_equal_results(truth.out / stage, tmp_path / stage)


@pytest.fixture
def blocks_written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Folder, name and start of every block that is written from now on."""
    written: list[tuple[Any, ...]] = []

    def note(*arguments: Any) -> None:
        written.append(arguments[:3])
        write_bucket(*arguments)

    for module in (proxies, cluster, redundancy, influence):
        monkeypatch.setattr(module, "write_bucket", note)
    return written


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        ("proxy", 1),
        ("proxy", 3),
        ("proxy", 6),
        ("cluster", 2),
        ("redundancy", 2),
        ("curvature", 3),
        ("curvature", 10),
        ("attribute", 2),
        ("attribute", 6),
        ("fairness", 1),
        ("train", 4),
        ("evaluate", 3),
    ],
)
def test_a_killed_stage_continues_to_an_identical_result(
    truth: Chain, stage: str, after: int, tmp_path: Path, blocks_written: list[tuple[Any, ...]]
) -> None:
    whole = Counting()
    continued(truth, tmp_path / "whole", engine=whole).run(stage)
    killed = continued(truth, tmp_path / "killed", engine=Counting(most=after))
    with pytest.raises(Killed):
        killed.run(stage)
    assert after < whole.tasks
    folder = tmp_path / "killed" / stage
    assert read_manifest(folder) is None
    trained = {name: time for name, time in times(folder).items() if stage in ("proxy", "train")}
    replace(killed, engine=Counting()).run(stage)
    assert_equal_results(tmp_path / "whole" / stage, folder)
    # neither proxies nor blocks were made twice
    kept = times(folder)
    assert {name: time for name, time in trained.items() if "blocks" not in name}.items() <= kept.items()
    assert len(blocks_written) == len(set(blocks_written))
    assert not list(folder.rglob("*.arrow"))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("proxy", {"proxy": proxy_config(learning_rate=0.01)}),
        ("cluster", {"cluster": ClusterConfig(k=3, bucket_size=50)}),
        ("curvature", {"curvature": CurvatureConfig(rank=16, seed=3)}),
    ],
)
def test_nothing_of_a_killed_run_with_other_settings_is_taken_over(
    truth: Chain, stage: str, change: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        continued(truth, tmp_path / "killed", engine=Counting(most=3)).run(stage)
    continued(truth, tmp_path / "killed", **change).run(stage)
    continued(truth, tmp_path / "fresh", **change).run(stage)
    assert_equal_results(tmp_path / "fresh" / stage, tmp_path / "killed" / stage)


@pytest.mark.parametrize("changed", CHANGES)
def test_a_changed_setting_recomputes_only_what_it_touches(
    truth: Chain, changed: str, tmp_path: Path
) -> None:
    settings, untouched = CHANGES[changed]
    out = tmp_path / "run"
    shutil.copytree(truth.out, out)
    before = {stage: times(out / stage) for stage in STAGES}
    replace(truth, out=out, **settings).run()
    for stage in STAGES:
        same = read_manifest(out / stage) == truth.manifest(stage)
        assert same == (stage in untouched), stage
        if same:
            assert times(out / stage) == before[stage]


def test_the_smallest_pool_runs_through(world: World, tmp_path: Path) -> None:
    """Sixteen images, as many as a split asks for, with settings that are meant for millions."""
    small = replace(
        world,
        pool=plant(tmp_path / "pool", 16, seed=1),
        target=plant(tmp_path / "target", 16, seed=2),
        test=plant(tmp_path / "test", 16, seed=3),
    )
    settings = {"cluster": ClusterConfig(), "attribute": InfluenceConfig(), "target": TargetConfig()}
    proxies = proxy_config(batch_size=512, folds=5, contexts=4)
    chain = Chain(out=tmp_path, world=small, proxy=proxies, **settings)
    chain.run()
    assert chain.manifest("curate").rows_out == 16
    assert all(
        np.isfinite(values).all()
        for values in results(tmp_path / "curate").values()
        if values.dtype.kind == "f"
    )


def test_modalities_may_differ_in_dimension(world: World, tmp_path: Path) -> None:
    roles = {}
    for seed, role in enumerate(("pool", "target", "test"), start=1):
        roles[role] = plant(tmp_path / role, 60, seed=seed)
        texts = np.load(roles[role].folder / "texts.npy")[:, :11]
        np.save(roles[role].folder / "texts.npy", texts / np.linalg.norm(texts, axis=1, keepdims=True))
    chain = Chain(out=tmp_path, world=replace(world, **roles))
    chain.run()
    assert results(tmp_path / "proxy")["all.safetensors/text"].shape == (11, 8)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("stage", "cores"),
    [(stage, 2) for stage in STAGES if stage not in ("attribute", "train")]
    + [("attribute", 1), ("attribute", 3)],
)
def test_ray_equals_the_plain_loop(
    truth: Chain, stage: str, cores: int, ray_engine: RayEngine, tmp_path: Path
) -> None:
    chain = continued(truth, tmp_path, engine=RayEngine(cores))
    manifest = chain.run(stage)
    assert manifest.fingerprint == truth.manifest(stage).fingerprint
    assert_equal_results(truth.out / stage, tmp_path / stage, spreads=1e-5)


def test_results_are_compared_by_their_numbers(truth: Chain) -> None:
    """The comparison itself: it reads every array and finds a difference."""
    assert len(results(truth.out / "attribute")) > 10
    with pytest.raises(AssertionError):
        assert_equal_results(truth.out / "attribute", truth.out / "proxy")


def test_a_map_beside_a_pool_is_noticed() -> None:
    """`Careful`, with which every chain here runs, notices what would be a deadlock on a full cluster."""
    engine = Careful()
    with engine.pool(run_task) as pool:
        assert pool.run(int) == 0
        with pytest.raises(AssertionError, match=r"by pool\.run"):
            run_once(engine, int)
    assert run_once(engine, int) == 0
