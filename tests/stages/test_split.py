"""Roles: given ones are taken whole, missing ones are cut by image, and too little is refused."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import Idle
from planted import Planted, plant

from influencespace.config import load_config
from influencespace.core.hashing import fold_of
from influencespace.data.artifacts import Manifest, read_manifest
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, LocalEngine
from influencespace.errors import InputError
from influencespace.run import Run, carry_out
from influencespace.stages.ingest.split import Split, pair_sets

FIFTH = {"split.target_share": 0.2}


def cut(
    out: Path,
    settings: Mapping[str, Any] | None = None,
    *,
    engine: Engine | None = None,
    **roles: Planted,
) -> tuple[Manifest, dict[str, PairSet]]:
    """The split of a run whose roles are embedded: links to planted ones."""
    for role, planted in roles.items():
        (out / "embed").mkdir(parents=True, exist_ok=True)
        if not (out / "embed" / role).exists():
            (out / "embed" / role).symlink_to(planted.folder)
    config = load_config(None, {f"data.{role}": "somewhere" for role in roles} | dict(settings or {}))
    run = Run(folder=out, config=config)
    return carry_out(Split(), run, engine or LocalEngine()), pair_sets(run)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("pool") / "pool", 400, captions=2, wrong=0.2)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("target") / "target", 60, captions=3, seed=2)


def images(pairs: PairSet) -> set[int]:
    return set(pairs.image.tolist())


def test_given_roles_are_taken_whole(pool: Planted, target: Planted, tmp_path: Path) -> None:
    test = plant(tmp_path / "own", 60, captions=3, seed=3)
    manifest, sets = cut(tmp_path / "run", pool=pool, target=target, test=test)
    for role, planted in (("pool", pool), ("target", target), ("test", test)):
        assert sets[role].folder.resolve() == planted.folder
        np.testing.assert_array_equal(sets[role].rows, np.arange(len(planted)))
    assert manifest.details["notes"] == []
    assert manifest.details["rows"] == {"pool": 800, "target": 180, "test": 180}
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected) == (1160, 1160, 0)


def test_a_run_folder_may_be_moved(pool: Planted, tmp_path: Path) -> None:
    shutil.copytree(pool.folder, tmp_path / "run" / "embed" / "pool")
    cut(tmp_path / "run", FIFTH, pool=pool)
    (tmp_path / "run").rename(tmp_path / "moved")
    after = pair_sets(Run(folder=tmp_path / "moved", config=None))
    assert after["pool"].folder == tmp_path / "moved" / "embed" / "pool"
    uids = PairSet(pool.folder).column("uid")
    assert after["pool"].column("uid") == [uids[row] for row in after["pool"].rows]


@pytest.mark.parametrize("name", ["run", "run/split"])
def test_what_lies_elsewhere_by_a_link_finds_its_embeddings(pool: Planted, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "scratch" / "deep" / name
    elsewhere.mkdir(parents=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(elsewhere)
    for settings in (FIFTH, {"split.target_share": 0.3}):
        _, sets = cut(tmp_path / "run", settings, pool=pool)
        assert sets["pool"].folder.resolve() == pool.folder
        assert len(sets["pool"]) > 0
    assert (tmp_path / name).is_symlink()
    assert list(elsewhere.rglob("pool.npy"))


def test_embeddings_of_two_encoders_are_refused(pool: Planted, tmp_path: Path) -> None:
    other = plant(tmp_path / "other", 60, dimension=12)
    with pytest.raises(InputError, match=r"cannot be compared \(pool 16, target 12\)"):
        cut(tmp_path / "run", pool=pool, target=other)


@pytest.mark.parametrize(("asked", "drawn"), [(0.4, "50.00%"), (0.35, "33.33%"), (0.2, "20.00%")])
def test_the_reported_share_is_the_one_that_was_drawn(
    pool: Planted, tmp_path: Path, asked: float, drawn: str
) -> None:
    manifest, sets = cut(tmp_path, {"split.target_share": asked}, pool=pool)
    assert f"a seeded {drawn} of its images" in manifest.details["notes"][0]
    assert len(images(sets["pool"])) == pytest.approx(400 * (1 - float(drawn[:-1]) / 100), abs=30)


def test_pairs_in_two_roles_are_reported(pool: Planted, target: Planted, tmp_path: Path) -> None:
    manifest, _ = cut(tmp_path, pool=pool, target=target, test=target)
    (note,) = manifest.details["notes"]
    assert note.startswith("180 of the 180 pairs of the test are in the target too")


def test_a_missing_test_set_is_half_of_the_targets_images(
    pool: Planted, target: Planted, tmp_path: Path
) -> None:
    manifest, sets = cut(tmp_path, pool=pool, target=target)
    assert images(sets["target"]).isdisjoint(images(sets["test"]))
    assert len(images(sets["target"])) == len(images(sets["test"])) == 30
    together = np.concatenate([sets["target"].rows, sets["test"].rows])
    assert sorted(together) == list(range(len(target)))
    (note,) = manifest.details["notes"]
    assert note.startswith("no test set was given")
    assert manifest.rejected == 0


def test_a_missing_target_is_the_better_half_of_some_images_of_the_pool(
    pool: Planted, tmp_path: Path
) -> None:
    manifest, sets = cut(tmp_path, FIFTH, pool=pool)
    whole = PairSet(pool.folder)
    pooled = images(sets["pool"])
    chosen = images(sets["target"]) | images(sets["test"])
    assert pooled.isdisjoint(chosen)
    assert images(sets["target"]).isdisjoint(images(sets["test"]))
    assert 280 < len(pooled) < 360
    # about 80 images were drawn with two pairs each, of which the better half is taken
    drawn = np.flatnonzero(~np.isin(whole.image, list(pooled)))
    taken = np.concatenate([sets["target"].rows, sets["test"].rows])
    assert len(drawn) == 2 * (400 - len(pooled))
    assert len(taken) == pytest.approx(len(drawn) / 2, abs=1)
    left = np.setdiff1d(drawn, taken)
    assert whole.clip_score[taken].min() >= whole.clip_score[left].max()
    assert manifest.rejected == len(left)
    assert manifest.rows_in == manifest.rows_out + manifest.rejected == 800
    assert [note.split(":")[0] for note in manifest.details["notes"]] == [
        "no target was given",
        "no test set was given",
    ]


def test_a_missing_target_with_a_test_set_keeps_the_test_set(
    pool: Planted, target: Planted, tmp_path: Path
) -> None:
    manifest, sets = cut(tmp_path, pool=pool, test=target)
    assert len(sets["test"]) == len(target)
    assert images(sets["pool"]).isdisjoint(images(sets["target"]))
    assert sets["target"].folder.resolve() == pool.folder
    assert len(manifest.details["notes"]) == 1


def test_the_draw_of_a_target_says_nothing_of_the_folds_of_what_is_left(
    pool: Planted, tmp_path: Path
) -> None:
    """Both are thresholds on a hash of the image: with one seed a fold could lose all of its images to the target."""
    _, sets = cut(tmp_path, {"split.target_share": 0.49}, pool=pool)
    left = sets["pool"].image
    assert np.bincount(fold_of(left, 2, load_config().seed), minlength=2).min() > len(left) / 4


def test_the_seed_decides(pool: Planted, tmp_path: Path) -> None:
    rows = [
        cut(tmp_path / str(i), FIFTH | {"seed": seed}, pool=pool)[1]["target"].rows
        for i, seed in enumerate([0, 0, 1])
    ]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


def test_a_second_call_does_nothing(pool: Planted, target: Planted, tmp_path: Path) -> None:
    manifest, _ = cut(tmp_path, pool=pool, target=target)
    assert cut(tmp_path, engine=Idle(), pool=pool, target=target)[0] == manifest


def test_a_role_of_too_few_images_is_refused(pool: Planted, target: Planted, tmp_path: Path) -> None:
    few = plant(tmp_path / "few", 15, captions=4, seed=5)
    with pytest.raises(InputError, match=r"the pool has 60 pair\(s\) of 15 image\(s\); 16 images or more"):
        cut(tmp_path / "a", pool=few, target=target, test=target)
    with pytest.raises(InputError, match=r"the target has 60 pair\(s\) of 15 image\(s\)"):
        cut(tmp_path / "b", pool=pool, target=few, test=target)
    assert read_manifest(tmp_path / "a" / "split") is None


def test_a_role_that_was_set_apart_and_is_too_small_is_explained(
    pool: Planted, target: Planted, tmp_path: Path
) -> None:
    advice = r"No target and no test was given, .* give one, or enlarge split\.target_share"
    with pytest.raises(InputError, match=rf"the (target|test) has .* {advice}"):
        cut(tmp_path / "a", {"split.target_share": 0.05}, pool=pool)
    few = plant(tmp_path / "few", 20, seed=5)
    with pytest.raises(InputError, match=r"of 10 image\(s\).* No test was given, .* enlarge the target"):
        cut(tmp_path / "b", pool=pool, target=few)


def test_roles_that_are_not_embedded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no finished embed/pool stage"):
        carry_out(Split(), Run(folder=tmp_path, config=load_config()), LocalEngine())
