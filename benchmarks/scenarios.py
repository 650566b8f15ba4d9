"""Pools of real pairs with the kinds of dirt that web data has, each with its planted truth, which judges only.

So far: what the default rule prunes of each kind. Parts are the scenarios. Needs the real data; see docs/benchmarks.md.
"""

import sys
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import SCORING, Benchmark, cached, code_version
from curation import Curation, Setting, World, measure_on_real_pairs
from dirt import (
    CLEAN,
    Dirt,
    Draft,
    Sources,
    blurred,
    boilerplate,
    clean,
    duplicates,
    hard_wrong,
    irrelevant,
    web,
    wrong,
)

from influencespace.core.select import SelectConfig
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, read_manifest, reopen
from influencespace.data.pair_set import PairSet
from influencespace.stages.decide import decide
from influencespace.stages.finish import finish_stage


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


SCENARIOS: dict[str, Scenario] = {
    "clean": Scenario(dirt=clean, share=0.0),
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
}


def written(sources: Sources, scenario: Scenario, cache: Path) -> tuple[PairSet, np.ndarray]:
    """The pool of a scenario as an embedding artifact, and the kind of each pair."""
    key = replace(scenario, target_pairs=None, shifted=False)
    mark = fingerprint(["scenario", scenario.dirt.__name__, key.share, key.captions, key.seed])
    folder = cache / "pools" / mark
    if read_manifest(folder) is None:
        rng = np.random.default_rng(scenario.seed)
        draft = scenario.dirt(sources.start(scenario.captions), scenario.share, rng, sources)
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
    }
    with atomic_path(folder / "pairs.parquet") as aside:
        pq.write_table(pa.table(columns), aside)


@dataclass(frozen=True)
class DirtyCuration(Curation):
    """The stages up to the decision, for a scenario."""

    name: str = ""

    @property
    def scenario(self) -> Scenario:
        return SCENARIOS[self.name]

    @cached_property
    def sources(self) -> Sources:
        return Sources(self.world)

    @property
    def folder(self) -> Path:
        return self.world.cache / "curations" / fingerprint([self.name, self.setting, code_version(SCORING)])

    @cached_property
    def _written(self) -> tuple[PairSet, np.ndarray]:
        return written(self.sources, self.scenario, self.world.cache)

    @cached_property
    def pool(self) -> PairSet:
        return self._written[0]

    @cached_property
    def kind(self) -> np.ndarray:
        """The kind of dirt of each pair; empty for good ones."""
        return self._written[1]

    @cached_property
    def wrong(self) -> np.ndarray:
        return self.kind != CLEAN

    @cached_property
    def target(self) -> PairSet:
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
        kept = decide(self.run(), SelectConfig()).kept
        return {
            kind or "good": {
                "pairs": int((self.kind == kind).sum()),
                "pruned": float(1 - kept[self.kind == kind].mean()),
            }
            for kind in np.unique(self.kind)
        }


def judged(name: str, bench: Benchmark, world: World, quick: bool) -> None:
    """What becomes of each kind of pair by the default settings, which know nothing of the scenario."""
    scenario = SCENARIOS[name]
    setting = Setting(wrong=scenario.share, captions=scenario.captions, steps=50 if quick else 200)
    curation = DirtyCuration(world, setting, name)
    found = cached(world.cache, ["scenario", name, setting], curation.judge)
    kinds = cached(world.cache, ["kinds", name, setting], curation.judge_kinds)
    for kind, values in kinds.items():
        bench.row(scenario=name, kind=kind, **values)
    bench.target(
        name=f"{name}: fraction pruned by the method itself",
        target="at most 0.05" if not found["wrong"] else f"within 0.04 of {found['wrong']:.3f}",
        measured=found["pruned"],
        reached=abs(found["pruned"] - found["wrong"]) <= (0.04 if found["wrong"] else 0.05),
    )
    if found["precision"] is not None and found["wrong"]:
        bench.target(
            name=f"{name}: share of what was pruned that is dirt",
            target="at least 0.9",
            measured=found["precision"],
            reached=found["precision"] >= 0.9,
        )


if __name__ == "__main__":
    parts = {name.replace(" ", "_"): partial(judged, name) for name in SCENARIOS}
    sys.exit(measure_on_real_pairs(__doc__ or "", "scenarios", ((0,), (0,)), parts))
