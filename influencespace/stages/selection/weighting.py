"""Choosing weights and steps: what helps is asked of real retraining, on the half of the target for model choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from influencespace.core.arrays import FloatArray
from influencespace.core.exchangeable import Exchangeability
from influencespace.core.select import CHOSEN, SelectionConfig, best_candidate, fairest_candidate
from influencespace.models.heads import Heads
from influencespace.models.training import HeadsConfig
from influencespace.run import Run, Workers
from influencespace.stages.passes import RangePasses
from influencespace.stages.proxies.target import TargetHalves, choosing_terms, losses_by_fold
from influencespace.stages.proxies.train_many import Training, train_many
from influencespace.stages.selection.exchangeability import CompareWithPool
from influencespace.stages.selection.pair_evidence import Decision, PairEvidence

# In standard deviations of influence; colder ones leave too few pairs.
TEMPERATURES = (1.0, 0.5)
# Of the given encoder's CLIP score, beside 1 for influence: what pairs do to a proxy of all pairs influence shows, what
# they would do to one of chosen pairs only in part.
CLIP_SCORE_SHARES = (0.0, 0.5)
# Of influence on groups that are worse off, beside 1 for the whole target: it is the stronger where a group is rare.
GROUP_SHARES = (0.15, 0.3)
# Multiples of the proxies' steps, beside all of them: chosen pairs are fewer, and cleaner ones bear more passes.
LONGER = (0.5, 2.0)
FOLDS = 20  # of the target's images, over which the gain must be significant
SEEDS = (101, 102)  # not those of the retraining that judges


def candidates(
    config: SelectionConfig, names_groups: bool = False, known_better: bool = False
) -> list[SelectionConfig]:
    """The decisions to choose from, uniform weights first, and those that serve groups last.

    None follows the encoder's opinion where the encoder knows the target better than the pool, nor where clusters are judged.
    """
    if config.weighting != "auto":
        return [config]
    config = replace(config, steps_factor=1.0)
    clip_scores = (0.0,) if known_better or config.unit == "cluster" else CLIP_SCORE_SHARES
    shares = [(0.0, clip_score) for clip_score in clip_scores]
    if names_groups and config.serves_groups:
        shares += [(group, clip_scores[-1]) for group in GROUP_SHARES]
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
    return {name: getattr(config, name) for name in CHOSEN}


def with_chosen(config: SelectionConfig, reported: Mapping[str, Any]) -> SelectionConfig:
    """The config with what retraining chose, as the selection stage reports it."""
    return replace(config, **{name: reported[name] for name in CHOSEN})


@dataclass(frozen=True)
class LossByFold:
    """Measure: loss on the choosing half of the target by fold of its images, as a whole and of each group."""

    halves: TargetHalves
    config: HeadsConfig

    def __call__(self, heads: Heads) -> dict[str, Any]:
        rows, losses = choosing_terms(heads, self.halves, self.config)
        group = self.halves.group[rows]
        by_group = [
            losses_by_fold(self.halves, rows[group == code], losses[group == code], FOLDS)
            for code in np.unique(group[group >= 0])
        ]
        return {"target_loss": losses_by_fold(self.halves, rows, losses, FOLDS), "by_group": by_group}


def trial_name(config: SelectionConfig, seed: int) -> str:
    """Of a trial's file, which is no part of the artifact."""
    weighting, *numbers = chosen(config).values()
    return "-".join([".trial", weighting, *(f"{number:g}" for number in numbers), str(seed)])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the trials came to: means over seeds, by fold of the target's images."""

    trials: tuple[Decision, ...]
    losses: tuple[FloatArray, ...]
    """Of the target (folds,)."""
    by_group: tuple[tuple[FloatArray, ...], ...]
    """Of each of its groups (its folds,)."""

    def best(self, worst: int | None) -> int:
        """The trial that is liked best, for a group that is worst off where that is asked for."""
        losses = np.array(self.losses)
        if worst is None or not self.by_group[0]:
            return best_candidate(losses)
        return fairest_candidate(losses, np.array([groups[worst] for groups in self.by_group]))

    def joined(self, other: "Outcome") -> "Outcome":
        return Outcome(
            trials=self.trials + other.trials,
            losses=self.losses + other.losses,
            by_group=self.by_group + other.by_group,
        )

    def table(self, best: int) -> list[dict[str, Any]]:
        """One row for each trial."""
        return [
            {
                **chosen(trial.rule.config),
                "target_loss": float(self.losses[i].mean()),
                "worst_group_loss": max((float(group.mean()) for group in self.by_group[i]), default=None),
                "chosen": i == best,
            }
            for i, trial in enumerate(self.trials)
        ]


def retrained(run: Run, trials: Sequence[Decision], workers: Workers) -> Outcome:
    """Train by each decision with each seed."""
    config, of_proxies = run.config.proxy.train, run.manifest("proxies").details["steps"]
    measure = LossByFold(TargetHalves(run.target, run.seed), config)
    trainings = [
        Training(
            name=trial_name(trial.rule.config, seed),
            weights=trial,
            seed=seed,
            steps=trial.rule.config.steps(of_proxies),
            measure=measure,
        )
        for trial in trials
        for seed in SEEDS
    ]
    records = train_many(run.pool, config, trainings, workers, label="weighting")
    by_trial = [records[i : i + len(SEEDS)] for i in range(0, len(records), len(SEEDS))]

    def mean(values: Sequence[Sequence[float]]) -> FloatArray:
        result: FloatArray = np.array(values).mean(0)
        return result

    return Outcome(
        trials=tuple(trials),
        losses=tuple(mean([one["target_loss"] for one in seeds]) for seeds in by_trial),
        by_group=tuple(
            tuple(map(mean, zip(*(one["by_group"] for one in seeds), strict=True))) for seeds in by_trial
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the selection comes to."""

    decision: Decision
    exchangeability: Exchangeability
    trials: list[dict[str, Any]]


def choose_weighting(run: Run, evidence: PairEvidence, workers: Workers) -> Choice:
    """The decision that retraining likes best, and then the steps; nothing is trained where the config leaves no choice."""
    worst = evidence.worst_group
    passes = RangePasses(workers)

    def decide(config: SelectionConfig) -> Decision:
        rule = passes.result(evidence.passes(config), evidence.reader(config), evidence.rows)
        return Decision(evidence=evidence, rule=rule)

    first = decide(candidates(run.config.selection)[0])
    found = workers.once(CompareWithPool(run=run, decision=first))
    choices = candidates(run.config.selection, worst is not None, found.known_better)
    if len(choices) == 1:
        return Choice(decision=first, exchangeability=found, trials=[])
    decisions = [first, *map(decide, choices[1:])]
    outcome = retrained(run, decisions, workers)
    served = worst if choices[-1].group_share else None
    best = outcome.best(served)
    longer = [with_steps(decisions[best], factor) for factor in LONGER]
    whole = outcome.joined(retrained(run, longer, workers))
    # whom the weights serve is decided; how long they are trained is a question of the whole target
    of_steps = [best, *range(len(decisions), len(whole.trials))]
    last = of_steps[best_candidate(np.array([whole.losses[i] for i in of_steps]))]
    return Choice(decision=whole.trials[last], exchangeability=found, trials=whole.table(last))


def with_steps(decision: Decision, factor: float) -> Decision:
    """The same decision, trained for so many times the proxies' steps."""
    rule = decision.rule
    return replace(decision, rule=replace(rule, config=replace(rule.config, steps_factor=factor)))
