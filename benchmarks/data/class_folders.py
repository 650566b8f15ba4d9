"""Class folders of the synthetic world: 48 classes of colour and background, and some pictures in the wrong folder.

The demo's encoder hardly distinguishes shapes, so that wrong names of shapes would cost a proxy little; these it knows.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from benchmarks.data.datasets import embed_into
from influencespace.core.arrays import BoolArray, IntArray
from influencespace.data.artifacts import fingerprint
from influencespace.data.pair_set import PairSet
from influencespace.data.readers.class_folders import CAPTION
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.data.synthetic.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES, Group, Scene, render
from influencespace.estimators.influence import NegativeBatch
from influencespace.models.encoders import load_encoder
from influencespace.stages.ingest.fit_encoder import FitEncoder

CLASSES = [(colour, background) for colour in COLOURS for background in BACKGROUNDS]
NAMES = [f"{colour} shape on {background}" for colour, background in CLASSES]
ENCODER_PAIRS = 1000  # as in the demo


@dataclass(frozen=True, kw_only=True)
class ClassWorld:
    """Pictures in class folders, embedded by a tiny CLIP that was fitted on other scenes of the world."""

    cache: Path
    seed: int
    """Of the pool: its pictures and which are in the wrong folder."""
    pool: int
    """Pictures of the pool; every split has about as many of each class."""
    wrong: float
    """Share of the pool's pictures in the folder of another class."""
    target: int
    test: int
    encoder_steps: int = 300
    """The demo's."""

    @property
    def key(self) -> str:
        """What its embeddings depend on."""
        return fingerprint([NAMES, replace(self, cache=Path())])

    @cached_property
    def encoder(self) -> Path:
        """Fitted as the demo's, on scenes of its own with 25 % wrong captions."""
        folder = self.cache / "classes" / fingerprint(["encoder", ENCODER_PAIRS, self.encoder_steps])
        scenes = WorldConfig(pretrain=ENCODER_PAIRS, pool=0, target=0, test=0, wrong_captions=0.25)
        write_world(folder / "world", scenes)
        shards = str(folder / "world" / "pretrain")
        FitEncoder(shards=shards, out=folder / "encoder", steps=self.encoder_steps, seed=0)()
        return folder / "encoder"

    def pairs(self, split: str) -> PairSet:
        """A split, written as class folders and embedded once."""
        count = getattr(self, split)
        seed, wrong = (self.seed, self.wrong) if split == "pool" else (0, 0.0)
        folder = self.cache / "classes" / fingerprint([NAMES, split, seed, count, wrong, self.encoder_steps])
        if not (folder / "written").is_file():
            write_classes(folder / "pictures", split, seed, count, wrong)
            (folder / "written").touch()
        return embed_into(folder, str(folder / "pictures"), self.encoder)

    def prompts(self) -> Tensor:
        """The class names' prompts by the encoder (classes, D)."""
        encoder = load_encoder(str(self.encoder))
        embedded: Tensor = encoder.encode_text(encoder.tokenize([CAPTION.format(name) for name in NAMES])[0])
        return embedded


def write_classes(folder: Path, split: str, seed: int, count: int, wrong: float) -> None:
    """Write `count` pictures; the class of a picture is its number modulo the classes, its folder mostly too."""
    moved = np.random.default_rng(seed).permutation(count) < round(wrong * count)
    for number in range(count):
        rng = Random(f"{split} {seed} {number}")
        label = number % len(NAMES)
        if moved[number]:
            label = (label + rng.randrange(1, len(NAMES))) % len(NAMES)
        path = folder / NAMES[label] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(draw(number % len(NAMES), rng), rng).save(path, "JPEG", quality=90)


def draw(label: int, rng: Random) -> Scene:
    """A scene of one class: what is left open by it is drawn."""
    colour, background = CLASSES[label]
    size, shape = rng.choice(tuple(RADII)), rng.choice(SHAPES)
    group = Group(count=rng.randint(1, 4), size=size, colour=colour, shape=shape)
    return Scene(groups=(group,), relation="", background=background)


def true_classes(pairs: PairSet) -> IntArray:
    """The class that each picture really shows (n,), for judging alone."""
    return np.array([int(Path(str(uid)).stem) for uid in pairs.column("uid")]) % len(NAMES)


def folder_classes(pairs: PairSet) -> IntArray:
    """The class of each picture's folder (n,)."""
    return np.array([NAMES.index(str(group)) for group in pairs.column("group")])


@torch.no_grad()
def right(heads: torch.nn.Module, pairs: NegativeBatch, prompts: Tensor, labels: IntArray) -> BoolArray:
    """Whether the nearest class prompt is the true one, of each picture (n,)."""
    u, _ = heads(*pairs.inputs)
    _, names = heads(prompts, prompts)
    correct: BoolArray = (u @ names.T).argmax(1).numpy() == labels
    return correct
