"""The proxies: what each has seen, its bank, the quality of every pair, and the choice of the steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from chain import World, beside, carry, carry_beside, columns, run_on, with_sets
from planted import plant

from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.estimators.filters import clip_score, neg_clip_loss
from influencespace.run import Run
from influencespace.stages.proxies.proxy import Proxy, proxy_name
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.proxies.train_many import Given, fold_of_rows, train

FOLDS = (None, 0, 1, 2)


def proxy(run: Run, fold: int | None) -> Proxy:
    return Proxy(run.at("proxies"), proxy_name(fold))


def fold_of_pairs(run: Run) -> np.ndarray:
    return fold_of_rows(run.pool, slice(None), run.config.proxy.folds, run.seed)


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
    images = np.load(changed.folder / "images.npy")
    images[np.unique(truth.pool.image[fold_of_pairs(truth) == 1])] *= -1
    np.save(changed.folder / "images.npy", images)
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
    settings = {"train.steps": 5, "choose_steps": True, "max_doublings": 2, "folds": 2}
    details = carry_beside(truth, tmp_path, "proxies", **settings).manifest("proxies").details
    first = next(record for record in details["proxies"] if record["name"] == "all")
    losses = {int(steps): loss for steps, loss in first["target_loss_by_steps"].items()}
    assert set(losses) == {5, 10, 20}
    assert losses[20] < losses[10] < losses[5]  # a planted relation that five steps cannot learn
    assert {details["steps"], *(record["steps"] for record in details["proxies"])} == {20}


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
