"""Pools of real pairs that are corrupted as web data is, each with its planted truth."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.data.corruptions import CORRUPTIONS, UNFORESEEN, Draft
from benchmarks.data.datasets import Content, store_pairs
from benchmarks.data.sources import Sources
from influencespace.core.arrays import BoolArray
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
    target: Literal["exchangeable", "seen", "shifted", "own"] = "exchangeable"
    """Images drawn as those of the pool are, pictures that the encoder knows better (`dev`), COCO's, or none: then a part of the
    pool is set apart, corruption and all, as the split stage does."""
    target_images: int | None = None
    """Images of an exchangeable target, each with its captions; None takes all."""
    size: float | None = None
    """The share that the others keep, and ours once more; None is the share that is right."""

    @property
    def usual(self) -> bool:
        """Whether the target is what it is in most scenarios."""
        return self.target == "exchangeable" and self.target_images is None


WRONG: dict[str, Scenario] = {
    f"wrong {share}": Scenario(corruption="wrong", share=share / 100) for share in (10, 20, 30, 40)
}
SCENARIOS: dict[str, Scenario] = {
    "clean": Scenario(corruption="clean", share=0.0, size=0.7),
    **WRONG,
    **{
        name: Scenario(corruption=name, share=0.3)
        for name in ("hard wrong", "boilerplate", "duplicates", "irrelevant", "blurred")
    },
    "web": Scenario(corruption="web", share=1.0),
    "target of 50": Scenario(corruption="wrong", share=0.3, target_images=50),
    "target of 200": Scenario(corruption="wrong", share=0.3, target_images=200),
    "seen target": Scenario(corruption="wrong", share=0.3, target="seen"),
    "shifted target": Scenario(corruption="wrong", share=0.3, target="shifted"),
    "no target": Scenario(corruption="wrong", share=0.3, target="own"),
}
EVERY_SCENARIO = SCENARIOS | {name: Scenario(corruption=name, share=0.3) for name in UNFORESEEN}


def scenario_pool(
    sources: Sources, scenario: Scenario, curated: BoolArray, seed: int, cache: Path
) -> tuple[PairSet, NDArray[np.str_]]:
    """The pool of a scenario as an embedding artifact, and what is wrong with each pair (n,): "" for good ones.

    It is made of the sources' pairs that are to be curated (m,), or of their first captions.
    """
    about = [scenario.corruption, scenario.share, scenario.captions, seed, PAIRS_SCHEMA.names]
    key = ["scenario", *about, fingerprint(np.flatnonzero(curated).tolist())]

    def make(folder: Path) -> Content:
        rng = np.random.default_rng(seed)
        corrupt = CORRUPTIONS[scenario.corruption]
        draft = corrupt(Draft.of(sources, scenario.captions, curated), scenario.share, rng, sources)
        order = rng.permutation(len(draft))  # as the canonical order of uids would be
        used_images, image = np.unique(draft.image[order], return_inverse=True)
        used_texts, text = np.unique(draft.text[order], return_inverse=True)
        images, texts = sources.images(used_images)[image], sources.texts(used_texts)[text]
        np.save(folder / "kind.npy", draft.kind[order])
        columns = {
            "uid": [f"{row:06d}" for row in range(len(order))],
            "image": image,
            "text": text,
            "caption": np.array(sources.words(used_texts), object)[text],
            "clip_score": (images * texts).sum(1),
            "truncated": np.zeros(len(order), bool),
            "sharpness": sources.sharpness(used_images)[image],
            "group": pa.nulls(len(order), pa.string()),
            **{name: [value] * len(order) for name, value in ImageRef(path="").columns().items()},
        }
        return pa.table(columns).select(PAIRS_SCHEMA.names), images, texts

    pairs = store_pairs(cache / "pools" / fingerprint(key), key, make)
    return pairs, np.load(pairs.folder / "kind.npy")
