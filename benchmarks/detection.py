"""Planted wrong captions found by the score of single pairs: every estimator of the table, its forms and ablations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from common import ESTIMATING, Benchmark, cached
from study import Study, SyntheticStudy, table
from world import World

from influencespace.core.metrics import auroc, average_precision, precision_recall_at
from influencespace.estimators.table import TABLE
from influencespace.models.training import HeadsConfig

SLOW_AND_ALIKE = ("unrolled, whole", "unrolled, taylor")  # one backward pass a pair and step; as `unrolled`


ABLATED = 0.3  # the share of wrong captions at which other forms and settings are compared too


def measured(wrong: float = ABLATED) -> list[str]:
    """The whole table; other forms and settings at one share of wrong captions only: some take as long as the rest."""
    names = table() if wrong == ABLATED else TABLE
    return [name for name in names if name not in SLOW_AND_ALIKE]


def detection_of(study: Study) -> dict[str, Any]:
    """How well each estimator finds the wrong captions of a whole pool."""
    problem = study.problem(0)
    wrong = study.is_wrong
    found = {}
    for name in measured(study.wrong):
        score = table()[name]
        suspicion = -score(problem)
        known = np.isfinite(suspicion)
        precision, _ = precision_recall_at(suspicion[known], wrong[known], float(wrong.mean()))
        found[name] = {
            "auroc": auroc(suspicion[known], wrong[known]),
            "average_precision": average_precision(suspicion[known], wrong[known]),
            "precision": precision,
            "without_score": int((~known).sum()),
        }
    return found


def detection_part(bench: Benchmark, world: World, quick: bool) -> None:
    """Planted wrong captions, 10 to 40 %: AUROC and average precision of single-pair scores, one caption an image."""
    for wrong in (0.3,) if quick else (0.3, 0.1, 0.2, 0.4):
        detection_rows(bench, partial(Study, world=world, pairs=1000 if quick else 2000), wrong, quick)


def synthetic_detection_part(bench: Benchmark, world: World, quick: bool) -> None:
    """The same with synthetic scenes, 30 % wrong."""
    detection_rows(bench, partial(SyntheticStudy, world=world, pairs=500 if quick else 1000), 0.3, quick)


def detection_rows(bench: Benchmark, study_of: Callable[..., Study], wrong: float, quick: bool) -> None:
    config = HeadsConfig(steps=30 if quick else 100)
    runs = []
    for seed in bench.seeds:
        study = study_of(wrong=wrong, config=config, noise_seed=1 + seed)
        key = ["detection", type(study).__name__, study.key]
        runs.append(cached(study.world.cache, key, partial(detection_of, study), ESTIMATING))
    for name in measured(wrong):
        values = {key: [run[name][key] for run in runs] for key in runs[0][name]}
        bench.row(
            estimator=name,
            wrong=wrong,
            auroc=float(np.mean(values["auroc"])),
            lowest_auroc=min(values["auroc"]),
            average_precision=float(np.mean(values["average_precision"])),
            precision_at_share=float(np.mean(values["precision"])),
            without_score=max(values["without_score"]),
        )
