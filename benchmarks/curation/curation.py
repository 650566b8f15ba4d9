"""Real pairs that are corrupted on purpose, curated stage by stage with the plain loop, and judged by the planted truth."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench import Bench
from benchmarks.cache import cached, code_digest
from benchmarks.curation import retrain_eval
from benchmarks.curation.protocol import CURATED, NOISE_SEEDS, TARGET, TARGET_IMAGES, TEST, Turn, rotation
from benchmarks.curation.retrain_eval import Retrained, together
from benchmarks.data.corruptions import CLEAN
from benchmarks.data.datasets import ENGINE, Dataset, with_rows
from benchmarks.data.scenario_pools import Scenario, scenario_pool
from benchmarks.data.sources import Sources
from influencespace.config import RunConfig, load_config
from influencespace.core.arrays import BoolArray, FloatArray
from influencespace.core.metrics import auroc, average_precision
from influencespace.core.select import HARMFUL, REDUNDANT, SelectionConfig, Subset, top_fraction
from influencespace.data.artifacts import fingerprint
from influencespace.data.buckets import Columns, read_columns
from influencespace.data.joined import Joined, TrainingPairs
from influencespace.data.pair_set import PairSet
from influencespace.estimators.filters import random_score
from influencespace.models.encoders import logit_scale
from influencespace.pipeline import STAGES
from influencespace.run import Run, carry_out, stage_fingerprint
from influencespace.stages.ingest.split import DrawSplit, SplitConfig
from influencespace.stages.proxies.target import TargetHalves
from influencespace.stages.rivals.scores import DrawBank, Scores
from influencespace.stages.selection.evidence import Evidence
from influencespace.stages.selection.pair_evidence import PairEvidence
from influencespace.stages.selection.weighting import with_chosen

LAST = "selection"  # the stages up to the decision; benchmarks retrain and judge by themselves
STAGES_OF = {str(stage.name): stage for stage in STAGES}
CODE = sorted({type(stage).__module__ for stage in STAGES})
Changes = Mapping[str, Any]
C = TypeVar("C", bound="Curation")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One corrupted pool with one proxy and one target, in one turn of the rotation."""

    scenario: Scenario
    steps: int
    turn: Turn = field(default_factory=Turn)


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

    @property
    def scenario(self) -> Scenario:
        return self.setting.scenario

    @cached_property
    def sources(self) -> Sources:
        return Sources(self.dataset)

    @property
    def given(self) -> PairSet:
        """All pairs that have a role, as the data set has them."""
        return self.dataset.pool

    @cached_property
    def role(self) -> NDArray[np.str_]:
        """Of each of them."""
        return self.setting.turn.roles(self.given.image, self.scenario.target_images or TARGET_IMAGES)

    def of_role(self, role: str) -> PairSet:
        """Those of one role."""
        return with_rows(self.given, self.role == role, self.folder / f"{role}.npy")

    @cached_property
    def _pool(self) -> tuple[PairSet, NDArray[np.str_]]:
        curated, noise = self.role == CURATED, self.setting.turn.noise
        return scenario_pool(self.sources, self.scenario, curated, noise, self.dataset.cache)

    @cached_property
    def _apart(self) -> dict[str, PairSet]:
        """The pool and the target that the split stage sets apart of it."""
        source, folder = self._pool[0].folder, self.folder / "apart"
        folder.mkdir(parents=True, exist_ok=True)
        embeddings = {"pool": source, "test": self.test.folder}
        DrawSplit(embeddings=embeddings, config=SplitConfig(), seed=0, artifact=folder, folder=folder)()
        return {role: PairSet(source, folder / f"{role}.npy") for role in ("pool", "target")}

    @cached_property
    def pool(self) -> PairSet:
        return self._apart["pool"] if self.scenario.target == "own" else self._pool[0]

    @cached_property
    def kind(self) -> NDArray[np.str_]:
        """What is wrong with each pair; empty for good ones."""
        kind: NDArray[np.str_] = self._pool[1][self.pool.rows]
        return kind

    @cached_property
    def wrong(self) -> BoolArray:
        bad: BoolArray = self.kind != CLEAN
        return bad

    @cached_property
    def target(self) -> PairSet:
        others: dict[str, Callable[[], PairSet]] = {
            "own": lambda: self._apart["target"],
            "shifted": self.sources.coco,
            "seen": lambda: self.dataset.dev(0),
        }
        return others.get(self.scenario.target, lambda: self.of_role(TARGET))()

    @cached_property
    def test(self) -> PairSet:
        return self.of_role(TEST)

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

    def judge_kinds(self) -> dict[str, Any]:
        """The decision against the planted truth, for every kind of corruption apart."""
        kept = self.decide().kept
        return {
            kind or "good": {
                "pairs": int((self.kind == kind).sum()),
                "pruned": float(1 - kept[self.kind == kind].mean()),
            }
            for kind in np.unique(self.kind)
        }

    def judged(self) -> dict[str, Any]:
        """As `judge`, from the cache."""
        return self.cached("judged", self.judge)

    def cached(self, what: Any, make: Any) -> dict[str, Any]:
        """A result of this curation, computed once."""
        return cached(self.dataset.cache, [what, self.key], make)

    @cached_property
    def neg_clip_loss(self) -> FloatArray:
        """By the given encoder, at its own temperature, as a run's rival of that name is (n,)."""
        scores = Scores(
            names=("neg_clip_loss",),
            pool=self.pool,
            target=self.target,
            halves=TargetHalves(self.target, 0),
            bank=DrawBank(pool=self.pool, seed=0)(),
            scale=logit_scale(self.dataset.encoder),
            tuned=None,
        )
        columns = scores(0, len(self.pool))
        score: FloatArray = columns["neg_clip_loss"]
        return score

    def filters(self, keep: int) -> dict[str, FloatArray]:
        """Weights (n,) of `keep` pairs by chance and by simple filters."""
        scores = {
            "random": random_score([str(uid) for uid in self.pool.column("uid")]),
            "clip_score": self.pool.clip_score,
            "proxy_clip_score": self.quality["clip_in"],
            "neg_clip_loss": self.neg_clip_loss,
            "proxy_neg_clip_loss": self.quality["neg_clip_in"],
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
        self, weight: FloatArray, seed: int, steps: int | None = None, pool: TrainingPairs | None = None
    ) -> dict[str, Any]:
        """Loss on the half of the target that makes choices, and each test image's share of the mean recall, of a proxy of the
        pool by weight (n,).

        Proxies are kept by their weights, so that nobody's change trains another's anew.
        """
        pool = pool or self.pool
        config = replace(self.config.proxy.train, steps=steps or self.setting.steps)
        sets = self.target, self.test
        key = ["retrained", identity(pool), fingerprint(weight.tolist()), config, seed, *map(identity, sets)]
        make = partial(retrain_eval.retrain, pool, weight, config, seed, *sets)
        return cached(self.dataset.cache, key, make)

    def recall(self, weight: FloatArray, seed: int, steps: int | None = None) -> list[float]:
        """Each test image's share of the mean recall by a proxy of the pool by weight (n,)."""
        shares: list[float] = self.retrained(weight, seed, steps)["shares"]
        return shares

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


def identity(pairs: TrainingPairs) -> str:
    """A fingerprint of a set of pairs."""
    if isinstance(pairs, Joined):
        return fingerprint([identity(pairs.first), identity(pairs.second)])
    assert isinstance(pairs, PairSet)
    return fingerprint([pairs.table.manifest.fingerprint, pairs.rows.tolist()])


def rotated(
    bench: Bench, setting: Setting, kind: type[C], noise_seeds: Sequence[int] = NOISE_SEEDS, **options: Any
) -> list[C]:
    """The curation in every turn of the rotation."""
    dataset = Dataset.of(bench)
    turns = rotation(bench, noise_seeds)
    return [kind(dataset, replace(setting, turn=turn), **options) for turn in turns]


def by_fold(curations: Iterable[C]) -> list[list[C]]:
    """The curations of each test set."""
    folds: dict[int, list[C]] = {}
    for each in curations:
        folds.setdefault(each.setting.turn.fold, []).append(each)
    return list(folds.values())


def joined(curations: Sequence[C], result: Callable[[C], Mapping[str, Any]]) -> Retrained:
    """The test images of all folds together; seeds of noise are repeats beside those of training."""
    return together([[result(each) for each in fold] for fold in by_fold(curations)])


def retrained(curations: Sequence[Curation], seeds: Sequence[int]) -> Retrained:
    """The proxies of one scenario's curations."""
    return joined(curations, lambda each: each.by_method(seeds))
