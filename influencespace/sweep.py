"""Ray Tune over the decision: thresholds and size on scores computed once, judged by retraining.

A trial makes a subset of a finished run's cached scores, trains a proxy on it and measures that proxy on the
choosing half of the target: the half that model choices are made on. Neither the half that gave the target gradient
nor the test set is looked at, so the run that uses the best settings is still judged on pairs nobody chose by.
"""

import json
import logging
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from influencespace.config import RunConfig, load_config, save_config
from influencespace.core.metrics import mean_recall_by_image, retrieval_ranks
from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import (
    Manifest,
    atomic_path,
    fingerprint,
    is_done,
    read_manifest,
    reopen,
    write_json,
)
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import TaskError
from influencespace.engine.session import start_ray
from influencespace.errors import InputError
from influencespace.models.heads import Heads
from influencespace.stages.finish import finish_stage, stage_of
from influencespace.stages.ingest.split import pair_sets
from influencespace.stages.proxies.proxies import ProxyConfig, TargetHalves, choosing_loss, train_subset
from influencespace.stages.selection.evidence import Scores, decide
from influencespace.stages.selection.weighting import with_chosen

Settings = Mapping[str, Any]
Objective = Callable[[Settings], dict[str, float]]
Trial = dict[str, Any]
Range = tuple[float, float]

LOSS, MEAN_RECALL = "loss", "mean_recall"
DIRECTION = {LOSS: "min", MEAN_RECALL: "max"}
SETTINGS = ("weights", "tau_low", "temperature", "target_size")
TO_SWEEP = "to sweep over"
TUNE = "tune"  # Tune's own folder, removed at the end
# A trial whose worker is lost is begun again this often.
LOST_WORKERS = 2


@options(frozen=True, kw_only=True)
class SweepConfig:
    """What is tried."""

    trials: int = Field(default=20, ge=1)
    """Settings to try; the first are the run's own."""
    seed: int = Field(default=0, ge=0)
    """Of the search; with one trial at a time it decides every trial."""
    max_concurrent: int = Field(default=2, ge=1)
    """Trials at a time, one CPU core each."""
    tau_low: Range = (-0.25, 0.25)
    """Pruning threshold, in standard deviations of single influences."""
    temperature: Range = (0.1, 10.0)
    """Temperature of influence weights, searched on a logarithmic scale."""
    target_size: Range = (0.3, 1.0)
    """Largest share of the pool that is kept."""
    measure: Literal["loss", "mean_recall"] = "loss"
    """Of the choosing half of the target."""
    proxy_seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """A trial trains one proxy for each and takes the mean."""

    def __post_init__(self) -> None:
        for name in ("tau_low", "temperature", "target_size"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} = ({low}, {high}) is no range; give the lower end first")
        if self.temperature[0] <= 0 or self.target_size[0] <= 0 or self.target_size[1] > 1:
            raise ValueError("temperature must be above 0, and target_size above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Best:
    """The outcome of a sweep."""

    settings: dict[str, Any]
    """Fields of SelectionConfig."""
    value: float
    """Their measure."""
    own: float
    """The measure of the settings that the run had."""
    trials: int
    config: Path
    """best.yaml, for `influencespace run`."""


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """The objective: loss and mean recall of a proxy trained on what the settings keep."""

    pool: PairSet
    target: PairSet
    scores: Scores
    select: SelectionConfig
    proxies: ProxyConfig
    steps: int
    seeds: tuple[int, ...]

    def __call__(self, settings: Settings) -> dict[str, float]:
        try:
            subset = decide(self.scores, replace(self.select, **settings))
        except InputError:  # nothing is kept
            return {LOSS: math.inf, MEAN_RECALL: 0.0, "kept_fraction": 0.0}
        runs = [self._measure(subset.weight, seed) for seed in self.seeds]
        means = {name: float(np.mean([run[name] for run in runs])) for name in (LOSS, MEAN_RECALL)}
        return means | {"kept_fraction": float(subset.kept.mean())}

    @cached_property
    def _halves(self) -> TargetHalves:
        return TargetHalves(self.target, self.proxies.seed)

    def _measure(self, weights: NDArray[np.float64], seed: int) -> dict[str, float]:
        heads = train_subset(self.pool, weights, self.proxies.train, self.steps, seed).heads
        loss = choosing_loss(heads, self._halves, self.proxies.train)
        return {LOSS: loss, MEAN_RECALL: mean_recall(heads, self.target, self._halves.choosing)}


@torch.no_grad()
def mean_recall(heads: Heads, target: PairSet, rows: NDArray[np.int64]) -> float:
    """Mean of Recall@1/5/10 both ways among `rows` of the target, in per cent."""
    _, first, image_of_text = np.unique(target.image[rows], return_index=True, return_inverse=True)
    u, _ = heads(*target.inputs(rows[first]))
    _, t = heads(*target.inputs(rows))
    own = torch.from_numpy(image_of_text)
    return float(mean_recall_by_image(*retrieval_ranks(u, t, own), own).mean())


def sweep(run: Path, config: SweepConfig, out: Path) -> Best:
    """Search the decision of the finished run `run`; writes best.yaml, trials.parquet and manifest.json to `out`.

    The same call continues a search that was interrupted. Raises InputError where the run has no scores yet.
    """
    run_config = load_config(run / "config.yaml", {})
    inputs = {
        name: stage_of(run, name, TO_SWEEP).fingerprint
        for name in ("proxy", "redundancy", "attribute", "fairness")
    }
    select = confirmed_settings(run, run_config.curate)
    objective = retraining(run, replace(run_config, curate=select), config.proxy_seeds)
    own = own_settings(select)
    mark = fingerprint(
        {
            "stage": "sweep",
            "config": {**asdict(config), "max_concurrent": None},
            "own": select,
            "inputs": inputs,
        }
    )
    if not is_done(out, mark):
        began = time.monotonic()
        reopen(out)
        trials = search(objective, own, config, out / f"trials-{mark[:16]}")
        best = best_of(trials, config.measure)
        chosen = replace(run_config, curate=replace(select, **_settings(best)))
        save_config(chosen, out / "best.yaml")
        with atomic_path(out / "trials.parquet") as aside:
            pq.write_table(pa.Table.from_pylist(trials), aside)
        details = {
            "settings": _settings(best),
            "value": best[config.measure],
            "own": next(trial[config.measure] for trial in trials if _settings(trial) == own),
            "trials": len(trials),
        }
        finish_stage(out, Manifest(stage="sweep", fingerprint=mark, inputs=inputs, details=details), began)
    manifest = read_manifest(out)
    assert manifest is not None
    return Best(**manifest.details, config=out / "best.yaml")


def retraining(run: Path, config: RunConfig, seeds: tuple[int, ...]) -> Retraining:
    """The objective of a finished run; raises InputError where a stage is missing."""
    run = run.absolute()  # trials run in a folder of their own
    sets = pair_sets(run / "split", stage_of(run, "split", TO_SWEEP))
    return Retraining(
        pool=_absolute(sets["pool"]),
        target=_absolute(sets["target"]),
        scores=Scores(run / "attribute", run / "redundancy", run / "fairness"),
        select=config.curate,
        proxies=config.proxy,
        steps=int(stage_of(run, "proxy", TO_SWEEP).details["steps"]),
        seeds=seeds,
    )


def _absolute(pairs: PairSet) -> PairSet:
    rows_file = pairs.rows_file and pairs.rows_file.absolute()
    return PairSet(pairs.folder.absolute(), rows_file)


def confirmed_settings(run: Path, select: SelectionConfig) -> SelectionConfig:
    """The weights that the run's retraining confirmed in place of a choice that is still open."""
    if select.weighting != "auto":
        return select
    curated = read_manifest(run / "curate")
    return with_chosen(select, curated.details) if curated else replace(select, weighting="uniform")


def own_settings(select: SelectionConfig) -> dict[str, Any]:
    """The point of the search space that decides as `select` does."""
    return {
        "weights": select.weighting,
        "tau_low": select.tau_low,
        "temperature": select.temperature,
        "target_size": 1.0 if select.target_size is None else select.target_size,
    }


def search_space(config: SweepConfig, own: Settings) -> dict[str, Any]:
    """Distributions of the settings; each range is widened to hold the run's own setting."""

    def span(name: str) -> Range:
        low, high = getattr(config, name)
        return min(low, own[name]), max(high, own[name])

    return {
        "weights": CategoricalDistribution(("uniform", "influence")),
        "tau_low": FloatDistribution(*span("tau_low")),
        "temperature": FloatDistribution(*span("temperature"), log=True),
        "target_size": FloatDistribution(*span("target_size")),
    }


def search(objective: Objective, own: Settings, config: SweepConfig, folder: Path) -> list[Trial]:
    """Try settings until `folder` holds `config.trials` finished trials, and return these in the order of their ends.

    Every finished trial is a file, so the same call continues whatever way the last one ended. (Tune's own restore
    cannot begin a failed trial again under Optuna, and reads pickles.) Raises TaskError or InputError where a trial
    fails, and KeyboardInterrupt where the search was interrupted.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    done = read_trials(folder)
    if len(done) < config.trials:
        with start_ray(), _quiet_tune():
            results = _tuner(objective, own, config, folder, done).fit()
        shutil.rmtree(folder / TUNE, ignore_errors=True)
        for result in results:
            _raise_failure(result)
        done = read_trials(folder)
    if len(done) < config.trials:
        raise KeyboardInterrupt(f"{len(done)} of {config.trials} trials are done")
    return done


def read_trials(folder: Path) -> list[Trial]:
    """The finished trials in the order of their ends."""
    trials: list[Trial] = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(trials, key=lambda trial: trial["ended"])


def _tuner(
    objective: Objective, own: Settings, config: SweepConfig, folder: Path, done: list[Trial]
) -> tune.Tuner:
    """A Tuner for the trials that are left, whose search knows the finished ones."""
    searcher = OptunaSearch(
        search_space(config, own),
        metric=config.measure,
        mode=DIRECTION[config.measure],
        points_to_evaluate=None if any(_settings(trial) == own for trial in done) else [dict(own)],
        seed=config.seed + len(done),  # with the same seed it would begin with the same points again
    )
    for trial in done:
        searcher.add_evaluated_point(_settings(trial), trial[config.measure])
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, objective=objective, folder=folder), {"cpu": 1}),
        tune_config=tune.TuneConfig(
            num_samples=config.trials - len(done),
            max_concurrent_trials=config.max_concurrent,
            search_alg=searcher,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=LOST_WORKERS),
            callbacks=[Announce(folder, config)],
            stop=FirstFailure(),
            verbose=0,
        ),
    )


def _trial(settings: dict[str, Any], objective: Objective, folder: Path) -> None:
    """One trial, on a worker. An exception is a result: Tune begins lost workers again, but no errors."""
    began = time.monotonic()
    try:
        measures = objective(settings)
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else traceback.format_exc()
        failure = {"wrong_input": isinstance(error, InputError), "failure": text}
        tune.report({LOSS: math.nan, MEAN_RECALL: math.nan} | failure)
        return
    trial = settings | measures | {"seconds": time.monotonic() - began, "ended": time.time()}
    write_json(folder / f"{tune.get_context().get_trial_id()}.json", trial)
    tune.report(measures)


def _raise_failure(result: Any) -> None:
    failure = (result.metrics or {}).get("failure")
    if failure and result.metrics["wrong_input"]:
        raise InputError(failure)
    if failure or result.error:
        raise TaskError(f"a trial of the sweep failed with {result.config}:\n{failure or result.error}")


def _settings(trial: Trial) -> dict[str, Any]:
    return {name: trial[name] for name in SETTINGS}


def best_of(trials: list[Trial], measure: str) -> Trial:
    """The trial of the best measure, the first of equals; raises InputError where no trial kept anything."""
    sign = 1 if DIRECTION[measure] == "min" else -1
    best = min(trials, key=lambda trial: sign * trial[measure])
    if not best["kept_fraction"]:
        raise InputError("no settings of the sweep kept any pair: lower the range of tau_low")
    return best


class FirstFailure(tune.Stopper):
    """Ends the search at the first trial that fails."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        self.failed = self.failed or "failure" in result
        return False

    def stop_all(self) -> bool:
        return self.failed


@dataclass(frozen=True)
class Announce(tune.Callback):
    """One plain line on stderr for every finished trial."""

    folder: Path
    config: SweepConfig

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        done = len(list(self.folder.glob("*.json")))
        measure = self.config.measure
        text = f"{measure} {(trial.last_result or {}).get(measure, math.nan):.4f} with {trial.config}"
        print(f"sweep: {done} of {self.config.trials} trials, {text}", file=sys.stderr, flush=True)


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without logs of its own: a trial's file says what it gave."""
    name = "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
