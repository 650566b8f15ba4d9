"""The proxies: what each has seen, its bank, the quality of every pair, and the choice of the steps."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from chain import (
    Counting,
    Killed,
    World,
    assert_equal_results,
    beside,
    carry,
    carry_beside,
    columns,
    run_on,
    with_sets,
)
from hypothesis import given
from hypothesis import strategies as st
from planted import plant, replant

from influencespace.data.buckets import write_columns
from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.estimators.filters import clip_score, neg_clip_loss
from influencespace.models.training import HeadsConfig
from influencespace.run import Run, Workers
from influencespace.stages.proxies.proxy import Proxy, ProxyConfig, proxy_name
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.proxies.train_many import (
    BlockInputs,
    Column,
    Given,
    OutsideFold,
    Uniform,
    fold_of_rows,
    total_weight,
    train,
)

FOLDS = (None, 0, 1, 2)


def proxy(run: Run, fold: int | None) -> Proxy:
    return Proxy(run.at("proxies"), proxy_name(fold))


def fold_of_pairs(run: Run) -> np.ndarray:
    return fold_of_rows(run.pool, slice(None), run.config.proxy.fold_count(len(run.pool)), run.seed)


def test_a_proxy_is_the_plain_training_on_what_it_may_see(truth: Run) -> None:
    fold = fold_of_pairs(truth)
    for k in FOLDS:
        weights = np.ones(len(truth.pool)) if k is None else (fold != k).astype(float)
        trained = train(truth.pool, Given(weights), truth.config.proxy.train, truth.seed + 1 + (k or 0))
        saved = proxy(truth, k)
        torch.testing.assert_close(saved.heads.state_dict(), trained.heads.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(saved.preconditioner, trained.preconditioner, rtol=0, atol=0)
        assert saved.sum_of_learning_rates == pytest.approx(trained.sum_of_learning_rates)


def test_all_captions_of_an_image_are_in_one_fold(truth: Run) -> None:
    fold, image = fold_of_pairs(truth), truth.pool.image
    assert set(fold) == {0, 1, 2}
    assert len(np.unique(np.stack([image, fold]), axis=1)[0]) == len(np.unique(image))


def test_a_fold_left_out_changes_nothing_in_its_proxy(truth: Run, tmp_path: Path) -> None:
    """Other embeddings for the images of a fold: its own proxy stays, the others do not."""
    changed = plant(tmp_path / "pool", 120, captions=2, wrong=0.2, seed=1)
    images, texts = PairSet(changed.folder).table.embeddings(slice(None))
    images[fold_of_pairs(truth) == 1] *= -1
    replant(changed.folder, images, texts)
    other = with_sets(beside(truth, tmp_path / "run"), pool=changed)
    carry(other, "proxies")
    for k in FOLDS:
        left, right = proxy(truth, k).heads.state_dict(), proxy(other, k).heads.state_dict()
        assert torch.equal(left["image"], right["image"]) == (k == 1)


def test_banks_are_disjoint_full_and_without_images_of_the_fold(truth: Run) -> None:
    image, fold = truth.pool.image, fold_of_pairs(truth)
    for k in FOLDS:
        batches = proxy(truth, k).bank
        together = np.concatenate(batches)
        assert len(set(image[together])) == len(together)
        assert {len(batch) for batch in batches} == {truth.config.proxy.train.batch_size - 1}
        if k is not None:
            assert not (fold[together] == k).any()


@pytest.mark.parametrize("batches", [2, 3, 8])
def test_all_proxies_have_equally_many_negative_batches(truth: Run, tmp_path: Path, batches: int) -> None:
    """120 images fill three batches of 31 pairs, but 80 images, two folds of three, fill only two."""
    run = carry_beside(truth, tmp_path, "proxies", negative_batches=batches)
    assert {len(proxy(run, k).bank) for k in FOLDS} == {2}


def test_quality_is_scored_by_the_proxy_of_all_and_by_the_one_that_left_the_pair_out(truth: Run) -> None:
    pool, quality, fold = truth.pool, columns(truth, "proxies/quality"), fold_of_pairs(truth)
    for k in FOLDS:
        rows = np.arange(len(pool)) if k is None else np.flatnonzero(fold == k)
        judge = proxy(truth, k)
        u, t = judge.embed(pool.inputs(rows))
        bank = [(*judge.embed(batch.inputs), batch.image) for batch in judge.reference_bank(pool)]
        side = "in" if k is None else "out"
        np.testing.assert_allclose(quality[f"clip_{side}"][rows], clip_score(u, t), atol=1e-5)
        loss = neg_clip_loss(u, t, pool.image[rows], bank, 1 / truth.config.proxy.train.temperature)
        np.testing.assert_allclose(quality[f"neg_clip_{side}"][rows], loss, atol=1e-4)


def test_wrong_captions_have_low_quality(truth: Run, world: World) -> None:
    quality, wrong = columns(truth, "proxies/quality")["neg_clip_out"], world["pool"].wrong
    assert quality[wrong].mean() < quality[~wrong].mean() - quality.std()


def test_steps_are_doubled_while_that_helps(truth: Run, tmp_path: Path) -> None:
    settings = {"train.steps": 10, "choose_steps": True, "max_doublings": 2, "folds": 2}
    details = carry_beside(truth, tmp_path, "proxies", **settings).manifest("proxies").details
    first = next(record for record in details["proxies"] if record["name"] == "all")
    losses = {int(steps): loss for steps, loss in first["target_loss_by_steps"].items()}
    assert set(losses) == {10, 20, 40}
    assert losses[40] < losses[20] < losses[10]  # a planted relation that ten steps cannot learn
    assert {details["steps"], *(record["steps"] for record in details["proxies"])} == {40}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"choose_steps": True, "min_gain": 0.99}, 20), ({"epochs": 1.5}, round(1.5 * 240 / 32))],
    ids=["more steps bring nothing", "epochs of the whole pool"],
)
def test_steps_are_those_asked_for(
    truth: Run, tmp_path: Path, settings: dict[str, float], steps: int
) -> None:
    run = carry_beside(truth, tmp_path, "proxies", folds=2, **settings)
    assert run.manifest("proxies").details["steps"] == steps


def test_the_target_is_halved_by_image(truth: Run) -> None:
    halves = TargetHalves(truth.target, 0)
    together = np.concatenate([halves.choosing, halves.gradient])
    assert sorted(together) == list(range(len(truth.target)))
    assert not {*truth.target.image[halves.choosing]} & {*truth.target.image[halves.gradient]}
    assert sorted(np.concatenate(halves.batches(halves.gradient, 8))) == sorted(halves.gradient)


def test_a_target_of_too_few_images_is_refused(world: World, tmp_path: Path) -> None:
    small = plant(tmp_path / "target", 7, captions=3, seed=9)
    with pytest.raises(InputError, match=r"the target has 7 image\(s\); .* needs 8 or more"):
        carry(run_on(tmp_path, {**world, "target": small}), "proxies")
    assert len(PairSet(small.folder)) == 21


@pytest.mark.parametrize("pairs", [1500, 20_000, 51_200])
def test_small_pools_have_the_steps_and_folds_of_the_settings(pairs: int) -> None:
    config = ProxyConfig()
    assert config.first_steps(pairs) == config.train.steps
    assert config.max_steps(pairs) == config.train.steps * 2**config.max_doublings
    assert config.fold_count(pairs) == 5


@given(pairs=st.integers(1, 10**9), steps=st.integers(1, 5000))
def test_a_proxy_sees_every_pair_and_long_passes_are_not_repeated(pairs: int, steps: int) -> None:
    config = ProxyConfig(train=HeadsConfig(steps=steps))
    first, most = config.first_steps(pairs), config.max_steps(pairs)
    assert config.passes(first, pairs) >= 1
    assert most == max(first, 8 * steps)
    assert config.passes(first - 1, pairs) < 1 or first == steps


def test_what_less_than_a_pass_means_is_said(truth: Run, tmp_path: Path) -> None:
    run = carry_beside(truth, tmp_path, "proxies", folds=2, epochs=0.4)
    details = run.manifest("proxies").details
    assert details["passes"] == pytest.approx(3 * 32 / 240)
    assert "saw 40 % of the pool" in details["warnings"][0]
    assert truth.manifest("proxies").details["warnings"] == []


def test_another_device_gives_the_same_proxies_and_qualities(
    truth: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second CPU takes the way of a GPU: everything is brought to it, and back."""
    monkeypatch.setattr(Workers, "device", "cpu:0")
    run = carry_beside(truth, tmp_path, "proxies")
    assert_equal_results(truth.at("proxies"), run.at("proxies"))


def test_a_killed_stage_continues_to_the_same(truth: Run, tmp_path: Path) -> None:
    run = beside(truth, tmp_path, "proxies", settings={"proxy.bucket_size": 64})
    for limit in (2, 1, 1):
        with pytest.raises(Killed):
            carry(run, "proxies", engine=Counting(limit=limit + 1))
    carry(run, "proxies")
    assert_equal_results(truth.at("proxies"), run.at("proxies"), spreads=1e-5)


class Watched(PairSet):
    """Remembers what is read at once."""

    reads: ClassVar[list[tuple[int, bool]]] = []

    def inputs(self, pairs: Any, device: str = "cpu") -> Any:
        images, texts = super().inputs(pairs, device)
        self.reads.append((len(images), isinstance(pairs, slice)))
        return images, texts


def test_batches_are_cut_from_blocks_that_are_read_in_order(truth: Run) -> None:
    pool, rows = Watched(truth.pool.folder), np.random.default_rng(0).integers(0, 40, 30)
    Watched.reads.clear()
    inputs = BlockInputs(pool, block=50)
    for first in (0, 50, 200, 50):
        for got, wanted in zip(inputs(first + rows), truth.pool.inputs(first + rows)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert Watched.reads == [(50, True), (50, True), (40, True), (50, True)]
    mixed = np.concatenate([50 + rows[:10], 130 + rows[:10], rows[:5]])
    for got, wanted in zip(inputs(mixed), truth.pool.inputs(mixed)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert not any(whole for _, whole in Watched.reads[4:])


def test_weights_are_read_by_range(truth: Run, tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(0, 3, 240)
    write_columns(tmp_path / "weights.parquet", {"mine": values})
    fold = OutsideFold(pool=truth.pool, fold=1, count=3, seed=0)
    for weights in (Uniform(), Given(values), Column(tmp_path / "weights.parquet", "mine"), fold):
        parts = [weights.read(start, min(start + 70, 240)) for start in range(0, 240, 70)]
        np.testing.assert_array_equal(np.concatenate(parts), weights.read(0, 240))
        assert total_weight(weights, 240) == pytest.approx(weights.read(0, 240).sum())
    assert (fold.read(0, 240) == (fold_of_pairs(truth) != 1)).all()
