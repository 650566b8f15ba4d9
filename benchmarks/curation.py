"""Real pairs with captions shuffled on purpose, curated stage by stage with the plain loop, and judged by the planted truth."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RETRAINING, SCORING, cached, code_version
from world import RUNTIME, Setting, World

from influencespace.core.metrics import auroc, average_precision, mean_recall_by_image, retrieval_ranks
from influencespace.core.select import HARMFUL, REDUNDANT, SelectionConfig, top_fraction
from influencespace.core.strata import means_by
from influencespace.data.artifacts import (
    fingerprint,
)
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.estimators.influence import CurvatureConfig
from influencespace.estimators.similarity import random_score
from influencespace.models.training import HeadsConfig
from influencespace.stages.proxies.proxies import (
    ProxyConfig,
    TargetHalves,
    choosing_loss,
    proxies,
    train_subset,
)
from influencespace.stages.scoring.cluster import ClusterConfig, cluster
from influencespace.stages.scoring.curvature import TargetConfig, curvature
from influencespace.stages.scoring.fairness import fairness
from influencespace.stages.scoring.influence import InfluenceConfig, attribute
from influencespace.stages.selection.evidence import Scores, decide
from influencespace.stages.selection.redundancy import RedundancyConfig, redundancy
from influencespace.stages.selection.weighting import confirm

METHODS = ("curated", "everything", "random", "clip_score", "proxy_clip_score", "neg_clip_loss", "oracle")


@dataclass(frozen=True)
class Curation:
    """The stages up to the decision, for one setting."""

    world: World
    setting: Setting

    @property
    def config(self) -> ProxyConfig:
        return ProxyConfig(train=HeadsConfig(steps=self.setting.steps), choose_steps=False)

    @property
    def clusters(self) -> ClusterConfig:
        return ClusterConfig()

    @property
    def curvature(self) -> CurvatureConfig:
        return CurvatureConfig()

    @property
    def attribution(self) -> InfluenceConfig:
        return InfluenceConfig()

    @property
    def choice(self) -> SelectionConfig:
        return SelectionConfig()

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
        names = ("proxy", "cluster", "curvature", "attribute")
        at = {name: self.folder / name for name in names}
        at |= {name: self.folder / name / code_version() for name in ("redundancy", "fairness")}
        inputs = {
            "pool": self.pool.table.manifest.fingerprint,
            "target": self.target.table.manifest.fingerprint,
        }
        done = proxies(self.pool, self.target, inputs, self.config, at["proxy"], RUNTIME)
        inputs |= {"proxy": done.fingerprint}
        clusters = cluster(self.pool, done.rows_out, inputs, self.clusters, at["cluster"], RUNTIME)
        redundancy(
            self.pool,
            at["proxy"],
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
            at["proxy"],
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
            at["proxy"],
            at["attribute"],
            True,
            self.attribution.form,
            self.attribution.bucket_size,
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
            "caption_control_share": scores.caption_control.estimated_wrong_share,
            "rest": scores.rest,
        }

    def weights(self) -> dict[str, np.ndarray]:
        """Each method's subset: ours as it decides, the others at the true fraction."""
        scores = self.run()
        keep = round(len(self.wrong) * (1 - self.wrong.mean()))
        quality = read_columns(self.folder / "proxy" / "quality.parquet")
        uids = [str(uid) for uid in self.pool.column("uid")]
        chosen = {
            "curated": self.curated(scores),
            "everything": np.ones(len(uids), bool),
            "random": top_fraction(random_score(uids), keep),
            "clip_score": top_fraction(self.pool.clip_score, keep),
            "proxy_clip_score": top_fraction(quality["clip_in"], keep),
            "neg_clip_loss": top_fraction(quality["neg_clip_in"], keep),
            "oracle": ~self.wrong,
        }
        return {name: chosen[name].astype(np.float64) for name in METHODS}

    def curated(self, scores: Scores) -> np.ndarray:
        """Our weights."""
        return decide(scores, self.confirmed(scores)).weight

    def confirmed(self, scores: Scores, choice: SelectionConfig | None = None) -> SelectionConfig:
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
        """Each test image's share of the mean recall by a proxy of the pool by weight (n,).

        Proxies are kept by their weights, so that nobody's change trains another's anew.
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

    def by_method(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Recall by test image of proxies retrained on each method's subset, (seeds, images) for each."""
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
    """Each test image's share of the mean recall by a proxy (images,)."""
    u, t = heads(*test.inputs(slice(None)))
    return recall_by_image(u, t, test.image)


def recall_by_image(u: torch.Tensor, t: torch.Tensor, image: np.ndarray) -> np.ndarray:
    """Each image's share of the mean recall, from the embeddings of pairs (n, d) and the image of each (n,): (images,)."""
    _, first, own = np.unique(image, return_index=True, return_inverse=True)
    ranks = retrieval_ranks(u[torch.from_numpy(first)], t, torch.from_numpy(own))
    return mean_recall_by_image(*ranks, torch.from_numpy(own)).numpy()
