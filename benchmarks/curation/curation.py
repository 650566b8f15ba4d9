"""Real pairs that are corrupted on purpose, curated stage by stage with the plain loop, and judged by the planted truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from benchmarks.bench import Bench
from benchmarks.cache import cached, code_digest
from benchmarks.curation import retrain_eval
from benchmarks.curation.retrain_eval import Retrained, together
from benchmarks.data.datasets import ENGINE, Dataset, Setting
from influencespace.config import RunConfig, load_config
from influencespace.core.arrays import BoolArray, FloatArray
from influencespace.core.metrics import auroc, average_precision
from influencespace.core.select import HARMFUL, REDUNDANT, SelectionConfig, Subset, top_fraction
from influencespace.data.artifacts import fingerprint
from influencespace.data.buckets import Columns, read_columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.filters import random_score
from influencespace.pipeline import STAGES
from influencespace.run import Run, carry_out, stage_fingerprint
from influencespace.stages.selection.evidence import Evidence
from influencespace.stages.selection.pair_evidence import PairEvidence
from influencespace.stages.selection.weighting import with_chosen

LAST = "selection"  # the stages up to the decision; benchmarks retrain and judge by themselves
STAGES_OF = {str(stage.name): stage for stage in STAGES}
CODE = sorted({type(stage).__module__ for stage in STAGES})
Changes = Mapping[str, Any]
C = TypeVar("C", bound="Curation")


@dataclass(frozen=True)
class Curation:
    """The stages up to the decision, for one setting; without changes at the default settings."""

    dataset: Dataset
    setting: Setting
    changes: Changes = field(default_factory=dict)
    """Dotted settings of the run in place of the defaults."""
    base: "Curation | None" = None
    """Whose stages are used where their settings are the same."""

    def variant(self, changes: Changes) -> Self:
        """The same with some settings changed; stages that the changes do not touch are shared."""
        return replace(self, changes={**self.changes, **changes}, base=self)

    @property
    def config(self) -> RunConfig:
        steps = {"proxy.train.steps": self.setting.steps, "proxy.choose_steps": False}
        return load_config(None, {**steps, **self.changes})

    @property
    def key(self) -> list[Any]:
        """What results depend on beside the code."""
        return [type(self).__name__, self.setting, self.changes]

    @property
    def folder(self) -> Path:
        return self.dataset.cache / "curations" / fingerprint([self.key, code_digest(*CODE)])

    @cached_property
    def pool(self) -> PairSet:
        return self.dataset.corrupted(self.setting)[0]

    @cached_property
    def wrong(self) -> BoolArray:
        return self.dataset.corrupted(self.setting)[1]

    @cached_property
    def target(self) -> PairSet:
        return self.dataset.dev(self.setting.target)

    @cached_property
    def test(self) -> PairSet:
        return self.dataset.dev(1 - self.setting.target)

    @property
    def tests(self) -> tuple[int, ...]:
        """Which tars of dev are the test set."""
        return (1 - self.setting.target,)

    def until(self, last: str) -> Run:
        """The run with all stages up to this one carried out."""
        sets = {"pool": self.pool, "target": self.target, "test": self.test}
        inputs = {name: identity(sets[name]) for name in ("pool", "target")}
        run = Run(folder=self.folder, config=self.config, sets=sets, inputs=inputs)
        run.folder.mkdir(parents=True, exist_ok=True)
        for name, stage in STAGES_OF.items():
            if self.base is not None and not run.at(name).exists():
                same = self.base.until(name)
                if same.manifest(name).fingerprint == stage_fingerprint(stage, run)[0]:
                    run.at(name).symlink_to(same.at(name).absolute())
            carry_out(stage, run, ENGINE)
            if name == last:
                break
        return run

    @cached_property
    def run(self) -> Run:
        return self.until(LAST)

    @cached_property
    def evidence(self) -> Evidence:
        return Evidence.of(self.run)

    @cached_property
    def quality(self) -> Columns:
        """Of every pair by the proxies."""
        return read_columns(self.run.at("proxies") / "quality.parquet")

    @cached_property
    def strata(self) -> Columns:
        """Of every pair."""
        return read_columns(self.run.at("influence") / "strata.parquet")

    @property
    def selection(self) -> SelectionConfig:
        """What decides, with the weighting that retraining chose where the config leaves it to that."""
        return with_chosen(self.config.selection, self.run.manifest(LAST).details)

    def decide(self, **changes: Any) -> Subset:
        """The decision, or what it would be with other settings of the selection."""
        return PairEvidence(folder=self.run.at(LAST)).decide(replace(self.selection, **changes))

    @cached_property
    def single(self) -> FloatArray:
        """Influence of the pairs that were scored, nan of the others (n,)."""
        influence = np.full(len(self.pool), np.nan)
        influence[self.evidence.influence["pair"]] = self.evidence.influence["influence"]
        return influence

    def auroc(self, suspicion: FloatArray, of: BoolArray | None = None) -> float | None:
        """How well a suspicion (n,) separates wrong pairs from right ones; None where none is wrong."""
        chosen = np.isfinite(suspicion) if of is None else of
        return auroc(suspicion[chosen], self.wrong[chosen]) if self.wrong.any() else None

    def judge(self) -> dict[str, Any]:
        """The decision against the planted truth."""
        evidence, reason = self.evidence, self.decide().reason
        score = evidence.carried_over(self.strata)["score"]
        # of copies that are alike one stays, whichever the planted one is: they are no question of precision
        pruned = reason == HARMFUL
        return {
            "pairs": len(score),
            "wrong": float(self.wrong.mean()),
            "pruned": float(pruned.mean()),
            "redundant": float((reason == REDUNDANT).mean()),
            "precision": float(self.wrong[pruned].mean()) if pruned.any() else None,
            "auroc": self.auroc(-score),
            "average_precision": average_precision(-score, self.wrong) if self.wrong.any() else None,
            "auroc_quality": self.auroc(-self.strata["quality"]),
            "auroc_single_pair": self.auroc(-self.single),
            "caption_control_share": evidence.caption_control.estimated_wrong_share,
            "convergence": evidence.convergence,
        }

    def judged(self) -> dict[str, Any]:
        """As `judge`, from the cache."""
        return self.cached("judged", self.judge)

    def cached(self, what: Any, make: Any) -> dict[str, Any]:
        """A result of this curation, computed once."""
        return cached(self.dataset.cache, [what, self.key], make)

    def filters(self, keep: int) -> dict[str, FloatArray]:
        """Weights (n,) of `keep` pairs by chance and by simple filters."""
        scores = {
            "random": random_score([str(uid) for uid in self.pool.column("uid")]),
            "clip_score": self.pool.clip_score,
            "proxy_clip_score": self.quality["clip_in"],
            "neg_clip_loss": self.quality["neg_clip_in"],
        }
        return {name: top_fraction(score, keep).astype(np.float64) for name, score in scores.items()}

    def weights(self) -> dict[str, FloatArray]:
        """Each method's subset: ours as it decides, the others at the true fraction."""
        return {
            "curated": self.decide().weight,
            "everything": np.ones(len(self.pool)),
            **self.filters(round(len(self.wrong) * (1 - self.wrong.mean()))),
            "oracle": (~self.wrong).astype(np.float64),
        }

    def retrained(
        self, weight: FloatArray, seed: int, steps: int | None = None, pool: PairSet | None = None
    ) -> dict[str, Any]:
        """A proxy of the pool by weight (n,), judged on both tars of dev.

        Proxies are kept by their weights, so that nobody's change trains another's anew.
        """
        pool = pool or self.pool
        config = replace(self.config.proxy.train, steps=steps or self.setting.steps)
        sets = [self.dataset.dev(tar) for tar in (0, 1)]
        key = ["retrained", identity(pool), fingerprint(weight.tolist()), config, seed, *map(identity, sets)]
        make = partial(retrain_eval.retrain, pool, weight, config, seed, sets)
        return cached(self.dataset.cache, key, make)

    def recall(self, weight: FloatArray, seed: int, steps: int | None = None) -> list[float]:
        """Each test image's share of the mean recall by a proxy of the pool by weight (n,)."""
        by_tar = self.retrained(weight, seed, steps)["shares"]
        return [share for tar in self.tests for share in by_tar[tar]]

    def recalls(
        self, weights: Mapping[str, FloatArray], seeds: Sequence[int], steps: int | None = None
    ) -> dict[str, Any]:
        """Recall by test image of proxies retrained on each method's subset, (seeds, images) for each."""
        shares = {
            name: [self.recall(weight, seed, steps) for seed in seeds] for name, weight in weights.items()
        }
        return {
            "shares": shares,
            "kept": {name: float((weight > 0).mean()) for name, weight in weights.items()},
        }

    def by_method(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Recall of every method's proxies, from the cache."""
        return self.cached(["by method", list(seeds)], lambda: self.recalls(self.weights(), seeds))


def identity(pairs: PairSet) -> str:
    """A fingerprint of a set of pairs."""
    return fingerprint([pairs.table.manifest.fingerprint, pairs.rows.tolist()])


def swapped(bench: Bench, setting: Setting, kind: type[C], **options: Any) -> list[C]:
    """The curation for one tar of dev, tested on the other, and the other way round; once in a quick run."""
    dataset = Dataset.of(bench)
    return [kind(dataset, replace(setting, target=tar), **options) for tar in bench.pick((0, 1), (0,))]


def retrained(curations: Sequence[Curation], seeds: Sequence[int]) -> Retrained:
    """The proxies of one pool's curations: their test images together."""
    return together([each.by_method(seeds) for each in curations])
