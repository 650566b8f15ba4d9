"""Zero-shot accuracy of a whole run: classes are backgrounds of scenes, and the test pairs say theirs."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from PIL import Image
from safetensors.torch import load_file

from influencespace import pipeline
from influencespace.config import load_config
from influencespace.data.embeddings import EmbeddingTable
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.data.synthetic.config import Place
from influencespace.data.synthetic.dirt import scene_at
from influencespace.data.synthetic.scenes import BACKGROUNDS
from influencespace.errors import InputError
from influencespace.models.encoders import load_encoder
from influencespace.stages.ingest.fit_encoder import FitEncoder
from influencespace.stages.rivals.names import DEFAULT as METHODS

pytestmark = pytest.mark.e2e
CLASSES = tuple(BACKGROUNDS)
TEMPLATES = ("a red square on a {} background", "two blue circles on a {} background", "a star on {}")
STEPS = 200
TESTED = 120


def with_backgrounds(shards: Path, config: WorldConfig) -> dict[str, tuple[bytes, str]]:
    """Writes each test scene's background as the group of its pair; gives encoded image and background by uid."""
    images: dict[str, tuple[bytes, str]] = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in [name for name in members if name.endswith(".json")]:
            fields = json.loads(members[name])
            place = Place(config, "test", int(name.partition(".")[0]))
            background = scene_at(place).background
            members[name] = json.dumps(fields | {"group": background}).encode()
            images[fields["uid"]] = members[name.replace(".json", ".jpg")], background
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return images


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[bytes, str]]]:
    """A world with an encoder that has learned some backgrounds, and its test images by uid."""
    folder = tmp_path_factory.mktemp("scenes")
    config = WorldConfig(
        seed=3, pretrain=500, pool=300, target=80, test=TESTED, wrong_captions=0.1, rare_group_clean=0
    )
    write_world(folder, config)
    FitEncoder(shards=str(folder / "pretrain"), out=folder / "encoder", steps=STEPS, seed=0)()
    return folder, with_backgrounds(folder / "test", config)


@pytest.fixture(scope="module")
def summary(scenes: tuple[Path, Any]) -> dict[str, Any]:
    settings = {"evaluate__classes": list(CLASSES), "evaluate__templates": list(TEMPLATES)}
    return run_here(scenes[0], scenes[0] / "run", **settings, train__seeds=[0, 1])


def counted(world: Path, images: dict[str, tuple[bytes, str]], method: str, seed: int) -> float:
    """Accuracy from the pictures themselves, one image and one class at a time."""
    encoder = load_encoder(str(world / "encoder"), device="cpu")
    heads = load_file(world / "run" / "train" / f"{method}-{seed}.safetensors")
    classes = []
    for name in CLASSES:
        tokens, _ = encoder.tokenize([template.format(name) for template in TEMPLATES])
        prompts = encoder.encode_text(tokens) @ heads["text"]
        classes.append(sum(prompt / prompt.norm() for prompt in prompts))
    right = 0
    for data, background in images.values():
        pixels = encoder.preprocess_images([Image.open(io.BytesIO(data)).convert("RGB")])
        image = encoder.encode_image(pixels)[0] @ heads["image"]
        cosines = [float(torch.cosine_similarity(image, name, dim=0)) for name in classes]
        right += CLASSES[cosines.index(max(cosines))] == background
    return 100 * right / len(images)


@torch.no_grad()
@pytest.mark.parametrize("method", ["curated", "random"])
def test_accuracy_is_what_counting_gives(
    scenes: tuple[Path, dict[str, tuple[bytes, str]]], summary: dict[str, Any], method: str
) -> None:
    world, images = scenes
    assert len(images) == TESTED
    expected = sum(counted(world, images, method, seed) for seed in (0, 1)) / 2
    one_image = 100 / TESTED / 2
    assert summary["methods"][method]["zero_shot_accuracy"] == pytest.approx(expected, abs=1.01 * one_image)


def test_every_method_has_an_accuracy_above_chance(summary: dict[str, Any]) -> None:
    assert set(summary["methods"]) == set(METHODS)
    for name, method in summary["methods"].items():
        assert 100 / len(CLASSES) + 10 < method["zero_shot_accuracy"] <= 100, name


def test_only_images_of_a_class_count(
    scenes: tuple[Path, dict[str, tuple[bytes, str]]], summary: dict[str, Any]
) -> None:
    """With a single class, every image that has it is right, and no other is asked; without classes there is no figure."""
    world, _ = scenes
    groups = EmbeddingTable.open(world / "run" / "embed" / "test").pairs("group")["group"].to_pylist()
    assert set(groups) == set(CLASSES)
    one = run_here(world, world / "run", evaluate__classes=["navy"], train__seeds=[0, 1])
    assert {method["zero_shot_accuracy"] for method in one["methods"].values()} == {100.0}
    none = run_here(world, world / "run", train__seeds=[0, 1])
    assert {method["zero_shot_accuracy"] for method in none["methods"].values()} == {None}
    assert none["stages"]["train"] == summary["stages"]["train"]


def test_classes_need_an_encoder_for_their_names(tmp_path: Path) -> None:
    """Said before anything is read, not after hours."""
    config = load_config(None, {"data.embeddings": str(tmp_path), "evaluate.classes": ["navy"]})
    with pytest.raises(InputError, match="no encoder was given"):
        pipeline.check(config)
