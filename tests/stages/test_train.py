"""Retraining: the plain loop on each method's pairs, for equally many steps, with any number of workers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, assert_equal_results
from safetensors.torch import load_file

from influencespace.data.buckets import read_columns, write_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.ray_engine import RayEngine
from influencespace.stages.proxies.proxies import train_subset
from influencespace.stages.selection.selection import METHODS
from influencespace.stages.training.train import TrainConfig, train


def train_by(truth: Chain, out: Path, **settings: object) -> Chain:
    """The train stage alone, with other settings."""
    chain = replace(truth, out=out, source_folder=truth.out, train=TrainConfig(**settings))
    chain.run("train")
    return chain


def test_every_method_is_trained_with_every_seed_for_equally_many_steps(truth: Chain) -> None:
    runs = truth.manifest("train").details["runs"]
    assert [(run["seed"], run["method"]) for run in runs] == [(s, m) for s in (0, 1) for m in METHODS]
    assert {run["steps"] for run in runs} == {truth.manifest("proxy").details["steps"]}
    proxies = {path.stem for path in (truth.out / "train").glob("*.safetensors")}
    assert proxies == {f"{method}-{seed}" for method in METHODS for seed in (0, 1)}


@pytest.mark.parametrize("method", ["curated", "everything", "random"])
def test_a_retrained_proxy_is_the_plain_loops(truth: Chain, method: str) -> None:
    weights = read_columns(truth.out / "curate" / "weights.parquet", method)[method]
    plain = train_subset(truth.sets["pool"], weights, truth.proxy.train, 20, seed=1)
    saved = load_file(truth.out / "train" / f"{method}-1.safetensors")
    torch.testing.assert_close(saved, dict(plain.heads.state_dict()), rtol=0, atol=0)


def test_methods_with_the_same_pairs_give_the_same_proxy(truth: Chain, tmp_path: Path) -> None:
    """So that a comparison of two methods is one of their pairs alone."""
    weights = tmp_path / "weights.parquet"
    n = len(truth.world.pool)
    write_columns(weights, {"curated": np.ones(n), "everything": np.ones(n)})
    config = TrainConfig(seeds=(3,), methods=("curated", "everything"))
    train(
        PairSet(truth.world.pool.folder),
        weights,
        truth.proxy.train,
        10,
        {},
        config,
        tmp_path / "train",
        truth.engine,
    )
    left, right = (load_file(tmp_path / "train" / f"{method}-3.safetensors") for method in config.methods)
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_pairs_without_weight_are_not_seen(truth: Chain, tmp_path: Path) -> None:
    """Other embeddings for what curated dropped: its proxy stays, that of everything does not."""
    pool, kept = truth.sets["pool"], read_columns(truth.out / "curate" / "curated.parquet", "kept")["kept"]
    folder = tmp_path / "pool"
    folder.mkdir()
    for path in pool.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    texts = np.load(folder / "texts.npy")
    texts[pool.text[~kept.astype(bool)]] *= -1
    np.save(folder / "texts.npy", texts)
    world = replace(truth.world, pool=replace(truth.world.pool, folder=folder))
    train_by(replace(truth, world=world), tmp_path, seeds=(0,))
    for method, same in (("curated", True), ("everything", False)):
        before = load_file(truth.out / "train" / f"{method}-0.safetensors")
        after = load_file(tmp_path / "train" / f"{method}-0.safetensors")
        assert torch.equal(before["text"], after["text"]) == same


@pytest.mark.ray
def test_two_workers_of_ray_train_the_same_proxies(
    truth: Chain, tmp_path: Path, ray_engine: RayEngine
) -> None:
    settings = {"seeds": (0,), "methods": ("curated", "everything", "dynamic"), "refresh": 5}
    train_by(truth, tmp_path / "local", **settings)
    train_by(replace(truth, engine=RayEngine(2)), tmp_path / "ray", workers=2, **settings)
    assert_equal_results(tmp_path / "local" / "train", tmp_path / "ray" / "train", spreads=1e-4)
    assert not (tmp_path / "ray" / "train" / "ray").exists()
