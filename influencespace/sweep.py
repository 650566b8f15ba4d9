"""Ray Tune over the decision: thresholds and size on scores computed once, judged by retraining.

A trial makes a subset of a finished run's pooled evidence, trains a proxy on it and measures that proxy on the
choosing half of the target: the half that model choices are made on. Neither the half that gave the target gradient
nor the test set is looked at, so the run that uses the best settings is still judged on pairs nobody chose by.
"""

import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
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

from influencespace.config import save_config
from influencespace.core.metrics import mean_recall_by_image, retrieval_ranks
from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import atomic_path, remove, write_json
from influencespace.data.mirror import arrow_storage, here, listing
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import TaskError
from influencespace.engine.session import start_ray
from influencespace.errors import STRICT, InputError
from influencespace.models.heads import Heads
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.target import TargetHalves, choosing_loss
from influencespace.stages.proxies.train_many import Weights, train
from influencespace.stages.selection.pair_evidence import PairEvidence
from influencespace.stages.selection.weighting import with_chosen

Settings = Mapping[str, Any]
Objective = Callable[[Settings], dict[str, float]]
Trial = dict[str, Any]
Range = tuple[float, float]

LOSS, MEAN_RECALL = "loss", "mean_recall"
DIRECTION = {LOSS: "min", MEAN_RECALL: "max"}
SETTINGS = ("weighting", "tau_low", "temperature", "target_size")
TRIAL = ".trial-"
"""How files of finished trials begin: with a dot, so that they are no part of the artifact."""
TUNE = ".tune"  # Tune's own folder, removed at the end
MAX_LOST_WORKERS = 2  # after which a trial fails


@options(frozen=True, kw_only=True, config=STRICT)
class SweepConfig:
    """What is tried."""

    trials: int = Field(default=20, ge=1)
    """Settings to try; the first are the run's own."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time, one CPU core each; without it as many as there are cores. One at a time, the run's seed decides all."""
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


@dataclass(frozen=True)
class Retraining:
    """The objective: loss and mean recall of a proxy trained on what the settings keep."""

    run: Run
    selection: SelectionConfig
    seeds: tuple[int, ...]

    def __call__(self, settings: Settings) -> dict[str, float]:
        try:
            decision = self._evidence.decision(replace(self.selection, **settings))
        except InputError:  # nothing is kept
            return {LOSS: math.inf, MEAN_RECALL: 0.0, "kept_fraction": 0.0}
        measured = [self._measure(decision, seed) for seed in self.seeds]
        means = {name: float(np.mean([one[name] for one in measured])) for name in (LOSS, MEAN_RECALL)}
        return means | {"kept_fraction": decision.kept_fraction}

    @cached_property
    def _evidence(self) -> PairEvidence:
        return PairEvidence(folder=self.run.at("selection"))

    @cached_property
    def _halves(self) -> TargetHalves:
        return TargetHalves(self.run.target, self.run.seed)

    def _measure(self, weights: Weights, seed: int) -> dict[str, float]:
        steps = self.run.manifest("proxies").details["steps"]
        config = replace(self.run.config.proxy.train, steps=self.selection.steps(steps))
        heads = train(self.run.pool, weights, config, seed).heads
        recall = mean_recall(heads, self.run.target, self._halves.choosing)
        return {LOSS: choosing_loss(heads, self._halves, config), MEAN_RECALL: recall}


@torch.no_grad()
def mean_recall(heads: Heads, target: PairSet, rows: NDArray[np.int64]) -> float:
    """Mean of Recall@1/5/10 both ways among `rows` of the target, in per cent."""
    _, first, image_of_text = np.unique(target.image[rows], return_index=True, return_inverse=True)
    u, _ = heads(*target.inputs(rows[first]))
    _, t = heads(*target.inputs(rows))
    own = torch.from_numpy(image_of_text)
    return float(mean_recall_by_image(*retrieval_ranks(u, t, own), own).mean())


def chosen_selection(run: Run) -> SelectionConfig:
    """The run's own selection; where it left the weighting open, the one that retraining chose."""
    return with_chosen(run.config.selection, run.manifest("selection", "to sweep over").details)


@dataclass(frozen=True)
class Sweep(Stage):
    """Searches the decision of a finished run; writes best.yaml, for `influencespace run`, and trials.parquet.

    The manifest reports the best settings (fields of SelectionConfig), their measure, and that of the run's own.
    """

    config: SweepConfig
    name = "sweep"
    needs = ("proxies", "selection")

    def settings(self, config: Any) -> Any:
        return asdict(self.config) | {"max_concurrent": None}, config

    def work(self, run: Run, workers: Workers) -> Details:
        selection, measure = chosen_selection(run), self.config.measure
        own = own_settings(selection)
        config = replace(self.config, max_concurrent=self.config.max_concurrent or workers.engine.cores)
        objective = Retraining(run, selection, config.proxy_seeds)
        trials = search(objective, own, config, workers.folder, seed=run.seed)
        best = best_of(trials, measure)
        settings = {name: best[name] for name in SETTINGS}
        save_config(
            replace(run.config, selection=replace(selection, **settings)), workers.folder / "best.yaml"
        )
        with atomic_path(workers.folder / "trials.parquet") as aside:
            pq.write_table(pa.Table.from_pylist(trials), aside)
        before = next(trial[measure] for trial in trials if own.items() <= trial.items())
        details = {"settings": settings, "value": best[measure], "own": before, "trials": len(trials)}
        return Details(details=details)


def own_settings(selection: SelectionConfig) -> dict[str, Any]:
    """The point of the search space that decides as `selection` does."""
    values = {name: getattr(selection, name) for name in SETTINGS}
    return values | {"target_size": 1.0 if selection.target_size is None else selection.target_size}


def search_space(config: SweepConfig, own: Settings) -> dict[str, Any]:
    """Distributions of the settings; each range is widened to hold the run's own setting."""

    def span(name: str) -> Range:
        low, high = getattr(config, name)
        return min(low, own[name]), max(high, own[name])

    return {
        "weighting": CategoricalDistribution(("uniform", "influence")),
        "tau_low": FloatDistribution(*span("tau_low")),
        "temperature": FloatDistribution(*span("temperature"), log=True),
        "target_size": FloatDistribution(*span("target_size")),
    }


def search(
    objective: Objective,
    own: Settings,
    config: SweepConfig,
    folder: Path,
    *,
    seed: int = 0,
) -> list[Trial]:
    """Try settings until `folder` holds `config.trials` finished trials, and return these in the order of their ends.

    Every finished trial is a file, so the same call continues whatever way the last one ended. (Tune's own restore
    cannot begin a failed trial again under Optuna, and reads pickles.) Raises TaskError or InputError where a trial
    fails, and KeyboardInterrupt where the search was interrupted.
    """
    folder = folder.absolute()  # trials run in a folder of their own
    done = read_trials(folder)
    if len(done) < config.trials:
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a trial's file says what it gave
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        with start_ray():
            results = _tuner(objective, own, config, folder, seed).fit()
        remove(folder / TUNE)
        for result in results:
            _raise_failure(result)
        done = read_trials(folder)
    if len(done) < config.trials:
        raise KeyboardInterrupt(f"{len(done)} of {config.trials} trials are done")
    return done


def read_trials(folder: Path) -> list[Trial]:
    """The finished trials in the order of their ends."""
    paths = map(here, listing(folder, f"{TRIAL}*.json"))
    return sorted(
        (json.loads(path.read_text(encoding="utf-8")) for path in paths), key=lambda one: one["ended"]
    )


def _tuner(
    objective: Objective,
    own: Settings,
    config: SweepConfig,
    folder: Path,
    seed: int,
) -> tune.Tuner:
    """A Tuner for the trials that are left, whose search knows the finished ones and begins with the run's own settings."""
    done = read_trials(folder)
    searcher = OptunaSearch(
        search_space(config, own),
        metric=config.measure,
        mode=DIRECTION[config.measure],
        points_to_evaluate=None if any(own.items() <= trial.items() for trial in done) else [dict(own)],
        seed=seed + len(done),  # with the same seed it would begin with the same points again
    )
    for one in done:
        searcher.add_evaluated_point({name: one[name] for name in SETTINGS}, one[config.measure])
    storage, filesystem = arrow_storage(folder)
    trial = tune.with_parameters(_trial, objective=objective, folder=folder)
    return tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            num_samples=config.trials - len(done),
            max_concurrent_trials=config.max_concurrent,
            search_alg=searcher,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=storage,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=MAX_LOST_WORKERS),
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
    write_json(folder / f"{TRIAL}{tune.get_context().get_trial_id()}.json", trial)
    tune.report(measures)


def _raise_failure(result: Any) -> None:
    failure = (result.metrics or {}).get("failure")
    if failure and result.metrics["wrong_input"]:
        raise InputError(failure)
    if failure or result.error:
        raise TaskError(f"a trial of the sweep failed with {result.config}:\n{failure or result.error}")


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
    """One plain line on stderr for every finished trial. (Tune pickles it, so that it can hold no progress bar.)"""

    folder: Path
    config: SweepConfig

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        done, measure = len(read_trials(self.folder)), self.config.measure
        text = f"{measure} {(trial.last_result or {}).get(measure, math.nan):.4f} with {trial.config}"
        print(f"sweep: {done} of {self.config.trials} trials, {text}", file=sys.stderr, flush=True)
