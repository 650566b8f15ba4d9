"""Whether influence weights help is asked of real retraining, on the half of the target that makes model choices."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influencespace.core.select import SelectionConfig, best_candidate, fairest_candidate
from influencespace.data.artifacts import write_json
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, run_task
from influencespace.engine.progress import progress
from influencespace.stages.proxies.proxies import (
    ProxyConfig,
    TargetHalves,
    choosing_terms,
    losses_by_fold,
    read_note,
    train_subset,
)
from influencespace.stages.selection.evidence import Scores, decide

FloatArray = NDArray[np.float64]
# Halved from one standard deviation of influence; colder ones leave too few pairs.
TEMPERATURES = (1.0, 0.5, 0.25)
# Of the given encoder's CLIP score, beside 1 for influence: what pairs do to a proxy of all pairs is told by influence, what
# they would do to one of chosen pairs only in part.
CLIP_SCORE_SHARES = (0.0, 0.5)
# Of influence on groups that are worse off, beside 1 for the whole target: it is the stronger where a group is rare.
GROUP_SHARES = (0.15, 0.3)
FOLDS = 20  # of the target's images, over which the gain must be sure
SEEDS = (101, 102)  # not those of the retraining that judges
CONFIRMED = ("weighting", "temperature", "group_share", "clip_score_share")
"""What retraining may choose in place of the config."""


def serves_groups(config: SelectionConfig) -> bool:
    """Whether the decision may serve groups that are worse off."""
    asked = config.weighting == "influence" and config.group_share > 0
    return asked or config.weighting == config.fairness == "auto"


def candidates(config: SelectionConfig, names_groups: bool = False) -> list[SelectionConfig]:
    """The decisions to choose from, uniform weights first, and those that serve groups last."""
    if config.weighting != "auto":
        return [config]
    shares = [(0.0, clip_score) for clip_score in CLIP_SCORE_SHARES]
    if names_groups and config.fairness == "auto":
        shares += [(group, CLIP_SCORE_SHARES[-1]) for group in GROUP_SHARES]
    weighted = [
        replace(
            config, weighting="influence", temperature=tau, group_share=group, clip_score_share=clip_score
        )
        for group, clip_score in shares
        for tau in TEMPERATURES
    ]
    return [replace(config, weighting="uniform", group_share=0.0, clip_score_share=0.0), *weighted]


def chosen(config: SelectionConfig) -> dict[str, Any]:
    """What of it retraining may have chosen."""
    return {name: getattr(config, name) for name in CONFIRMED}


def with_chosen(config: SelectionConfig, told: Mapping[str, Any]) -> SelectionConfig:
    """The config with what retraining chose, as the curate stage tells it."""
    return replace(config, **{name: told[name] for name in CONFIRMED})


@dataclass(frozen=True, kw_only=True)
class TrialProxy:
    """Task: loss on the choosing half of the target of a proxy trained on what a candidate keeps, by its weights."""

    pool: PairSet
    target: PairSet
    scores: Scores
    config: SelectionConfig
    proxies: ProxyConfig
    steps: int
    seed: int
    folder: Path
    mark: str

    @property
    def name(self) -> str:
        weights, *numbers = chosen(self.config).values()
        return "-".join(["trial", weights, *(f"{number:g}" for number in numbers), str(self.seed)])

    def __call__(self) -> dict[str, Any]:
        note = self.folder / "trials" / f"{self.name}.json"
        done = read_note(note, self.mark)
        if done is not None:
            return done
        began = time.monotonic()
        weight = decide(self.scores, self.config).weight
        trained = train_subset(self.pool, weight, self.proxies.train, self.steps, self.seed)
        halves = TargetHalves(self.target, self.proxies.seed)
        rows, losses = choosing_terms(trained.heads, halves, self.proxies.train)
        group = halves.group[rows]
        result = {
            "mark": self.mark,
            **chosen(self.config),
            "seed": self.seed,
            "target_loss": losses_by_fold(halves, rows, losses, FOLDS),
            "by_group": [
                losses_by_fold(halves, rows[group == code], losses[group == code], FOLDS)
                for code in np.unique(group[group >= 0])
            ],
            "seconds": time.monotonic() - began,
        }
        write_json(note, result)
        return result


def confirm(
    pool: PairSet,
    target: PairSet,
    scores: Scores,
    config: SelectionConfig,
    proxies: ProxyConfig,
    steps: int,
    folder: Path,
    mark: str,
    engine: Engine,
) -> tuple[SelectionConfig, list[dict[str, Any]]]:
    """The candidate that retraining likes best, and the trials; nothing is trained where the config leaves no choice."""
    choices = candidates(config, scores.names_groups)
    if len(choices) == 1:
        return config, []
    tasks = [
        TrialProxy(
            pool=pool,
            target=target,
            scores=scores,
            config=choice,
            proxies=proxies,
            steps=steps,
            seed=seed,
            folder=folder,
            mark=mark,
        )
        for choice in choices
        for seed in SEEDS
    ]
    trials = []
    with progress("confirm", len(tasks), "proxies") as bar:
        for trial in engine.map(run_task, tasks, num_actors=engine.cores):
            trials.append(trial)
            bar.advance()
    by_choice = {(*(trial[name] for name in CONFIRMED), trial["seed"]): trial for trial in trials}
    found = [[by_choice[*chosen(choice).values(), seed] for seed in SEEDS] for choice in choices]
    losses = np.array([[trial["target_loss"] for trial in seeds] for seeds in found]).mean(1)
    groups = range(len(found[0][0]["by_group"])) if choices[-1].group_share else ()
    by_group = [
        np.array([[trial["by_group"][g] for trial in seeds] for seeds in found]).mean(1) for g in groups
    ]
    best = fairest_candidate(losses, by_group[scores.worst_off]) if by_group else best_candidate(losses)
    table = [
        {
            **chosen(choice),
            "target_loss": float(losses[i].mean()),
            "worst_group_loss": max((float(group[i].mean()) for group in by_group), default=None),
            "auto": i == best,
        }
        for i, choice in enumerate(choices)
    ]
    return choices[best], table
