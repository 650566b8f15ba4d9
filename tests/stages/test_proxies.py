"""The proxies: what each has seen, its bank, the quality of every pair, and the choice of the steps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, World, assert_equal_results, proxy_config
from planted import plant

from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.estimators.filters import clip_score, neg_clip_loss
from influencespace.stages.proxies.proxies import Proxy, TargetHalves, image_folds, proxy_name, train_subset

FOLDS = (None, 0, 1, 2)


def proxy(chain: Chain, fold: int | None) -> Proxy:
    return Proxy(chain.source / "proxy", proxy_name(fold))


def test_a_proxy_is_the_plain_training_on_what_it_may_see(truth: Chain) -> None:
    pool, config = truth.sets["pool"], truth.proxy
    fold = image_folds(pool, config)
    for k in FOLDS:
        weights = np.ones(len(pool)) if k is None else (fold != k).astype(float)
        trained = train_subset(pool, weights, config.train, 20, config.seed + 1 + (k or 0))
        saved = proxy(truth, k)
        torch.testing.assert_close(saved.heads.state_dict(), trained.heads.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(saved.preconditioner, trained.preconditioner, rtol=0, atol=0)
        assert saved.sum_of_learning_rates == pytest.approx(trained.sum_of_learning_rates)


def test_a_held_out_fold_changes_nothing_in_its_proxy(truth: Chain, tmp_path: Path) -> None:
    """Other embeddings for the images of a fold: its own proxy stays, the others do not."""
    pool = truth.sets["pool"]
    fold = image_folds(pool, truth.proxy)
    changed = plant(tmp_path / "pool", 120, captions=2, wrong=0.2, seed=1)
    images = np.load(changed.folder / "images.npy")
    images[np.unique(pool.image[fold == 1])] *= -1
    np.save(changed.folder / "images.npy", images)
    world = replace(truth.world, pool=changed)
    other = Chain(out=tmp_path, world=world)
    other.run("proxy")
    for k in FOLDS:
        left, right = proxy(truth, k).heads.state_dict(), proxy(other, k).heads.state_dict()
        assert torch.equal(left["image"], right["image"]) == (k == 1)


def test_banks_are_disjoint_full_and_without_held_out_images(truth: Chain) -> None:
    pool, config = truth.sets["pool"], truth.proxy
    fold = image_folds(pool, config)
    for k in FOLDS:
        contexts = proxy(truth, k).bank
        together = np.concatenate(contexts)
        assert len(set(pool.image[together])) == len(together)
        assert {len(context) for context in contexts} == {config.train.batch_size - 1}
        if k is not None:
            assert not (fold[together] == k).any()


@pytest.mark.parametrize("contexts", [2, 3, 8])
def test_all_proxies_have_equally_many_contexts(truth: Chain, tmp_path: Path, contexts: int) -> None:
    """120 images fill three contexts of 31 pairs, but 80 images, two folds of three, fill only two."""
    chain = Chain(out=tmp_path, world=truth.world, proxy=proxy_config(contexts=contexts))
    chain.run("proxy", "cluster", "curvature", "attribute")
    assert {len(proxy(chain, k).bank) for k in FOLDS} == {2}


def test_quality_is_scored_by_the_proxy_of_all_and_by_the_one_that_held_the_pair_out(truth: Chain) -> None:
    pool, config = truth.sets["pool"], truth.proxy
    quality = read_columns(truth.out / "proxy" / "quality.parquet")
    fold = image_folds(pool, config)
    for k in FOLDS:
        rows = np.arange(len(pool)) if k is None else np.flatnonzero(fold == k)
        judge = proxy(truth, k)
        u, t = judge.embed(pool.inputs(rows))
        contexts = [(*judge.embed(c.inputs), c.image) for c in judge.reference_bank(pool)]
        side = "in" if k is None else "out"
        np.testing.assert_allclose(quality[f"clip_{side}"][rows], clip_score(u, t), atol=1e-5)
        loss = neg_clip_loss(u, t, pool.image[rows], contexts, 1 / config.train.temperature)
        np.testing.assert_allclose(quality[f"neg_clip_{side}"][rows], loss, atol=1e-4)


def test_wrong_captions_have_low_quality(truth: Chain) -> None:
    quality = read_columns(truth.out / "proxy" / "quality.parquet")["neg_clip_out"]
    wrong = truth.world.pool.wrong
    assert quality[wrong].mean() < quality[~wrong].mean() - quality.std()


@pytest.mark.parametrize("bucket_size", [16, 256])
def test_blocks_change_nothing(truth: Chain, tmp_path: Path, bucket_size: int) -> None:
    replace(truth, out=tmp_path, source_folder=truth.out, proxy=proxy_config(bucket_size=bucket_size)).run(
        "proxy"
    )
    assert_equal_results(truth.out / "proxy", tmp_path / "proxy", spreads=1e-5)


def test_steps_are_doubled_while_that_helps(truth: Chain, tmp_path: Path) -> None:
    config = proxy_config(choose_steps=True, steps=5, max_doublings=2, folds=2)
    details = Chain(out=tmp_path, world=truth.world, proxy=config).run("proxy").details
    first = next(note for note in details["proxies"] if note["name"] == "all")
    losses = {int(steps): loss for steps, loss in first["target_loss_by_steps"].items()}
    assert set(losses) == {5, 10, 20}
    assert losses[20] < losses[10] < losses[5]  # a planted relation that five steps cannot learn
    assert details["steps"] == 20
    assert {note["steps"] for note in details["proxies"]} == {20}


def test_steps_stay_where_more_bring_nothing(truth: Chain, tmp_path: Path) -> None:
    config = proxy_config(choose_steps=True, min_gain=0.99, folds=2)
    details = Chain(out=tmp_path, world=truth.world, proxy=config).run("proxy").details
    assert details["steps"] == 20


def test_epochs_are_steps_of_the_whole_pool(truth: Chain, tmp_path: Path) -> None:
    config = replace(proxy_config(folds=2), epochs=1.5)
    details = Chain(out=tmp_path, world=truth.world, proxy=config).run("proxy").details
    assert details["steps"] == round(1.5 * len(truth.sets["pool"]) / config.train.batch_size)


def test_the_target_is_halved_by_image(truth: Chain) -> None:
    target = truth.sets["target"]
    halves = TargetHalves(target, 0)
    together = np.concatenate([halves.choosing, halves.gradient])
    assert sorted(together) == list(range(len(target)))
    assert not set(target.image[halves.choosing]) & set(target.image[halves.gradient])
    contexts = halves.contexts(halves.gradient, 8)
    assert sorted(np.concatenate(contexts)) == sorted(halves.gradient)


def test_a_target_of_too_few_images_is_refused(world: World, tmp_path: Path) -> None:
    small = plant(tmp_path / "target", 7, captions=3, seed=9)
    with pytest.raises(InputError, match=r"the target has 7 image\(s\); .* needs 8 or more"):
        Chain(out=tmp_path, world=replace(world, target=small)).run("proxy")
    assert len(PairSet(small.folder)) == 21
