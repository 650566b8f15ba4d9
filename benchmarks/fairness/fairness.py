"""FairCVtest: scores of job applicants learned from labels biased by gender or ethnicity, mended by weights of influence.

A linear regressor learns the biased labels of real profiles from occupation, merits and the face embedding; gender and ethnicity
themselves it never sees, but the face reveals them. The target is 200 profiles with blind labels: one half gives
influence, the other chooses the steps and when to stop, by really retrained proxies. Test profiles judge, with blind labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from benchmarks import wanted
from benchmarks.bench import Bench, Benchmark
from benchmarks.data.faircv import read_profiles
from benchmarks.fairness.floors import with_floors
from benchmarks.fairness.gaps import demographic_parity, equalised_odds, worst_group
from benchmarks.methods import faircv_model as model
from benchmarks.methods.faircv_model import GAP, MEAN, TEST, WORST, Applicants, iterated
from benchmarks.methods.fairlearn_baselines import equal_decisions, uncorrelated
from influencespace.core.arrays import BoolArray, FloatArray, IntArray, Labels
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
    influence = model.on_the_mean(applicants, applicants.problem())[1][:, 0]
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
MEASURES: dict[str, Measure] = {
    "gap": lambda one: demographic_parity(one.scores, one.group),
    "error": lambda one: float(one.errors.mean()),
    "worst_error": lambda one: worst_group(one.errors, one.group),
    "gap_of_decisions": lambda one: demographic_parity(one.decided, one.group),
    "equalised_odds": lambda one: equalised_odds(one.decided, one.good, one.group),
    # share of the truly good that is decided for, in the group where it is least
    "worst_recall": lambda one: 1 - worst_group(1 - one.decided[one.good], one.group[one.good]),
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
    settings = [model.CONFIG, model.CAP, model.TEMPERATURES, TEST, model.TARGET, CHOSEN, FLOOR, rounds]
    splits = [Applicants(profiles=profiles, group=group, seed=seed) for seed in bench.seeds]
    results = [
        bench.cached(["fairness", name, split.seed, settings], partial(measured, split, rounds))
        for split in splits
    ]
    biased, judged = profiles.biased != profiles.blind, {}
    for method, provided in METHODS.items():
        judged[method] = [
            Judged(
                group=group[split.test],
                blind=profiles.blind[split.test],
                scores=np.array(result["scores"].get(method, np.full(TEST, np.nan))),
                chance=np.array(result["chance"][method]) if method in result["chance"] else None,
            )
            for split, result in zip(splits, results)
        ]
        of_biased, least = [], []
        for split, result in zip(splits, results):
            if method in result["weights"]:
                w, of = np.array(result["weights"][method]), group[split.train]
                of_biased.append(w[biased[split.train]].sum() / w.sum())
                least.append(min(w[of == name].mean() for name in np.unique(of)))
        bench.row(
            method=method,
            provided=provided,
            **cells(judged[method]),
            weight_of_biased=float(np.mean(of_biased)) if of_biased else None,
            least_group_weight=float(np.mean(least)) if least else None,
        )
    promises(name, bench, judged["everything"], judged[OURS])


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
    decisions = f"decisions for the top {CHOSEN:.0%}"
    for what, measure in (("mean scores", MEASURES["gap"]), (decisions, MEASURES["gap_of_decisions"])):
        ratio = mean_of(measure, ours) / mean_of(measure, everything)
        around = interval(draws(measure, ours) / draws(measure, everything))
        named = f"{name}: gap of {what}, {OURS}, as a share of that of everything"
        bench.target(named, wanted.at_most(0.5), ratio, around)
    error = MEASURES["error"]
    difference = mean_of(error, ours) - mean_of(error, everything)
    around = interval(draws(error, ours) - draws(error, everything))
    named = f"{name}: error on blind labels, {OURS}, minus that of everything"
    bench.target(named, wanted.at_most(0), difference, around)


for _name in FILES:
    BENCHMARK.parts[_name] = partial(experiment, _name)
