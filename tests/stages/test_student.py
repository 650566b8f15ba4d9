"""The students: what each has seen, its bank, the quality of every pair, and the choice of the steps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, World, assert_equal_results, student_config
from planted import plant

from influencespace.data.blocks import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.estimators.similarity import clip_score, neg_clip_loss
from influencespace.stages.student import Student, TargetHalves, image_folds, student_name, train_subset

FOLDS = (None, 0, 1, 2)


def student(chain: Chain, fold: int | None) -> Student:
    return Student(chain.source / "student", student_name(fold))


def test_a_student_is_the_plain_training_on_what_it_may_see(truth: Chain) -> None:
    pool, config = truth.sets["pool"], truth.student
    fold = image_folds(pool, config)
    for k in FOLDS:
        weights = np.ones(len(pool)) if k is None else (fold != k).astype(float)
        trained = train_subset(pool, weights, config.train, 20, config.seed + 1 + (k or 0))
        saved = student(truth, k)
        torch.testing.assert_close(saved.heads.state_dict(), trained.heads.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(saved.preconditioner, trained.preconditioner, rtol=0, atol=0)
        assert saved.sum_of_learning_rates == pytest.approx(trained.sum_of_learning_rates)


def test_a_held_out_fold_changes_nothing_in_its_student(truth: Chain, tmp_path: Path) -> None:
    """Other embeddings for the images of a fold: its own student stays, the others do not."""
    pool = truth.sets["pool"]
    fold = image_folds(pool, truth.student)
    changed = plant(tmp_path / "pool", 120, captions=2, wrong=0.2, seed=1)
    images = np.load(changed.folder / "images.npy")
    images[np.unique(pool.image[fold == 1])] *= -1
    np.save(changed.folder / "images.npy", images)
    world = replace(truth.world, pool=changed)
    other = Chain(out=tmp_path, world=world)
    other.run("student")
    for k in FOLDS:
        left, right = student(truth, k).heads.state_dict(), student(other, k).heads.state_dict()
        assert torch.equal(left["image"], right["image"]) == (k == 1)


def test_banks_are_disjoint_full_and_without_held_out_images(truth: Chain) -> None:
    pool, config = truth.sets["pool"], truth.student
    fold = image_folds(pool, config)
    for k in FOLDS:
        contexts = student(truth, k).bank
        together = np.concatenate(contexts)
        assert len(set(pool.image[together])) == len(together)
        assert {len(context) for context in contexts} == {config.train.batch_size - 1}
        if k is not None:
            assert not (fold[together] == k).any()


@pytest.mark.parametrize("contexts", [2, 3, 8])
def test_all_students_have_equally_many_contexts(truth: Chain, tmp_path: Path, contexts: int) -> None:
    """120 images fill three contexts of 31 pairs, but 80 images, two folds of three, fill only two."""
    chain = Chain(out=tmp_path, world=truth.world, student=student_config(contexts=contexts))
    chain.run("student", "cluster", "curvature", "attribute")
    assert {len(student(chain, k).bank) for k in FOLDS} == {2}


def test_quality_is_scored_by_the_student_of_all_and_by_the_one_that_held_the_pair_out(truth: Chain) -> None:
    pool, config = truth.sets["pool"], truth.student
    quality = read_columns(truth.out / "student" / "quality.parquet")
    fold = image_folds(pool, config)
    for k in FOLDS:
        rows = np.arange(len(pool)) if k is None else np.flatnonzero(fold == k)
        judge = student(truth, k)
        u, t = judge.embed(pool.inputs(rows))
        contexts = [(*judge.embed(c.inputs), c.image) for c in judge.recorded_bank(pool)]
        side = "in" if k is None else "out"
        np.testing.assert_allclose(quality[f"clip_{side}"][rows], clip_score(u, t), atol=1e-5)
        loss = neg_clip_loss(u, t, pool.image[rows], contexts, 1 / config.train.temperature)
        np.testing.assert_allclose(quality[f"neg_clip_{side}"][rows], loss, atol=1e-4)


def test_wrong_captions_have_low_quality(truth: Chain) -> None:
    quality = read_columns(truth.out / "student" / "quality.parquet")["neg_clip_out"]
    wrong = truth.world.pool.wrong
    assert quality[wrong].mean() < quality[~wrong].mean() - quality.std()


@pytest.mark.parametrize("block_size", [16, 256])
def test_blocks_change_nothing(truth: Chain, tmp_path: Path, block_size: int) -> None:
    replace(truth, out=tmp_path, source_folder=truth.out, student=student_config(block_size=block_size)).run(
        "student"
    )
    assert_equal_results(truth.out / "student", tmp_path / "student", spreads=1e-5)


def test_steps_are_doubled_while_that_helps(truth: Chain, tmp_path: Path) -> None:
    config = student_config(choose_steps=True, steps=5, most_doublings=2, folds=2)
    details = Chain(out=tmp_path, world=truth.world, student=config).run("student").details
    first = next(note for note in details["students"] if note["name"] == "all")
    losses = {int(steps): loss for steps, loss in first["target_loss_by_steps"].items()}
    assert set(losses) == {5, 10, 20}
    assert losses[20] < losses[10] < losses[5]  # a planted relation that five steps cannot learn
    assert details["steps"] == 20
    assert {note["steps"] for note in details["students"]} == {20}


def test_steps_stay_where_more_bring_nothing(truth: Chain, tmp_path: Path) -> None:
    config = student_config(choose_steps=True, least_gain=0.99, folds=2)
    details = Chain(out=tmp_path, world=truth.world, student=config).run("student").details
    assert details["steps"] == 20


def test_epochs_are_steps_of_the_whole_pool(truth: Chain, tmp_path: Path) -> None:
    config = replace(student_config(folds=2), epochs=1.5)
    details = Chain(out=tmp_path, world=truth.world, student=config).run("student").details
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
        Chain(out=tmp_path, world=replace(world, target=small)).run("student")
    assert len(PairSet(small.folder)) == 21
