"""FairCVtest: scores of job applicants learned from labels biased by gender or ethnicity, mended by weights of influence.

A linear regressor learns the biased labels of real profiles from occupation, merits and the face embedding; gender and ethnicity
themselves it never sees, but the face reveals them. The target is 200 profiles with blind labels: one half gives
influence, the other chooses the steps and when to stop, by really retrained proxies. Test profiles judge, with blind labels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from benchmarks import wanted
from benchmarks.arrays import BoolArray, FloatArray, IntArray, Labels
from benchmarks.bench import Bench, Benchmark
from benchmarks.data.faircv import Profiles, read_profiles
from benchmarks.fairness.gaps import demographic_parity, equalised_odds, worst_group
from benchmarks.methods.faircv_model import (
    CAP,
    CONFIG,
    GAP,
    MEAN,
    TARGET,
    TEMPERATURES,
    TEST,
    WORST,
    Applicants,
    iterated,
    on_the_mean,
)
from benchmarks.methods.fairlearn_baselines import equal_decisions, uncorrelated
from influencespace.core.fairness import with_floors
from influencespace.core.metrics import interval
from influencespace.core.select import top_fraction

BENCHMARK = Benchmark(data="faircv", seeds=(1, 2, 3))
CHOSEN = (
    0.2  # decided for: this share of the highest scores; truly good: this share of the highest blind labels
)
FLOOR = 0.5
ROUNDS = 12
DRAWS = 1000
FILES = {"gender": "Profiles_test_gen.npy", "ethnicity": "Profiles_test_et.npy"}
OURS = "influence, iterated"
"""The method that targets are about."""
NOTHING, BLIND, GROUPS = "-", "blind labels of the target", "groups"
METHODS = {
    "everything": NOTHING,
    "random": NOTHING,
    "reweighing by group and label": GROUPS,
    "fairlearn CorrelationRemover": f"{GROUPS}, at the test too",
    "fairlearn ExponentiatedGradient": GROUPS,
    "influence, pruned once": BLIND,
    "influence, pruned once, floors": f"{BLIND}, {GROUPS}",
    OURS: BLIND,
    "influence, iterated, floors": f"{BLIND}, {GROUPS}",
    "influence, iterated, worst group": f"{BLIND}, its groups",
    "influence on the gap, iterated": "groups of the target",
    "the target alone": BLIND,
    "oracle": "all blind labels",
}
"""Each with what it is provided with beside the biased labels."""


def reweighed(applicants: Applicants) -> FloatArray:
    """Weights (N,) that make the label independent of the group (Kamiran and Calders 2012), labels by quarter."""
    group, labels = applicants.group[applicants.train], applicants.profiles.biased[applicants.train]
    quarter = np.searchsorted(np.quantile(labels, [0.25, 0.5, 0.75]), labels)
    weights: FloatArray = np.empty(len(group))
    for name in np.unique(group):
        for label in range(4):
            cell = (group == name) & (quarter == label)
            if cell.any():
                weights[cell] = (group == name).mean() * (quarter == label).mean() / cell.mean()
    weights /= weights.mean()
    return weights


def measured(applicants: Applicants, rounds: int) -> dict[str, Any]:
    """Scores of the test profiles by every method, and the weights that it gave the pool: lists, for the cache."""
    train, test, group = applicants.train, applicants.test, applicants.group
    labels = applicants.profiles.biased[train]
    influence = on_the_mean(applicants, applicants.problem())[1][:, 0]
    kept = influence >= 0  # one round, no choice to make
    floors = with_floors(kept, influence, group[train], FLOOR)
    drawn = np.random.default_rng(applicants.seed).permutation(kept)
    weights = {
        "everything": np.ones(len(train)),
        "random": drawn / drawn.mean(),
        "reweighing by group and label": reweighed(applicants),
        "influence, pruned once": kept / kept.mean(),
        "influence, pruned once, floors": floors / floors.mean(),
        OURS: iterated(applicants, MEAN, rounds),
        "influence, iterated, floors": iterated(applicants, MEAN, rounds, FLOOR),
        "influence, iterated, worst group": iterated(applicants, WORST, rounds),
        "influence on the gap, iterated": iterated(applicants, GAP, rounds),
    }
    inputs = uncorrelated(applicants.inputs, group, train)
    proxy = applicants.problem(applicants.samples(train, applicants.standardised(labels), inputs))
    scores = {"fairlearn CorrelationRemover": applicants.scores(proxy, inputs)}
    target = np.concatenate([applicants.influencing, applicants.choosing])
    for name, rows in (("the target alone", target), ("oracle", train)):
        scores[name] = applicants.scores(applicants.problem(applicants.blind(rows)))
    scores |= {name: applicants.scores(applicants.problem(weights=w)) for name, w in weights.items()}
    good = top_fraction(labels, round(CHOSEN * len(train)))
    chance = {"fairlearn ExponentiatedGradient": equal_decisions(applicants.inputs, good, group, train, test)}
    by_kind = {"scores": scores, "weights": weights, "chance": chance}
    return {kind: {name: values.tolist() for name, values in each.items()} for kind, each in by_kind.items()}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one method makes of the test profiles of one split."""

    group: Labels  # (n,)
    blind: FloatArray  # (n,)
    scores: FloatArray  # (n,) nan where a method only decides
    chance: FloatArray | None  # (n,) of a good decision; none where scores decide

    @cached_property
    def good(self) -> BoolArray:
        return top_fraction(self.blind, round(CHOSEN * len(self.blind)))

    @cached_property
    def decided(self) -> FloatArray:
        """Chance of a good decision (n,): 1 for the highest scores."""
        if self.chance is not None:
            return self.chance
        return top_fraction(self.scores, round(CHOSEN * len(self.scores))).astype(np.float64)

    @cached_property
    def errors(self) -> FloatArray:
        """Distances from the blind labels (n,)."""
        return np.abs(self.scores - self.blind)

    def at(self, rows: IntArray) -> "Judged":
        chance = None if self.chance is None else self.chance[rows]
        return Judged(group=self.group[rows], blind=self.blind[rows], scores=self.scores[rows], chance=chance)


Measure = Callable[[Judged], float]


def gap(judged: Judged) -> float:
    """Largest difference of mean scores between groups."""
    return demographic_parity(judged.scores, judged.group)


def error(judged: Judged) -> float:
    """Mean distance from the blind label."""
    return float(judged.errors.mean())


def gap_of_decisions(judged: Judged) -> float:
    """Largest difference between groups in the share that is decided for."""
    return demographic_parity(judged.decided, judged.group)


MEASURES: dict[str, Measure] = {
    "gap": gap,
    "error": error,
    "worst_error": lambda judged: worst_group(judged.errors, judged.group),
    "gap_of_decisions": gap_of_decisions,
    "equalised_odds": lambda judged: equalised_odds(judged.decided, judged.good, judged.group),
    # share of the truly good that is decided for, in the group where it is least
    "worst_recall": lambda judged: (
        1 - worst_group(1 - judged.decided[judged.good], judged.group[judged.good])
    ),
}
WITH_INTERVAL = ("gap", "error", "equalised_odds")


def mean_of(measure: Measure, splits: Sequence[Judged]) -> float:
    return float(np.mean([measure(judged) for judged in splits]))


def draws(measure: Measure, splits: Sequence[Judged]) -> FloatArray:
    """The mean over resampled splits, each with its test profiles resampled; two methods are resampled alike: (DRAWS,)."""
    generator = np.random.default_rng(0)
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        drawn = generator.integers(0, len(splits), len(splits))
        rows = generator.integers(0, TEST, (len(splits), TEST))
        means[i] = mean_of(measure, [splits[k].at(rows[j]) for j, k in enumerate(drawn)])
    return means


def experiment(name: str, bench: Bench) -> None:
    """All methods on one experiment."""
    profiles = read_profiles(bench.real / "faircv" / FILES[name])
    group, rounds = getattr(profiles, name), bench.pick(ROUNDS, 2)
    settings = [CONFIG, CAP, TEMPERATURES, TEST, TARGET, CHOSEN, FLOOR, rounds]
    splits = [Applicants(profiles=profiles, group=group, seed=seed) for seed in bench.seeds]
    results = [
        bench.cached(["fairness", name, split.seed, settings], partial(measured, split, rounds))
        for split in splits
    ]
    judged = {method: judge(method, profiles, splits, results) for method in METHODS}
    biased = profiles.biased != profiles.blind
    for method, provided in METHODS.items():
        weights = [result["weights"].get(method) for result in results]
        shares = [
            (
                w[biased[split.train]].sum() / w.sum(),
                min(w[group[split.train] == g].mean() for g in np.unique(group)),
            )
            for w, split in zip(map(np.array, weights), splits)
            if w.ndim
        ]
        bench.row(
            method=method,
            provided=provided,
            **cells(judged[method]),
            weight_of_biased=mean_or_none(share for share, _ in shares),
            least_group_weight=mean_or_none(least for _, least in shares),
        )
    promises(name, bench, judged["everything"], judged[OURS])


def judge(
    method: str, profiles: Profiles, splits: Sequence[Applicants], results: Sequence[dict[str, Any]]
) -> list[Judged]:
    """What a method makes of each split's test profiles."""
    return [
        Judged(
            group=split.group[split.test],
            blind=profiles.blind[split.test],
            scores=np.array(result["scores"].get(method, np.full(TEST, np.nan))),
            chance=np.array(result["chance"][method]) if method in result["chance"] else None,
        )
        for split, result in zip(splits, results)
    ]


def cells(splits: Sequence[Judged]) -> dict[str, Any]:
    """Each measure, some with their interval."""
    row: dict[str, Any] = {}
    for column, measure in MEASURES.items():
        value = mean_of(measure, splits)
        known = bool(np.isfinite(value))
        row[column] = value if known else None
        if column in WITH_INTERVAL:
            row[f"{column}_interval"] = list(interval(draws(measure, splits))) if known else None
    return row


def promises(name: str, bench: Bench, everything: Sequence[Judged], ours: Sequence[Judged]) -> None:
    """Both promises of the gap, and that of the error."""
    for what, measure in {
        "mean scores": gap,
        f"decisions for the top {CHOSEN:.0%}": gap_of_decisions,
    }.items():
        bench.target(
            f"{name}: gap of {what}, {OURS}, as a share of that of everything",
            wanted.at_most(0.5),
            mean_of(measure, ours) / mean_of(measure, everything),
            interval(draws(measure, ours) / draws(measure, everything)),
        )
    bench.target(
        f"{name}: error on blind labels, {OURS}, minus that of everything",
        wanted.at_most(0),
        mean_of(error, ours) - mean_of(error, everything),
        interval(draws(error, ours) - draws(error, everything)),
    )


def mean_or_none(values: Iterable[float]) -> float | None:
    known = list(values)
    return float(np.mean(known)) if known else None


for _name in FILES:
    BENCHMARK.parts[_name] = partial(experiment, _name)
