"""Pools of real pairs with the kinds of dirt that web data has, each with its planted truth, and their curation."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from baselines import baselines
from common import SCORING, code_version
from curation import Curation
from dirt import (
    CLEAN,
    Dirt,
    Draft,
    blurred,
    boilerplate,
    clean,
    covered,
    cut,
    doubled,
    duplicates,
    file_names,
    garbled,
    hard_wrong,
    irrelevant,
    placeholders,
    upside_down,
    web,
    wrong,
)
from sources import Sources
from world import RUNTIME

from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, read_manifest, reopen
from influencespace.data.pair_set import PairSet
from influencespace.stages.finish import finish_stage
from influencespace.stages.ingest.split import SplitConfig, pair_sets, split
from influencespace.stages.selection.evidence import decide

SIZED = "curated, of a given size"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One dirty pool, and the target that is known."""

    dirt: Dirt
    share: float
    captions: int = 5
    seed: int = 1
    target_pairs: int | None = None
    """Images of the target, each with its captions; None takes all."""
    shifted: bool = False
    """The target is COCO's, the test set is not."""
    own_target: bool = False
    """No target is given: a part of the pool is set apart, dirt and all, as the split stage does."""
    size: float | None = None
    """The share that the others keep, and ours once more; None is the share that is no dirt."""

    @property
    def elsewhere(self) -> bool:
        """Whether no pair of dev is the target, so that all of it is the test set."""
        return self.shifted or self.own_target


SCENARIOS: dict[str, Scenario] = {
    "clean": Scenario(dirt=clean, share=0.0, size=0.7),
    **{f"wrong {share}": Scenario(dirt=wrong, share=share / 100) for share in (10, 20, 30, 40)},
    "hard wrong": Scenario(dirt=hard_wrong, share=0.3),
    "boilerplate": Scenario(dirt=boilerplate, share=0.3),
    "duplicates": Scenario(dirt=duplicates, share=0.3),
    "irrelevant": Scenario(dirt=irrelevant, share=0.3),
    "blurred": Scenario(dirt=blurred, share=0.3),
    "web": Scenario(dirt=web, share=1.0),
    "target of 50": Scenario(dirt=wrong, share=0.3, target_pairs=50),
    "target of 200": Scenario(dirt=wrong, share=0.3, target_pairs=200),
    "shifted target": Scenario(dirt=wrong, share=0.3, shifted=True),
    "no target": Scenario(dirt=wrong, share=0.3, own_target=True),
}
UNFORESEEN: dict[str, Scenario] = {
    dirt.__name__.replace("_", " "): Scenario(dirt=dirt, share=0.3, seed=7)
    for dirt in (file_names, cut, garbled, doubled, placeholders, covered, upside_down)
}
"""Dirt that nothing was developed on. (After some were seen the rule's margin was changed, for what hard wrong captions and
boilerplate said of it. Of names of files two were among the captions of boilerplate.)"""


def written(sources: Sources, scenario: Scenario, cache: Path) -> tuple[PairSet, np.ndarray]:
    """The pool of a scenario as an embedding artifact, and the kind of each pair."""
    mark = fingerprint(
        ["scenario with groups", scenario.dirt.__name__, scenario.share, scenario.captions, scenario.seed]
    )
    folder = cache / "pools" / mark
    if read_manifest(folder) is None:
        rng = np.random.default_rng(scenario.seed)
        draft = scenario.dirt(Draft.of(sources, scenario.captions), scenario.share, rng, sources)
        order = rng.permutation(len(draft))  # as the canonical order of uids would be
        reopen(folder)
        _write(draft, order, sources, folder)
        manifest = Manifest(stage="embed", fingerprint=mark, rows_in=len(draft), rows_out=len(draft))
        finish_stage(folder, manifest, 0.0)
    return PairSet(folder), np.load(folder / "kind.npy")


def _write(draft: Draft, order: np.ndarray, sources: Sources, folder: Path) -> None:
    used_images, image = np.unique(draft.image[order], return_inverse=True)
    used_texts, text = np.unique(draft.text[order], return_inverse=True)
    images, texts = sources.images(used_images), sources.texts(used_texts)
    np.save(folder / "images.npy", images)
    np.save(folder / "texts.npy", texts)
    np.save(folder / "kind.npy", draft.kind[order])
    columns = {
        "uid": [f"{row:06d}" for row in range(len(order))],
        "image": image,
        "text": text,
        "caption": [str(t) for t in used_texts[text]],
        "clip_score": (images[image] * texts[text]).sum(1),
        "truncated": np.zeros(len(order), bool),
        "sharpness": sources.sharpness(used_images)[image],
        "group": pa.nulls(len(order), pa.string()),
    }
    with atomic_path(folder / "pairs.parquet") as aside:
        pq.write_table(pa.table(columns), aside)


@dataclass(frozen=True)
class DirtyCuration(Curation):
    """The stages up to the decision, for a scenario."""

    name: str = ""

    @property
    def scenario(self) -> Scenario:
        return (SCENARIOS | UNFORESEEN)[self.name]

    @cached_property
    def sources(self) -> Sources:
        return Sources(self.world)

    @property
    def folder(self) -> Path:
        return self.world.cache / "curations" / fingerprint([self.name, self.setting, code_version(SCORING)])

    @property
    def about(self) -> list[Any]:
        fields = vars(self.scenario) | {"dirt": self.scenario.dirt.__name__}
        return [*super().about, fields]

    @cached_property
    def _written(self) -> tuple[PairSet, np.ndarray]:
        return written(self.sources, self.scenario, self.world.cache)

    @cached_property
    def _apart(self) -> dict[str, PairSet]:
        """The pool and the target that the split stage sets apart of it."""
        folder = self.folder / "split"
        given = {"pool": self._written[0].folder, "test": self.test.folder}
        manifest = split(given, {}, SplitConfig(), folder, RUNTIME)
        return pair_sets(folder, manifest)

    @cached_property
    def pool(self) -> PairSet:
        return self._apart["pool"] if self.scenario.own_target else self._written[0]

    @cached_property
    def kind(self) -> np.ndarray:
        """The kind of dirt of each pair; empty for good ones."""
        found: np.ndarray = self._written[1][self.pool.rows]
        return found

    @cached_property
    def wrong(self) -> np.ndarray:
        bad: np.ndarray = self.kind != CLEAN
        return bad

    @property
    def tests(self) -> tuple[int, ...]:
        return (0, 1) if self.scenario.elsewhere else super().tests

    @cached_property
    def target(self) -> PairSet:
        if self.scenario.own_target:
            return self._apart["target"]
        if self.scenario.shifted:
            return self.sources.coco()
        whole = self.world.dev(self.setting.target)
        if self.scenario.target_pairs is None:
            return whole
        chosen = np.random.default_rng(0).permutation(np.unique(whole.image))[: self.scenario.target_pairs]
        path = self.folder / "target.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, whole.rows[np.isin(whole.image, chosen)])
        return PairSet(whole.folder, path)

    def judge_kinds(self) -> dict[str, Any]:
        """The decision against the planted truth, for every kind of dirt apart."""
        kept = decide(self.run(), SelectionConfig()).kept
        return {
            kind or "good": {
                "pairs": int((self.kind == kind).sum()),
                "pruned": float(1 - kept[self.kind == kind].mean()),
            }
            for kind in np.unique(self.kind)
        }

    def weights(self) -> dict[str, np.ndarray]:
        """Ours, everything, only what is no dirt, and every method that is told how much of the pool is none."""
        size, scores = self.scenario.size, self.run()
        keep = int((~self.wrong).sum()) if size is None else round(size * len(self.pool))
        sized = {} if size is None else {SIZED: decide(scores, SelectionConfig(target_size=size)).weight}
        return {
            "curated": self.curated(scores),
            **sized,
            "everything": np.ones(len(self.pool)),
            "oracle": (~self.wrong).astype(np.float64),
            **baselines(self, keep),
        }

    def in_fewer_steps(self, part: int, seeds: tuple[int, ...]) -> list[list[float]]:
        """Recall by test image of proxies trained on our subset for a part of the steps: (seeds, images)."""
        weight, steps = self.curated(self.run()), self.setting.steps // part
        return [self.recall_of(weight, seed, steps) for seed in seeds]
