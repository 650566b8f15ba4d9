"""Real pairs with captions shuffled on purpose, curated stage by stage with the plain loop, and judged by the planted truth."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import RETRAINING, SCORING, Benchmark, arguments, cached, code_version, real_data
from filelock import FileLock

from influencespace.core.metrics import auroc, average_precision, mean_recall_by_image, retrieval_ranks
from influencespace.core.select import HARMFUL, REDUNDANT, SelectConfig, top_fraction
from influencespace.core.strata import means_by
from influencespace.data.artifacts import (
    Manifest,
    atomic_path,
    file_digest,
    fingerprint,
    folder_digest,
    read_manifest,
    reopen,
)
from influencespace.data.blocks import read_columns
from influencespace.data.dirt import shuffle_captions
from influencespace.data.pair_set import PairSet
from influencespace.data.readers import list_shards
from influencespace.data.synthetic import WorldConfig, write_world
from influencespace.estimators.nystrom import CurvatureConfig
from influencespace.estimators.similarity import random_score
from influencespace.models.training import StudentConfig
from influencespace.stages.attribute import AttributeConfig, attribute
from influencespace.stages.cluster import ClusterConfig, cluster
from influencespace.stages.confirm import confirm
from influencespace.stages.curvature import TargetConfig, curvature
from influencespace.stages.decide import Scores, decide
from influencespace.stages.embed import embed
from influencespace.stages.fairness import fairness
from influencespace.stages.finish import finish_stage
from influencespace.stages.redundancy import RedundancyConfig, redundancy
from influencespace.stages.runtime import LocalRuntime
from influencespace.stages.student import StudentsConfig, TargetHalves, choosing_loss, students, train_subset
from influencespace.stages.towers import EmbedConfig

RUNTIME = LocalRuntime()
CLEAN_SCENES: dict[str, Any] = {
    **dict.fromkeys(("wrong_captions", "near_duplicates", "boilerplate", "irrelevant"), 0.0),
    "captions_per_image": 3,
}
METHODS = ("curated", "everything", "random", "clip_score", "student_clip_score", "neg_clip_loss", "oracle")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One corrupted pool with one student and one target."""

    wrong: float
    captions: int
    steps: int
    noise_seed: int = 1
    target: int = 0
    """Which tar of dev is the target, where it is of dev; the other is the test set."""


@dataclass(frozen=True)
class World:
    """The real pairs, embedded once."""

    data: Path
    cache: Path

    @property
    def encoder(self) -> str:
        return str(self.data.parent / "models" / "mobilenetv2-minilm")

    @cached_property
    def encoder_digest(self) -> str:
        return folder_digest(self.encoder)

    def embedded(self, name: str, shards: str) -> Path:
        """The embedding artifact of these shards, made once for their content, whatever date the files have."""
        folder = self.cache / "embed" / name
        listed, config = list_shards(shards), EmbedConfig(encoder=self.encoder)
        digests = [file_digest(shard.path) for shard in listed]
        content = fingerprint([self.encoder_digest, config.content(), digests])
        made_of = folder.with_suffix(".made_of")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # benchmarks that run at once share a cache
            if not (made_of.is_file() and made_of.read_text() == content and read_manifest(folder)):
                made_of.unlink(missing_ok=True)
                embed(listed, config, folder, RUNTIME)
                made_of.write_text(content)
        return folder

    @property
    def pool_shards(self) -> str:
        return str(self.data / "flickr8k" / "pool" / "*.tar")

    @cached_property
    def pool(self) -> Path:
        return self.embedded("pool", self.pool_shards)

    def dev(self, tar: int) -> PairSet:
        return PairSet(self.embedded(f"dev{tar}", str(self.data / "flickr8k" / "dev" / f"{tar:05d}.tar")))

    @cached_property
    def other_domain(self) -> Path:
        """Synthetic scenes, rightly captioned."""
        folder = self.cache / "scenes"
        write_world(folder, WorldConfig(pretrain=0, target=0, test=0, pool=3000, **CLEAN_SCENES))
        return self.embedded("scenes", str(folder / "pool" / "*.tar"))

    def corrupted(self, setting: Setting) -> tuple[PairSet, np.ndarray]:
        """The pool with some captions moved between images, and which pairs are wrong."""
        columns = pq.read_schema(self.pool / "pairs.parquet").names  # a cache may be older than one of them
        mark = fingerprint(["corrupted", setting.wrong, setting.captions, setting.noise_seed, columns])
        folder = self.cache / "pools" / mark
        if read_manifest(folder) is None or not (folder / "images.npy").exists():
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
            # relative: a cache may be moved or copied
            (folder / name).symlink_to(os.path.relpath(self.pool / name, folder))
        images, texts = (np.load(folder / name, mmap_mode="r") for name in ("images.npy", "texts.npy"))
        score = (images[table["image"].to_numpy()] * texts[table["text"].to_numpy()]).sum(1)
        table = table.set_column(table.column_names.index("clip_score"), "clip_score", pa.array(score))
        with atomic_path(folder / "pairs.parquet") as aside:
            pq.write_table(table, aside)
        np.save(folder / "wrong.npy", wrong)
        manifest = Manifest(stage="embed", fingerprint=mark, rows_in=len(table), rows_out=len(table))
        finish_stage(folder, manifest, 0.0)


@dataclass(frozen=True)
class SyntheticWorld(World):
    """Synthetic scenes in place of photographs, which are the other domain; beside the real pairs' cache."""

    @cached_property
    def scenes(self) -> Path:
        folder = self.cache / "world"
        write_world(folder, WorldConfig(pretrain=0, pool=2000, target=500, test=500, **CLEAN_SCENES))
        return folder

    @property
    def pool_shards(self) -> str:
        return str(self.scenes / "pool" / "*.tar")

    def dev(self, tar: int) -> PairSet:
        split = ("target", "test")[tar]
        return PairSet(self.embedded(split, str(self.scenes / split / "*.tar")))

    @cached_property
    def other_domain(self) -> Path:
        return self.embedded("photographs", str(self.data / "flickr8k" / "dev" / "*.tar"))


@dataclass(frozen=True)
class Curation:
    """The stages up to the decision, for one setting."""

    world: World
    setting: Setting

    @property
    def config(self) -> StudentsConfig:
        return StudentsConfig(train=StudentConfig(steps=self.setting.steps), choose_steps=False)

    @property
    def clusters(self) -> ClusterConfig:
        return ClusterConfig()

    @property
    def curvature(self) -> CurvatureConfig:
        return CurvatureConfig()

    @property
    def attribution(self) -> AttributeConfig:
        return AttributeConfig()

    @property
    def choice(self) -> SelectConfig:
        return SelectConfig()

    @property
    def folder(self) -> Path:
        return self.world.cache / "curations" / fingerprint([self.setting, code_version(SCORING)])

    @property
    def about(self) -> list[Any]:
        """What results depend on beside the setting and the code."""
        return [self.clusters, self.curvature, self.attribution, self.choice]

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
        at |= {name: self.folder / name / code_version() for name in ("redundancy", "fairness")}
        inputs = {
            "pool": self.pool.table.manifest.fingerprint,
            "target": self.target.table.manifest.fingerprint,
        }
        done = students(self.pool, self.target, inputs, self.config, at["student"], RUNTIME)
        inputs |= {"student": done.fingerprint}
        clusters = cluster(self.pool, done.rows_out, inputs, self.clusters, at["cluster"], RUNTIME)
        redundancy(
            self.pool,
            at["student"],
            at["cluster"],
            inputs | {"cluster": clusters.fingerprint},
            RedundancyConfig(),
            at["redundancy"],
            RUNTIME,
        )
        solved = curvature(
            self.pool,
            self.target,
            self.config,
            at["student"],
            inputs,
            self.curvature,
            TargetConfig(),
            at["curvature"],
            RUNTIME,
        )
        inputs |= {"cluster": clusters.fingerprint, "curvature": solved.fingerprint}
        scored = attribute(self.pool, self.config, at, inputs, self.attribution, at["attribute"], RUNTIME)
        fairness(
            self.pool,
            self.target,
            self.config,
            self.curvature,
            at["student"],
            at["attribute"],
            True,
            self.attribution.block_size,
            (done.rows_out, scored.details["sample"]),
            inputs | {"attribute": scored.fingerprint},
            at["fairness"],
            RUNTIME,
        )
        return Scores(at["attribute"], at["redundancy"], at["fairness"])

    def judge(self) -> dict[str, Any]:
        """The decision against the planted truth."""
        scores = self.run()
        subset = decide(scores, self.choice)
        score, _ = scores.pair_scores
        # of copies that are alike one stays, whichever the planted one is: they are no question of precision
        pruned = subset.reason == HARMFUL
        single = np.full(len(score), np.nan)
        single[scores.influence["pair"]] = scores.influence["influence"]
        known = np.isfinite(single)
        return {
            "pairs": len(score),
            "wrong": float(self.wrong.mean()),
            "pruned": float(pruned.mean()),
            "redundant": float((subset.reason == REDUNDANT).mean()),
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
        """Our weights."""
        return decide(scores, self.confirmed(scores)).weight

    def confirmed(self, scores: Scores, choice: SelectConfig | None = None) -> SelectConfig:
        """What decides, its temperature confirmed on the choosing half of the target."""
        config, _ = confirm(
            self.pool,
            self.target,
            scores,
            choice or self.choice,
            self.config,
            self.setting.steps,
            self.folder / "curate",
            code_version(),
            RUNTIME,
        )
        return config

    @property
    def tests(self) -> tuple[int, ...]:
        """Which tars of dev are the test set."""
        return (1 - self.setting.target,)

    def recall_of(
        self, weight: np.ndarray, seed: int, steps: int | None = None, pool: PairSet | None = None
    ) -> list[float]:
        """Each test image's share of the mean recall by a student of the pool by weight (n,).

        Students are kept by their weights, so that nobody's change trains another's anew.
        """
        pool, steps = pool or self.pool, steps or self.setting.steps
        train = self.config.train

        def trained() -> dict[str, Any]:
            heads = train_subset(pool, weight, train, steps, seed).heads
            return {"shares": [by_image(heads, self.world.dev(tar)).tolist() for tar in (0, 1)]}

        which = [pool.table.manifest.fingerprint, fingerprint(pool.rows.tolist())]
        key = ["retrained", which, fingerprint(weight.tolist()), replace(train, steps=steps), seed]
        by_tar = cached(self.world.cache, key, trained, RETRAINING)["shares"]
        return [share for tar in self.tests for share in by_tar[tar]]

    def retrained(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Recall by test image of students retrained on each method's subset, (seeds, images) for each."""
        weights = self.weights()
        return {
            "shares": {
                name: [self.recall_of(weight, seed) for seed in seeds] for name, weight in weights.items()
            },
            "kept": {name: float((weight > 0).mean()) for name, weight in weights.items()},
        }

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
    """Each test image's share of the mean recall by a student (images,)."""
    u, t = heads(*test.inputs(slice(None)))
    return recall_by_image(u, t, test.image)


def recall_by_image(u: torch.Tensor, t: torch.Tensor, image: np.ndarray) -> np.ndarray:
    """Each image's share of the mean recall, from the embeddings of pairs (n, d) and the image of each (n,): (images,)."""
    _, first, own = np.unique(image, return_index=True, return_inverse=True)
    ranks = retrieval_ranks(u[torch.from_numpy(first)], t, torch.from_numpy(own))
    return mean_recall_by_image(*ranks, torch.from_numpy(own)).numpy()


def measure_on_real_pairs(
    description: str,
    name: str,
    seeds: tuple[Sequence[int], Sequence[int]],
    parts: Mapping[str, Callable[[Benchmark, World, bool], None]],
) -> int:
    """The command line of a benchmark on real pairs; `seeds` of a quick run and of a full one. Says where it has no data."""
    options = arguments(description, name, parts=tuple(parts))
    data = real_data()
    if data is None:
        print("skipped: no real data; set INFLUENCESPACE_DATA to a folder that holds flickr8k/")
        return 0
    bench = Benchmark(name, options.quick, options.out, seeds=seeds[0] if options.quick else seeds[1])
    world = World(data, options.cache)
    bench.measure(options.parts, lambda part: parts[part](bench, world, options.quick), tuple(parts))
    return 0
