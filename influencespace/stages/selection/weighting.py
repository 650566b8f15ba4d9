"""Choosing weights: whether influence weights help is asked of real retraining, on the half of the target for model choices."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from influencespace.core.exchangeable import Exchangeability
from influencespace.core.select import SelectionConfig, best_candidate, fairest_candidate
from influencespace.models.heads import Heads
from influencespace.models.training import HeadsConfig
from influencespace.run import Run, Workers
from influencespace.stages.passes import RangePasses
from influencespace.stages.proxies.target import TargetHalves, choosing_terms, losses_by_fold
from influencespace.stages.proxies.train_many import Training, train_many
from influencespace.stages.selection.exchangeability import CompareWithPool
from influencespace.stages.selection.pair_evidence import Decision, PairEvidence

# Halved from one standard deviation of influence; colder ones leave too few pairs.
TEMPERATURES = (1.0, 0.5, 0.25)
# Of the given encoder's CLIP score, beside 1 for influence: what pairs do to a proxy of all pairs influence shows, what
# they would do to one of chosen pairs only in part.
CLIP_SCORE_SHARES = (0.0, 0.5)
# Of influence on groups that are worse off, beside 1 for the whole target: it is the stronger where a group is rare.
GROUP_SHARES = (0.15, 0.3)
FOLDS = 20  # of the target's images, over which the gain must be significant
SEEDS = (101, 102)  # not those of the retraining that judges
CHOSEN = ("weighting", "temperature", "group_share", "clip_score_share")
"""What retraining may choose in place of the config."""


def candidates(
    config: SelectionConfig, names_groups: bool = False, known_better: bool = False
) -> list[SelectionConfig]:
    """The decisions to choose from, uniform weights first, and those that serve groups last.

    None follows the encoder's opinion where the encoder knows the target better than the pool.
    """
    if config.weighting != "auto":
        return [config]
    clip_scores = (0.0,) if known_better else CLIP_SCORE_SHARES
    shares = [(0.0, clip_score) for clip_score in clip_scores]
    if names_groups and config.fairness == "auto":
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


def choose_weighting(
    run: Run, evidence: PairEvidence, workers: Workers
) -> tuple[Decision, Exchangeability, list[dict[str, Any]]]:
    """The decision that retraining likes best, what was found of the target, and the trials; nothing is trained where the config
    leaves no choice."""
    worst = evidence.worst_group
    passes = RangePasses(workers)

    def decide(config: SelectionConfig) -> Decision:
        rule = passes.result(evidence.passes(config), evidence.reader(config), evidence.rows)
        return Decision(evidence=evidence, rule=rule)

    first = decide(candidates(run.config.selection)[0])
    found = workers.once(CompareWithPool(run=run, decision=first))
    choices = candidates(run.config.selection, worst is not None, found.known_better)
    decisions = [first, *map(decide, choices[1:])]
    if len(choices) == 1:
        return first, found, []
    proxy, steps = run.config.proxy, run.manifest("proxies").details["steps"]
    trainings = [
        Training(
            name=trial_name(choice, seed),
            weights=decision,
            seed=seed,
            steps=steps,
            measure=LossByFold(TargetHalves(run.target, run.seed), proxy.train),
        )
        for choice, decision in zip(choices, decisions, strict=True)
        for seed in SEEDS
    ]
    records = train_many(run.pool, proxy.train, trainings, workers, label="weighting")
    by_choice = [records[i : i + len(SEEDS)] for i in range(0, len(records), len(SEEDS))]
    losses = np.array([[trial["target_loss"] for trial in seeds] for seeds in by_choice]).mean(1)
    groups = range(len(records[0]["by_group"])) if choices[-1].group_share else ()
    by_group = [
        np.array([[trial["by_group"][g] for trial in seeds] for seeds in by_choice]).mean(1) for g in groups
    ]
    if by_group and worst is not None:
        best = fairest_candidate(losses, by_group[worst])
    else:
        best = best_candidate(losses)
    table = [
        {
            **chosen(choice),
            "target_loss": float(losses[i].mean()),
            "worst_group_loss": max((float(group[i].mean()) for group in by_group), default=None),
            "chosen": i == best,
        }
        for i, choice in enumerate(choices)
    ]
    return decisions[best], found, table
