"""The evaluate stage: every retrained proxy on the test set, and curated against each baseline, paired."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass as options

from influencespace.core.arrays import FloatArray
from influencespace.core.fairness import group_means
from influencespace.core.metrics import (
    MAX_AT_ONCE,
    RECALL_LEVELS,
    bootstrap_means,
    interval,
    mean_recall_by_image,
    recall_at,
    retrieval_ranks,
)
from influencespace.data.buckets import write_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.placement import LIBRARY_BYTES, Resources, fitting
from influencespace.errors import STRICT
from influencespace.models.heads import Heads
from influencespace.models.training import HeadsConfig
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.ingest.embed import encoder_identity, worker_bytes
from influencespace.stages.ingest.encode import EmbedConfig, EncoderLoader, load
from influencespace.stages.proxies.proxy import Proxy
from influencespace.stages.proxies.target import TargetHalves, choosing_loss
from influencespace.stages.rivals.sources import source_of


@options(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """What is measured beside recall."""

    classes: tuple[str, ...] = ()
    """Class names; a test image whose pair has one of them as its group is classified zero-shot."""
    templates: tuple[str, ...] = ("a photo of a {}.", "a picture of a {}.", "{}")
    """Prompts of a class, averaged."""

    def __post_init__(self) -> None:
        if not self.templates or not all(self._fits(template) for template in self.templates):
            raise ValueError(
                f"templates = {self.templates}: give one or more, each with {{}} for the name of a class"
            )

    @staticmethod
    def _fits(template: str) -> bool:
        try:
            return template.format("x") != template
        except (IndexError, KeyError, ValueError):
            return False


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Task: embeddings of every class's prompts by the given encoder, (classes, templates, D)."""

    embed: EmbedConfig
    config: EvaluateConfig
    load_encoder: EncoderLoader = load

    def __call__(self) -> torch.Tensor:
        encoder = self.load_encoder(self.embed, "cpu")
        texts = [template.format(name) for name in self.config.classes for template in self.config.templates]
        size = self.embed.batch_size  # a thousand classes in eighty templates are no batch
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        embedded = torch.cat([encoder.encode_text(encoder.tokenize(batch)[0]) for batch in batches])
        return embedded.reshape(len(self.config.classes), len(self.config.templates), -1)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Task: recall of one retrained proxy, by image of the test set."""

    test: PairSet
    halves: TargetHalves
    config: HeadsConfig
    proxy: Proxy
    method: str
    seed: int
    classes: tuple[str, ...]
    prompts: torch.Tensor | None

    @property
    def name(self) -> str:
        return f"measures of {self.proxy.name}"

    @property
    def heads(self) -> Heads:
        return self.proxy.heads

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        _, first, image_of_text = np.unique(self.test.image, return_index=True, return_inverse=True)
        u, _ = self.heads(*self.test.inputs(first))
        _, t = self.heads(*self.test.inputs(slice(None)))
        own = torch.from_numpy(image_of_text)
        image_ranks, text_ranks = retrieval_ranks(u, t, own)
        return {
            "method": self.method,
            "seed": self.seed,
            "by_image": mean_recall_by_image(image_ranks, text_ranks, own).numpy(),
            "recall": {
                "image_to_text": {
                    str(k): 100 * float(recall_at(image_ranks, k).mean()) for k in RECALL_LEVELS
                },
                "text_to_image": {
                    str(k): 100 * float(recall_at(text_ranks, k).mean()) for k in RECALL_LEVELS
                },
            },
            "zero_shot_accuracy": self._zero_shot(u, first),
            "target_loss": choosing_loss(self.heads, self.halves, self.config),
        }

    def _zero_shot(self, u: torch.Tensor, first: NDArray[np.int64]) -> float | None:
        if self.prompts is None:
            return None
        groups = self.test.column("group")
        labels = [self.classes.index(str(groups[i])) if groups[i] in self.classes else -1 for i in first]
        known = torch.tensor(labels) >= 0
        if not bool(known.any()):
            return None
        width = self.prompts.shape[2]
        _, t = self.heads(u.new_zeros(1, self.heads.image.shape[0]), self.prompts.reshape(-1, width))
        names = torch.nn.functional.normalize(t.unflatten(0, self.prompts.shape[:2]).mean(1), dim=-1)
        right = (u[known] @ names.T).argmax(1) == torch.tensor(labels)[known]
        return 100 * float(right.double().mean())


def summarise(
    results: list[dict[str, Any]], methods: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Means and intervals of every method, and paired differences of `curated` to each other method."""
    shares: dict[str, FloatArray] = {}
    table: dict[str, Any] = {}
    for method in methods:
        runs = sorted((r for r in results if r["method"] == method), key=lambda r: r["seed"])
        shares[method] = np.stack([run["by_image"] for run in runs])
        accuracies = [run["zero_shot_accuracy"] for run in runs if run["zero_shot_accuracy"] is not None]
        table[method] = {
            "mean_recall": float(shares[method].mean()),
            "mean_recall_ci": list(interval(bootstrap_means(shares[method]).clip(0, 100))),
            "recall": _mean_recalls([run["recall"] for run in runs]),
            "zero_shot_accuracy": float(np.mean(accuracies)) if accuracies else None,
            "seeds": [run["seed"] for run in runs],
        }
    comparisons = {
        method: {
            "difference": float(shares["curated"].mean() - shares[method].mean()),
            "ci": list(interval(bootstrap_means(shares["curated"]) - bootstrap_means(shares[method]))),
        }
        for method in methods
        if method != "curated" and "curated" in shares
    }
    return table, comparisons


def _mean_recalls(recalls: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        way: {k: float(np.mean([recall[way][k] for recall in recalls])) for k in recalls[0][way]}
        for way in recalls[0]
    }


@dataclass(frozen=True)
class ImageGroups:
    """Task: the group of each image of the test set, None for one without."""

    test: PairSet

    def __call__(self) -> list[str | None]:
        _, first = np.unique(self.test.image, return_index=True)
        groups = self.test.column("group")
        return [None if groups[i] is None else str(groups[i]) for i in first]


def recall_by_group(shares: FloatArray, groups: list[str | None]) -> dict[str, Any] | None:
    """Mean recall of each group, of the worst, and how far that is below the best, with intervals over seeds and images.

    Recall by seed and image (R, n); None for one group. Which groups are worst and best is taken as measured.
    """
    known = np.array([group is not None for group in groups])
    names = np.array([group for group in groups if group is not None])
    if len(np.unique(names)) < 2:
        return None
    means = group_means(shares.mean(0)[known], names)
    recalls = dict(zip(np.unique(names).tolist(), means.tolist(), strict=True))
    worst, best = min(recalls, key=lambda name: recalls[name]), max(recalls, key=lambda name: recalls[name])
    low, high = (bootstrap_means(shares[:, known][:, names == name]) for name in (worst, best))
    return {
        "by_group": recalls,
        "worst_group": worst,
        "worst_group_recall": recalls[worst],
        "worst_group_recall_ci": list(interval(low.clip(0, 100))),
        "group_gap": recalls[best] - recalls[worst],
        "group_gap_ci": list(interval(high - low)),
    }


def measuring_bytes(test: PairSet, target: PairSet, dimension: int) -> int:
    """Memory that a task takes which measures a proxy of so many dimensions, in bytes: both sides of the whole set as they are
    stored, read and embedded, and similarities of a block."""
    given = 2 * 14 * test.table.dimension  # float16, float32, and float32 of half of them
    embedded = 2 * (4 + 8 + 8) * dimension
    return LIBRARY_BYTES + (len(test) + len(target)) * (given + embedded) + 5 * 8 * MAX_AT_ONCE


class Evaluate(Stage):
    """Measures every retrained proxy; writes by_image.parquet."""

    name = "evaluate"
    needs = ("selection", "rivals", "train")

    def settings(self, config: Any) -> EvaluateConfig:
        return config.evaluate

    def inputs(self, run: Run) -> Mapping[str, str]:
        """Prompts are of the encoder, which is no part of the inputs where embeddings were provided."""
        if not run.config.evaluate.classes:
            return {}
        return {"encoder": encoder_identity(run.config.embed.encoder), "dtype": run.config.embed.dtype}

    def work(self, run: Run, workers: Workers) -> Details:
        config: EvaluateConfig = run.config.evaluate
        prompts = None
        if config.classes:
            held = fitting(worker_bytes(run.config.embed), workers.engine.machines)
            prompts = workers.once(Prompts(embed=run.config.embed, config=config), memory=held)
        make = partial(
            Measure,
            test=run.test,
            halves=TargetHalves(run.target, run.seed),
            config=run.config.proxy.train,
            classes=config.classes,
            prompts=prompts,
        )
        runs = run.manifest("train").details["runs"]
        tasks = [
            make(proxy=Proxy(run.at("train"), one["name"]), method=one["method"], seed=one["seed"])
            for one in runs
        ]
        machines = workers.engine.machines
        held = measuring_bytes(run.test, run.target, run.config.proxy.train.dimension)
        needs = Resources(memory=fitting(held, machines))
        results = workers.map(tasks, unit="proxies", resources=needs)
        results = sorted(results, key=lambda r: (r["method"], r["seed"]))
        methods = tuple(dict.fromkeys(one["method"] for one in runs))
        table, comparisons = summarise(results, methods)
        groups = workers.once(ImageGroups(run.test))
        for method in methods:
            mine = [one for one in runs if one["method"] == method]
            shares = np.stack([result["by_image"] for result in results if result["method"] == method])
            table[method]["groups"] = recall_by_group(shares, groups)
            table[method]["kept_fraction"] = source_of(run, method).kept_fraction
            table[method]["steps"] = mine[0]["steps"]
            table[method]["seconds"] = float(np.mean([one["seconds"] for one in mine]))
        by_image = {f"{result['method']}-{result['seed']}": result["by_image"] for result in results}
        write_columns(workers.folder / "by_image.parquet", dict(sorted(by_image.items())))
        losses = {
            method: float(np.mean([r["target_loss"] for r in results if r["method"] == method]))
            for method in methods
        }
        return Details(details={"methods": table, "comparisons": comparisons, "target_loss": losses})
