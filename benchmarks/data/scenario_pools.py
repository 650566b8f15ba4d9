"""Pools of real pairs that are corrupted as web data is, each with its planted truth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.data.corruptions import CORRUPTIONS, UNFORESEEN, Draft
from benchmarks.data.datasets import Content, store_pairs
from benchmarks.data.sources import Sources
from influencespace.data.artifacts import fingerprint
from influencespace.data.bucket_files import PAIRS_SCHEMA
from influencespace.data.pair_set import PairSet
from influencespace.data.schema import ImageRef


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One corrupted pool, and the target that is known."""

    corruption: str
    share: float
    captions: int = 5
    seed: int = 1
    target_images: int | None = None
    """Images of the target, each with its captions; None takes all."""
    shifted: bool = False
    """The target is COCO's, the test set is not."""
    own_target: bool = False
    """No target is given: a part of the pool is set apart, corruption and all, as the split stage does."""
    size: float | None = None
    """The share that the others keep, and ours once more; None is the share that is right."""

    @property
    def elsewhere(self) -> bool:
        """Whether no pair of dev is the target, so that all of it is the test set."""
        return self.shifted or self.own_target


SCENARIOS: dict[str, Scenario] = {
    "clean": Scenario(corruption="clean", share=0.0, size=0.7),
    **{f"wrong {share}": Scenario(corruption="wrong", share=share / 100) for share in (10, 20, 30, 40)},
    **{
        name: Scenario(corruption=name, share=0.3)
        for name in ("hard wrong", "boilerplate", "duplicates", "irrelevant", "blurred")
    },
    "web": Scenario(corruption="web", share=1.0),
    "target of 50": Scenario(corruption="wrong", share=0.3, target_images=50),
    "target of 200": Scenario(corruption="wrong", share=0.3, target_images=200),
    "shifted target": Scenario(corruption="wrong", share=0.3, shifted=True),
    "no target": Scenario(corruption="wrong", share=0.3, own_target=True),
}
EVERY_SCENARIO = SCENARIOS | {name: Scenario(corruption=name, share=0.3, seed=7) for name in UNFORESEEN}


def scenario_pool(sources: Sources, scenario: Scenario, cache: Path) -> tuple[PairSet, NDArray[np.str_]]:
    """The pool of a scenario as an embedding artifact, and what is wrong with each pair (n,): "" for good ones."""
    key = ["scenario", scenario.corruption, scenario.share, scenario.captions, scenario.seed]

    def make(folder: Path) -> Content:
        rng = np.random.default_rng(scenario.seed)
        corrupt = CORRUPTIONS[scenario.corruption]
        draft = corrupt(Draft.of(sources, scenario.captions), scenario.share, rng, sources)
        order = rng.permutation(len(draft))  # as the canonical order of uids would be
        used_images, image = np.unique(draft.image[order], return_inverse=True)
        used_texts, text = np.unique(draft.text[order], return_inverse=True)
        images, texts = sources.images(used_images)[image], sources.texts(used_texts)[text]
        np.save(folder / "kind.npy", draft.kind[order])
        columns = {
            "uid": [f"{row:06d}" for row in range(len(order))],
            "image": image,
            "text": text,
            "caption": [str(t) for t in used_texts[text]],
            "clip_score": (images * texts).sum(1),
            "truncated": np.zeros(len(order), bool),
            "sharpness": sources.sharpness(used_images)[image],
            "group": pa.nulls(len(order), pa.string()),
            **{name: [value] * len(order) for name, value in ImageRef(path="").columns().items()},
        }
        return pa.table(columns).select(PAIRS_SCHEMA.names), images, texts

    pairs = store_pairs(cache / "pools" / fingerprint(key), key, make)
    return pairs, np.load(pairs.folder / "kind.npy")
