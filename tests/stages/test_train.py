"""Retraining: the plain loop on each method's pairs, for equally many steps, with any number of workers."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import World, assert_equal_results, beside, carry, columns, with_sets
from planted import replant
from safetensors.torch import load_file

from influencespace.data.artifacts import write_manifest
from influencespace.data.buckets import write_columns
from influencespace.data.integrity import describe
from influencespace.engine.ray_engine import RayEngine
from influencespace.run import Run
from influencespace.stages.proxies.train_many import Given, train
from influencespace.stages.rivals.names import DEFAULT as METHODS


def heads(run: Run, name: str) -> dict[str, torch.Tensor]:
    state = load_file(run.at("train") / f"{name}.safetensors")
    return {side: state[side] for side in ("image", "text")}


def steps_of(run: Run, method: str) -> int:
    """All methods train as long as the proxies, but curated as long as retraining liked best."""
    steps: int = run.manifest("proxies").details["steps"]
    return round(run.manifest("selection").details["steps_factor"] * steps) if method == "curated" else steps


def test_every_method_is_trained_with_every_seed_for_the_steps_that_it_has(truth: Run) -> None:
    runs = truth.manifest("train").details["runs"]
    assert [(run["seed"], run["method"]) for run in runs] == [(s, m) for s in (0, 1) for m in METHODS]
    assert {run["method"]: run["steps"] for run in runs} == {m: steps_of(truth, m) for m in METHODS}
    proxies = {path.stem for path in truth.at("train").glob("*.safetensors")}
    assert proxies == {f"{method}-{seed}" for method in METHODS for seed in (0, 1)}


@pytest.mark.parametrize("method", ["curated", "everything", "random"])
def test_a_retrained_proxy_is_the_plain_loops(truth: Run, method: str) -> None:
    weights = {
        "curated": columns(truth, "selection/curated", "weight")["weight"].astype(np.float64),
        "everything": np.ones(len(truth.pool)),
        "random": columns(truth, "rivals/weights", "random")["random"],
    }
    config = replace(truth.config.proxy.train, steps=steps_of(truth, method))
    plain = train(truth.pool, Given(weights[method]), config, seed=1)
    torch.testing.assert_close(heads(truth, f"{method}-1"), dict(plain.heads.state_dict()), rtol=0, atol=0)


def with_weights(run: Run, folder: Path, curated: np.ndarray) -> Run:
    """The run in a folder where the selection stage has given these weights, and the proxies' steps."""
    other = beside(run, folder, "train", settings={"train.methods": ["curated", "everything"]})
    (folder / "selection").unlink()
    shutil.copytree(run.at("selection"), other.at("selection"))
    table = columns(run, "selection/curated") | {"weight": curated.astype(np.float32)}
    write_columns(other.at("selection") / "curated.parquet", table)
    files = {name: describe(other.at("selection") / name) for name in run.manifest("selection").files}
    manifest = run.manifest("selection")
    details = {**manifest.details, "steps_factor": 1.0}
    write_manifest(other.at("selection"), replace(manifest, files=files, details=details))
    return other


def test_methods_with_the_same_pairs_give_the_same_proxy(truth: Run, tmp_path: Path) -> None:
    """So that a comparison of two methods is one of their pairs alone."""
    ones = np.ones(len(truth.pool))
    run = with_weights(truth, tmp_path, ones)
    carry(run, "train")
    torch.testing.assert_close(heads(run, "curated-1"), heads(run, "everything-1"), rtol=0, atol=0)


def test_pairs_without_weight_are_not_seen(truth: Run, world: World, tmp_path: Path) -> None:
    """Other embeddings for what curated dropped: its proxy stays, that of everything does not."""
    folder, kept = tmp_path / "pool", np.arange(len(truth.pool)) % 3 > 0
    shutil.copytree(truth.pool.folder, folder)
    images, texts = truth.pool.table.embeddings(slice(None))
    texts[~kept] *= -1
    replant(folder, images, texts)
    changed = with_sets(truth, pool=replace(world["pool"], folder=folder))
    runs = [with_weights(run, tmp_path / str(i), kept) for i, run in enumerate((truth, changed))]
    for run in runs:
        carry(run, "train")
    for method, same in (("curated", True), ("everything", False)):
        before, after = (heads(one, f"{method}-0")["text"] for one in runs)
        assert torch.equal(before, after) == same


@pytest.mark.ray
def test_two_workers_of_ray_train_the_same_proxies(truth: Run, tmp_path: Path, ray_engine: RayEngine) -> None:
    methods = ["curated", "everything", "dynamic"]
    settings = {"train.seeds": [0], "train.methods": methods, "train.refresh": 5, "train.workers": 2}
    here, there = (beside(truth, tmp_path / name, "train", settings=settings) for name in ("here", "there"))
    carry(here, "train")
    carry(there, "train", engine=RayEngine(2))
    assert_equal_results(here.at("train"), there.at("train"), spreads=1e-4)
    assert not (there.at("train") / "ray").exists()
