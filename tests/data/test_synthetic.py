"""The synthetic world: captions that are true, dirt that is known, shards that never change."""

import io
import json
import tarfile
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from influencespace.data.readers import list_shards, read_shard
from influencespace.data.schema import ReadOptions
from influencespace.data.synthetic import (
    SPLITS,
    WorldConfig,
    count_shards,
    plan_image,
    write_shard,
    write_world,
)
from influencespace.data.synthetic.__main__ import main
from influencespace.data.synthetic.captions import ADJECTIVES, NOUNS, agrees, choose_view, write_caption
from influencespace.data.synthetic.config import Place
from influencespace.data.synthetic.dirt import scene_at, view_at
from influencespace.data.synthetic.scenes import (
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    RADII,
    RARE_COLOURS,
    RARE_SHAPES,
    SHAPES,
    SIDE,
    Group,
    Scene,
    draw_scene,
    render,
)
from influencespace.data.uids import pair_uids
from influencespace.errors import InputError

SMALL = WorldConfig(pretrain=30, pool=70, target=20, test=20, shard_size=25)
seeds = st.integers(0, 2**32)


def read_world(folder):
    """{split: {uid: (jpeg, json)}} of all shards, and the text of each."""
    world = defaultdict(dict)
    for path in sorted(folder.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for key in sorted({name.split(".")[0] for name in files}):
            meta = json.loads(files[f"{key}.json"])
            assert files[f"{key}.txt"].decode() == meta["captions"][0]
            world[path.parent.name][meta["uid"]] = (files[f"{key}.jpg"], meta)
    return world


def read_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), SMALL)


@given(seed=seeds, rare=st.booleans())
def test_a_view_is_true_of_its_scene_and_rare_scenes_have_nothing_of_others(seed, rare):
    rng = Random(seed)
    scene = draw_scene(rng, rare=rare)
    assert agrees(choose_view(scene, rng), scene)
    assert {group.shape for group in scene.groups} <= set(RARE_SHAPES if rare else SHAPES)
    assert {group.colour for group in scene.groups} <= set(RARE_COLOURS if rare else COLOURS)
    assert (scene.relation != "") == (len(scene.groups) == 2)


@given(seed=seeds)
def test_words_say_just_what_the_view_says(seed):
    rng = Random(seed)
    view = choose_view(draw_scene(rng, rare=rng.random() < 0.5), rng)
    caption = f" {write_caption(view, rng).lower().rstrip('.')} "
    said = {view.background} | {word for group in view.groups for word in (group.size, group.colour)}
    for meaning in (*RADII, *PALETTE, *BACKGROUNDS):
        # "dark blue" is a background and no blue
        text = caption if meaning == "navy" else caption.replace("dark blue", "")
        words = ADJECTIVES.get(meaning, (meaning,))
        assert any(f" {word} " in text for word in words) == (meaning in said), (meaning, caption)
    shapes = {group.shape for group in view.groups}
    for shape in (*SHAPES, *RARE_SHAPES, ""):
        nouns = NOUNS.get(shape, (shape,))
        assert any(f" {noun}{s} " in caption for noun in nouns for s in ("", "s", "es")) == (shape in shapes)


RED = Group(count=2, size="small", colour="red", shape="star")
BLUE = Group(count=1, size="large", colour="blue", shape="ring")
SCENE = Scene(groups=(RED, BLUE), relation="left", background="white")


@pytest.mark.parametrize(
    ("view", "true"),
    [
        (SCENE, True),
        (replace(SCENE, background=""), True),
        (replace(SCENE, background="navy"), False),
        (replace(SCENE, relation="above"), False),
        (replace(SCENE, groups=(BLUE, RED)), False),  # the wrong way round
        (replace(SCENE, groups=(BLUE, RED), relation=""), True),
        (replace(SCENE, groups=(replace(RED, count=3), BLUE)), False),
        (replace(SCENE, groups=(replace(RED, size="", shape=""), BLUE)), True),
        (Scene(groups=(BLUE,), relation="", background=""), True),
        (Scene(groups=(replace(BLUE, colour="pink"),), relation="", background=""), False),
    ],
)
def test_agreement_is_decided_fact_by_fact(view, true):
    assert agrees(view, SCENE) == true


def test_one_caption_needs_both_groups():
    assert not agrees(SCENE, Scene(groups=(RED,), relation="", background="white"))


def nearest_colour(pixels):
    """For each pixel the name of the nearest colour of shapes and backgrounds."""
    palette = {**COLOURS, **BACKGROUNDS}
    distance = np.abs(pixels[..., None, :].astype(int) - np.array(list(palette.values()))).sum(-1)
    return np.array(list(palette))[distance.argmin(-1)]


@given(seed=seeds, relation=st.sampled_from(["left", "above"]), shape=st.sampled_from(SHAPES + RARE_SHAPES))
@settings(max_examples=40)
def test_the_picture_shows_the_colours_where_the_scene_has_them(seed, relation, shape):
    scene = Scene(
        groups=(
            Group(count=2, size="large", colour="red", shape=shape),
            Group(count=1, size="large", colour="blue", shape=shape),
        ),
        relation=relation,
        background="white",
    )
    picture = render(scene, Random(seed))
    assert picture.size == (SIDE, SIDE)
    assert picture.mode == "RGB"
    names = nearest_colour(np.asarray(picture))
    axis = 1 if relation == "left" else 0
    assert np.nonzero(names == "red")[axis].mean() < SIDE / 2 < np.nonzero(names == "blue")[axis].mean()
    assert (names == "red").sum() > (names == "blue").sum() * 1.3
    assert (names == "white").mean() > 0.4


def test_size_is_to_be_seen():
    def area(size):
        group = Group(count=1, size=size, colour="red", shape="circle")
        scene = Scene(groups=(group,), relation="", background="white")
        return (nearest_colour(np.asarray(render(scene, Random(0)))) == "red").sum()

    assert area("large") > 2 * area("small")


def plans_of(config, split, number):
    return [plan_image(config, split, index) for index in range(number)]


def test_rates_of_dirt_are_as_configured():
    config = WorldConfig(
        wrong_captions=0.3, near_duplicates=0.1, boilerplate=0.05, irrelevant=0.1, rare_group=0.08
    )
    plans = plans_of(config, "pool", 2000)
    kinds = Counter(truth.kind for plan in plans for truth in plan.truth)
    expected = {"clean": 0.45, "wrong": 0.3, "duplicate": 0.1, "boilerplate": 0.05, "irrelevant": 0.1}
    for kind, rate in expected.items():
        assert kinds[kind] / 2000 == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 2000) ** 0.5)
    groups = Counter(plan.group for plan in plans)
    assert groups["rare"] / 2000 == pytest.approx(0.08 * 0.9, abs=0.025)


@pytest.mark.parametrize("split", ["target", "test"])
def test_target_and_test_are_clean(split):
    plans = plans_of(WorldConfig(rare_group_clean=0.5), split, 300)
    assert {truth.kind for plan in plans for truth in plan.truth} == {"clean"}
    assert 100 < sum(plan.group == "rare" for plan in plans) < 200


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_a_wrong_caption_is_false_of_its_image_and_true_of_another(captions_per_image):
    config = WorldConfig(captions_per_image=captions_per_image)
    places = {Place(config, "pool", index).uid: Place(config, "pool", index) for index in range(700)}
    originals, plans = [], plans_of(config, "pool", 500)
    for plan in plans:
        for truth, caption in zip(plan.truth, plan.captions):
            if truth.kind != "wrong":
                assert not truth.wrong
                continue
            uid, _, position = truth.original.partition("#")
            lender = places[uid]
            assert uid != plan.uid
            view = view_at(lender, int(position or 0))
            assert agrees(view, scene_at(lender))
            assert not agrees(view, plan.content)
            assert caption == write_caption(view, lender.rng(f"words {position or 0}"))
            originals.append(truth.original)
    assert len(originals) > 60 * captions_per_image
    assert len(set(originals)) > 0.98 * len(originals)  # a permutation but for rare skips


def test_a_near_duplicate_looks_like_its_original_and_nothing_else_does():
    config = WorldConfig(near_duplicates=0.3)
    plans = {plan.uid: plan for plan in plans_of(config, "pool", 200)}

    def pixels(plan):
        return np.asarray(Image.open(io.BytesIO(plan.jpeg()))).astype(float)

    copies = [plan for plan in plans.values() if plan.truth[0].kind == "duplicate"]
    strangers = [plan for plan in plans.values() if plan.truth[0].kind == "clean"]
    assert len(copies) > 30
    for copy, stranger in zip(copies, strangers):
        original = plans[copy.truth[0].original]
        assert original.truth[0].kind == "clean"
        assert copy.jpeg() != original.jpeg()
        near = np.abs(pixels(copy) - pixels(original)).mean()
        assert near < 20
        assert original is stranger or near < np.abs(pixels(copy) - pixels(stranger)).mean()
    reworded = [copy for copy in copies if copy.captions != plans[copy.truth[0].original].captions]
    assert 0 < len(reworded) < len(copies)


def test_irrelevant_pairs_use_another_vocabulary():
    config = WorldConfig(irrelevant=0.4, boilerplate=0, near_duplicates=0, wrong_captions=0)
    words = defaultdict(set)
    for plan in plans_of(config, "pool", 600):
        words[plan.truth[0].kind].update(plan.captions[0].lower().rstrip(".").split())
    assert words["irrelevant"] & words["clean"] <= {"a", "an", "of", "on", "over"}


def test_retrieval_is_neither_trivial_nor_hopeless():
    """Who understands every caption finds the image first in most cases, but not in all."""
    config = WorldConfig()
    places = [Place(config, "test", index) for index in range(400)]
    scenes = [scene_at(place) for place in places]
    views = [view_at(place, 0) for place in places]
    matches = [sum(agrees(view, scene) for scene in scenes) for view in views]
    assert 0.7 < np.mean([1 / number for number in matches]) < 0.97


@given(index=st.integers(0, 5000), split=st.sampled_from(SPLITS), seed=st.integers(0, 100))
@settings(max_examples=30)
def test_a_pair_depends_on_seed_split_and_index_only(index, split, seed):
    plan = plan_image(WorldConfig(seed=seed), split, index)
    larger = plan_image(WorldConfig(seed=seed, pretrain=10**9, pool=10**9, shard_size=7), split, index)
    assert (plan.uid, plan.captions, plan.truth) == (larger.uid, larger.captions, larger.truth)
    assert plan.jpeg() == larger.jpeg()
    other_seed = plan_image(WorldConfig(seed=seed + 1), split, index)
    other_index = plan_image(WorldConfig(seed=seed), split, index + 1)
    assert len({plan.uid, other_seed.uid, other_index.uid}) == 3


def test_splits_share_no_uid():
    uids = [plan.uid for split in SPLITS for plan in plans_of(SMALL, split, 50)]
    assert len(set(uids)) == len(uids)
    assert all(len(uid) == 32 and int(uid, 16) >= 0 for uid in uids)


def test_shards_hold_every_pair_once_and_truth_lies_beside_them(written):
    world = read_world(written)
    for split in SPLITS:
        plans = plans_of(SMALL, split, SMALL.size(split))
        assert list(world[split]) == [plan.uid for plan in plans]
        assert len(list((written / split).iterdir())) == count_shards(SMALL, split)
        for plan, (jpeg, meta) in zip(plans, world[split].values()):
            assert meta == {"uid": plan.uid, "captions": list(plan.captions), "group": plan.group}
            assert jpeg == plan.jpeg()
            assert Image.open(io.BytesIO(jpeg)).size == (SIDE, SIDE)
        truth = pq.read_table(written / "truth" / f"{split}.parquet").to_pylist()
        assert truth == [row._asdict() for plan in plans for row in plan.truth]


def test_a_second_world_is_the_same_to_the_byte(written, tmp_path):
    assert read_bytes(write_world(tmp_path, SMALL)) == read_bytes(written)


def test_an_interrupted_world_is_finished_and_finished_shards_are_kept(written, tmp_path):
    write_world(tmp_path, SMALL)
    (tmp_path / "pool" / "00001.tar").unlink()
    (tmp_path / "truth" / "pool.parquet").unlink()
    kept = tmp_path / "pool" / "00000.tar"
    before = kept.stat().st_mtime_ns
    write_world(tmp_path, SMALL)
    assert kept.stat().st_mtime_ns == before
    assert read_bytes(tmp_path) == read_bytes(written)


def test_a_shard_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("influencespace.data.synthetic.world.add_sample", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path, SMALL, "pool", 0)
    assert list((tmp_path / "pool").iterdir()) == []


def test_a_folder_holds_one_world_only(written):
    with pytest.raises(InputError, match=r"pool: 70 there, 71 asked for.*choose another folder"):
        write_world(written, replace(SMALL, pool=71))


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_the_reader_finds_the_pairs_that_the_truth_names(tmp_path, captions_per_image):
    config = WorldConfig(
        pretrain=0, pool=40, target=5, test=0, captions_per_image=captions_per_image, shard_size=15
    )
    write_world(tmp_path, config)
    shards = list_shards(str(tmp_path / "pool"))
    samples = [sample for shard in shards for sample in read_shard(shard, ReadOptions())]
    uids = [uid for sample in samples for uid in pair_uids(sample)]
    assert uids == pq.read_table(tmp_path / "truth" / "pool.parquet").column("uid").to_pylist()
    assert [sample.captions for sample in samples] == [plan.captions for plan in plans_of(config, "pool", 40)]
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize(
    "rates", [{"wrong_captions": 1.5}, {"wrong_captions": 0.9, "irrelevant": 0.1}, {"pool": -1}]
)
def test_impossible_worlds_are_refused(rates):
    with pytest.raises(
        ValueError, match=r"less than or equal to 1|leave at least|greater than or equal to 0"
    ):
        WorldConfig(**rates)


def test_the_command_writes_the_world_it_is_asked_for(tmp_path, capsys):
    sizes = ["--pretrain", "3", "--pool", "5", "--target", "2", "--test", "2", "--seed", "4"]
    assert main(["--out", str(tmp_path), *sizes, "--wrong-captions", "0.5"]) == 0
    assert json.loads((tmp_path / "world.json").read_text())["wrong_captions"] == 0.5
    assert len(read_world(tmp_path)["pool"]) == 5
    assert main(["--out", str(tmp_path), *sizes]) == 2
    assert "wrong_captions: 0.5 there, 0.25 asked for" in capsys.readouterr().err
