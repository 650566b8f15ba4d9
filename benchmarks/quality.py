"""How well curation works on real pairs: Flickr8k with captions shuffled on purpose, judged by the planted truth.

The truth is used for judging only. Needs the real data (INFLUENCESPACE_DATA or ../shared/data); see docs/benchmarks.md.
"""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import SCORING, Benchmark, OutOfTimeError, arguments, cached, code_version, real_data

from influencespace.core.metrics import (
    auroc,
    average_precision,
    bootstrap_means,
    interval,
    mean_recall_by_image,
    retrieval_ranks,
)
from influencespace.core.select import SelectConfig, top_fraction
from influencespace.core.strata import means_by
from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, read_manifest, reopen
from influencespace.data.blocks import read_columns
from influencespace.data.dirt import shuffle_captions
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards
from influencespace.demo import run_demo
from influencespace.estimators.nystrom import CurvatureConfig
from influencespace.estimators.similarity import random_score
from influencespace.models.training import StudentConfig
from influencespace.stages.attribute import AttributeConfig, attribute
from influencespace.stages.cluster import ClusterConfig, cluster
from influencespace.stages.confirm import confirm
from influencespace.stages.curvature import TargetConfig, curvature
from influencespace.stages.decide import Scores, decide
from influencespace.stages.embed import EmbedConfig, embed
from influencespace.stages.finish import finish_stage
from influencespace.stages.runtime import LocalRuntime
from influencespace.stages.student import StudentsConfig, TargetHalves, choosing_loss, students, train_subset

RUNTIME = LocalRuntime()
METHODS = ("curated", "everything", "random", "clip_score", "student_clip_score", "neg_clip_loss", "oracle")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One corrupted pool with one student and one target."""

    wrong: float
    captions: int
    steps: int
    noise_seed: int = 1
    target: int = 0
    """Which tar of dev is the target; the other is the test set."""


@dataclass(frozen=True)
class World:
    """The real pairs, embedded once."""

    data: Path
    cache: Path

    def embedded(self, name: str, shards: str) -> Path:
        folder = self.cache / "embed" / name
        config = EmbedConfig(encoder=str(self.data.parent / "models" / "mobilenetv2-minilm"))
        embed(list_shards(str(self.data / "flickr8k" / shards)), config, folder, RUNTIME)
        return folder

    @cached_property
    def pool(self) -> Path:
        return self.embedded("pool", "pool/*.tar")

    def dev(self, tar: int) -> PairSet:
        return PairSet(self.embedded(f"dev{tar}", f"dev/{tar:05d}.tar"))

    def corrupted(self, setting: Setting) -> tuple[PairSet, np.ndarray]:
        """The pool with some captions moved between images, and which pairs are wrong."""
        mark = fingerprint(["corrupted", setting.wrong, setting.captions, setting.noise_seed])
        folder = self.cache / "pools" / mark
        if read_manifest(folder) is None:
            self._corrupt(setting, reopen(folder), mark)
        return PairSet(folder), np.load(folder / "wrong.npy")

    def _corrupt(self, setting: Setting, folder: Path, mark: str) -> None:
        table = pq.read_table(self.pool / "pairs.parquet")
        number = np.array([int(uid.rsplit("#", 1)[1]) for uid in table["uid"].to_pylist()])
        table = table.take(np.flatnonzero(number < setting.captions))
        image = table["image"].to_numpy()
        rows = [
            str(i) for i in range(len(table))
        ]  # row numbers stand for captions, so that embeddings move along
        moved, wrong = shuffle_captions(rows, image.tolist(), setting.wrong, setting.noise_seed)
        source = np.array([int(row) for row in moved])
        for column in ("text", "caption", "truncated"):
            table = table.set_column(table.column_names.index(column), column, table[column].take(source))
        for name in ("images.npy", "texts.npy"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to((self.pool / name).absolute())
        images, texts = (np.load(folder / name, mmap_mode="r") for name in ("images.npy", "texts.npy"))
        score = (images[table["image"].to_numpy()] * texts[table["text"].to_numpy()]).sum(1)
        table = table.set_column(table.column_names.index("clip_score"), "clip_score", pa.array(score))
        with atomic_path(folder / "pairs.parquet") as aside:
            pq.write_table(table, aside)
        np.save(folder / "wrong.npy", wrong)
        manifest = Manifest(stage="embed", fingerprint=mark, rows_in=len(table), rows_out=len(table))
        finish_stage(folder, manifest, 0.0)


@dataclass(frozen=True)
class Curation:
    """The stages up to the decision, for one setting."""

    world: World
    setting: Setting

    @property
    def config(self) -> StudentsConfig:
        return StudentsConfig(train=StudentConfig(steps=self.setting.steps), choose_steps=False)

    @property
    def folder(self) -> Path:
        return self.world.cache / "curations" / fingerprint([self.setting, code_version(SCORING)])

    @cached_property
    def pool(self) -> PairSet:
        return self.world.corrupted(self.setting)[0]

    @cached_property
    def wrong(self) -> np.ndarray:
        return self.world.corrupted(self.setting)[1]

    @cached_property
    def target(self) -> PairSet:
        return self.world.dev(self.setting.target)

    @cached_property
    def test(self) -> PairSet:
        return self.world.dev(1 - self.setting.target)

    def run(self) -> Scores:
        names = ("student", "cluster", "curvature", "attribute")
        at = {name: self.folder / name for name in names}
        inputs = {
            "pool": self.pool.table.manifest.fingerprint,
            "target": self.target.table.manifest.fingerprint,
        }
        done = students(self.pool, self.target, inputs, self.config, at["student"], RUNTIME)
        inputs |= {"student": done.fingerprint}
        clusters = cluster(self.pool, done.rows_out, inputs, ClusterConfig(), at["cluster"], RUNTIME)
        solved = curvature(
            self.pool,
            self.target,
            self.config,
            at["student"],
            inputs,
            CurvatureConfig(),
            TargetConfig(),
            at["curvature"],
            RUNTIME,
        )
        inputs |= {"cluster": clusters.fingerprint, "curvature": solved.fingerprint}
        attribute(self.pool, self.config, at, inputs, AttributeConfig(), at["attribute"], RUNTIME)
        return Scores(at["attribute"])

    def judge(self) -> dict[str, Any]:
        """The decision against the planted truth."""
        scores = self.run()
        subset = decide(scores, SelectConfig())
        score, _ = scores.pair_scores
        pruned = ~subset.kept
        single = np.full(len(score), np.nan)
        single[scores.influence["pair"]] = scores.influence["influence"]
        known = np.isfinite(single)
        return {
            "pairs": len(score),
            "wrong": float(self.wrong.mean()),
            "pruned": float(pruned.mean()),
            "precision": float(self.wrong[pruned].mean()) if pruned.any() else None,
            "auroc": auroc(-score, self.wrong) if self.wrong.any() else None,
            "average_precision": average_precision(-score, self.wrong) if self.wrong.any() else None,
            "auroc_quality": auroc(-scores.strata["quality"], self.wrong) if self.wrong.any() else None,
            "auroc_single_pair": auroc(-single[known], self.wrong[known]) if self.wrong.any() else None,
            "placebo_share": scores.placebo.estimated_wrong_share,
            "rest": scores.rest,
        }

    def weights(self) -> dict[str, np.ndarray]:
        """Each method's subset: ours as it decides, the others at the true fraction."""
        scores = self.run()
        keep = round(len(self.wrong) * (1 - self.wrong.mean()))
        quality = read_columns(self.folder / "student" / "quality.parquet")
        uids = [str(uid) for uid in self.pool.column("uid")]
        chosen = {
            "curated": self.curated(scores),
            "everything": np.ones(len(uids), bool),
            "random": top_fraction(random_score(uids), keep),
            "clip_score": top_fraction(self.pool.clip_score, keep),
            "student_clip_score": top_fraction(quality["clip_in"], keep),
            "neg_clip_loss": top_fraction(quality["neg_clip_in"], keep),
            "oracle": ~self.wrong,
        }
        return {name: chosen[name].astype(np.float64) for name in METHODS}

    def curated(self, scores: Scores) -> np.ndarray:
        """Our weights, the temperature confirmed on the choosing half of the target."""
        config, _ = confirm(
            self.pool,
            self.target,
            scores,
            SelectConfig(),
            self.config,
            self.setting.steps,
            self.folder / "curate",
            code_version(),
            RUNTIME,
        )
        return decide(scores, config).weight

    def retrained(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Recall by test image of students retrained on each method's subset, (seeds, images) for each."""
        weights = self.weights()
        train = replace(self.config.train, steps=self.setting.steps)
        shares: dict[str, list[list[float]]] = {}
        for name, weight in weights.items():
            shares[name] = []
            for seed in seeds:
                trained = train_subset(self.pool, weight, train, train.steps, seed)
                shares[name].append(by_image(trained.heads, self.test).tolist())
        return {"shares": shares, "kept": {name: float((w > 0).mean()) for name, w in weights.items()}}

    def removals(self, groups: int, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Predicted influence and real change of the target loss for each quality group of the pool, removed for real."""
        scores = self.run()
        quantile = scores.strata["quantile"] * groups // scores.quantiles
        halves = TargetHalves(self.target, self.config.seed)
        train = self.config.train

        def loss(weight: np.ndarray) -> float:
            runs = [train_subset(self.pool, weight, train, train.steps, seed) for seed in seeds]
            return float(np.mean([choosing_loss(run.heads, halves, train) for run in runs]))

        whole = loss(np.ones(len(quantile)))
        change = [loss((quantile != group).astype(np.float64)) - whole for group in range(groups)]
        rows = scores.influence["pair"]
        predicted = means_by(quantile[rows], scores.influence["influence"], groups).mean
        wrong = means_by(quantile, self.wrong.astype(np.float64), groups).mean
        return {"predicted": predicted.tolist(), "change_of_loss": change, "wrong": wrong.tolist()}


@torch.no_grad()
def by_image(heads: torch.nn.Module, test: PairSet) -> np.ndarray:
    distinct, own = np.unique(test.image, return_inverse=True)
    first = np.array([np.argmax(test.image == image) for image in distinct])
    u, _ = heads(*test.inputs(first))
    _, t = heads(*test.inputs(slice(None)))
    ranks = retrieval_ranks(u, t, torch.from_numpy(own))
    return mean_recall_by_image(*ranks, torch.from_numpy(own)).numpy()


def chosen_fraction(bench: Benchmark, world: World, quick: bool) -> None:
    """The fraction that the method chooses, against the planted one."""
    fractions = (0.0, 0.3) if quick else (0.0, 0.1, 0.2, 0.3)
    for captions in (2,) if quick else (2, 5):
        for steps in (100,) if quick else (100, 200, 600):
            for wrong in fractions:
                setting = Setting(wrong=wrong, captions=captions, steps=steps)
                key = ["judge", setting]
                result = cached(world.cache, key, Curation(world, setting).judge)
                bench.row(captions=captions, steps=steps, **result)
                gap = result["pruned"] - result["wrong"]
                bench.target(
                    name=f"fraction pruned, {wrong:.0%} wrong, {captions} captions, {steps} steps",
                    target="at most 0.05" if wrong == 0 else f"within 0.05 of {result['wrong']:.3f}",
                    measured=result["pruned"],
                    reached=abs(gap) <= 0.05,
                )


def detection(bench: Benchmark, world: World, quick: bool) -> None:
    """AUROC of the pooled score for wrong captions."""
    for captions, least in ((5, 0.96), (1, 0.90)):
        if quick and captions == 5:
            continue
        setting = Setting(wrong=0.3, captions=captions, steps=200)
        result = cached(world.cache, ["judge", setting], Curation(world, setting).judge)
        bench.row(captions=captions, steps=200, **result)
        bench.target(
            name=f"AUROC of the pooled score, 30% wrong, {captions} caption(s) an image",
            target=f"at least {least}",
            measured=result["auroc"],
            reached=result["auroc"] >= least,
        )


def recall(bench: Benchmark, world: World, quick: bool) -> None:
    """Retraining at equal steps, dev's two tars swapped and averaged, paired over images and seeds."""
    captions = 2 if quick else 5
    shares: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    kept: dict[str, float] = {}
    for target in (0,) if quick else (0, 1):
        setting = Setting(wrong=0.3, captions=captions, steps=100 if quick else 200, target=target)
        curation = Curation(world, setting)
        result = cached(
            world.cache,
            ["retrained", setting, bench.seeds],
            lambda c=curation: c.retrained(tuple(bench.seeds)),
        )
        for name in METHODS:
            shares[name].append(np.array(result["shares"][name]))
            kept[name] = result["kept"][name]
    together = {name: np.concatenate(parts, 1) for name, parts in shares.items()}
    for name in METHODS:
        low, high = interval(bootstrap_means(together["curated"]) - bootstrap_means(together[name]))
        bench.row(
            method=name,
            mean_recall=float(together[name].mean()),
            interval=list(interval(bootstrap_means(together[name]))),
            kept=kept[name],
            curated_minus_this=float(together["curated"].mean() - together[name].mean()),
            paired_interval=[low, high],
        )
    for name in ("clip_score", "student_clip_score"):
        low, high = interval(bootstrap_means(together["curated"]) - bootstrap_means(together[name]))
        bench.target(
            name=f"mean recall of curated minus {name} at the true fraction, 30% wrong, {captions} captions",
            target="not surely below 0",
            measured=float(together["curated"].mean() - together[name].mean()),
            interval=(low, high),
            reached=high >= 0,
        )


def removal(bench: Benchmark, world: World, quick: bool) -> None:
    """Strata really removed: the change of the target loss has the sign that T predicts."""
    groups = 10
    setting = Setting(wrong=0.3, captions=2 if quick else 5, steps=100)
    seeds = (0,) if quick else (0, 1, 2)
    curation = Curation(world, setting)
    result = cached(
        world.cache, ["removals", setting, groups, seeds], lambda: curation.removals(groups, seeds)
    )
    for group in range(groups):
        bench.row(decile=group, **{key: values[group] for key, values in result.items()})
    predicted, change = np.array(result["predicted"]), np.array(result["change_of_loss"])

    def crossing(values: np.ndarray) -> int:
        return int(np.argmax(values > 0)) if (values > 0).any() else groups

    apart = abs(crossing(predicted) - crossing(change))
    bench.target(
        name="crossing of T against real removal of deciles, 30% wrong",
        target="within one quantile",
        measured=float(apart),
        reached=apart <= 1,
    )
    correlation = float(np.corrcoef(predicted, change)[0, 1])
    bench.target(
        name="correlation of T with the real change of the target loss, by decile",
        target="report (positive)",
        measured=correlation,
        reached=correlation > 0,
    )


def demo(bench: Benchmark, world: World, quick: bool) -> None:
    """What `make demo` ends in, for several synthetic worlds with 25 % wrong captions."""
    for seed in (0,) if quick else (0, 1, 2):
        folder = world.cache / "demo" / fingerprint([seed, code_version()])
        summary = cached(world.cache, ["demo", seed], lambda s=seed, f=folder: run_demo(f, RUNTIME, seed=s))
        for method, found in summary["methods"].items():
            compared = summary["comparisons"].get(method, {})
            bench.row(
                world=seed,
                method=method,
                mean_recall=found["mean_recall"],
                kept=found["kept_fraction"],
                curated_minus_this=compared.get("difference"),
                paired_interval=compared.get("ci"),
            )
        for method in ("everything", "random", "clip_score"):
            compared = summary["comparisons"][method]
            bench.target(
                name=f"synthetic world {seed}: mean recall of curated minus {method}",
                target="above 0",
                measured=compared["difference"],
                interval=tuple(compared["ci"]),
                reached=compared["difference"] > 0,
            )


PARTS = {
    "detection": detection,
    "recall": recall,
    "removal": removal,
    "fraction": chosen_fraction,
    "demo": demo,
}


def main() -> int:
    options = arguments(__doc__ or "", "quality", parts=tuple(PARTS))
    data = real_data()
    if data is None:
        print("skipped: no real data; set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        return 0
    bench = Benchmark("quality", options.quick, options.out, seeds=(0,) if options.quick else (0, 1, 2))
    world = World(data, options.cache)
    bench.incomplete = list(options.parts)
    bench.go_on(options.parts)
    for part in options.parts:
        try:
            bench.begin(part)
            PARTS[part](bench, world, options.quick)
            bench.incomplete.remove(part)
        except OutOfTimeError:
            print(f"out of time in {part}", flush=True)
        bench.write()
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
