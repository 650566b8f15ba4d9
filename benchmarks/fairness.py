"""FairCVtest: scores of job applicants learned from labels biased by gender or ethnicity, mended by weights of influence.

A linear regressor learns the biased labels of real profiles from occupation, merits and the face embedding; gender and ethnicity
themselves it never sees, but the face tells them. The target is 200 profiles with blind labels: one half gives
influence, the other chooses the steps and when to stop, by really retrained proxies. Test profiles judge, with blind labels.
Needs the real data; see docs/benchmarks.md.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from applicants import (
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
from common import ESTIMATING, Benchmark, arguments, cached, real_data
from reductions import equal_decisions, installed, uncorrelated
from study import FloatArray

from influencespace.core.fairness import demographic_parity, equalised_odds, with_floors, worst_group
from influencespace.core.metrics import interval
from influencespace.core.select import top_fraction
from benchmarks.data.faircv import read_profiles

CHOSEN = (
    0.2  # decided for: this share of the highest scores; truly good: this share of the highest blind labels
)
FLOOR = 0.5
ROUNDS = 12
DRAWS = 1000
FILES = {"gender": "Profiles_test_gen.npy", "ethnicity": "Profiles_test_et.npy"}
CODE = (*ESTIMATING, "core/fairness.py", "core/select.py", "data/faircv.py")
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
"""Each with what it is told beside the biased labels."""


def pruned(applicants: Applicants) -> tuple[np.ndarray, FloatArray]:
    """Which profiles (N,) have influence of zero or more, and the influence: one round, no choice to make."""
    influence = on_the_mean(applicants, applicants.problem())[1][:, 0]
    return influence >= 0, influence


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
    found: dict[str, Any] = {}

    def weighted(name: str, weights: FloatArray) -> None:
        scores = applicants.scores(applicants.problem(weights=weights))
        found[name] = {"scores": scores.tolist(), "weights": weights.tolist()}

    kept, influence = pruned(applicants)
    floors = with_floors(kept, influence, group[train], FLOOR)
    drawn = np.random.default_rng(applicants.seed).permutation(kept)
    weighted("everything", np.ones(len(train)))
    weighted("random", drawn / drawn.mean())
    weighted("reweighing by group and label", reweighed(applicants))
    if installed():
        inputs = uncorrelated(applicants.inputs, group, train)
        proxy = applicants.problem(applicants.samples(train, applicants.standardised(labels), inputs))
        found["fairlearn CorrelationRemover"] = {"scores": applicants.scores(proxy, inputs).tolist()}
        good = top_fraction(labels, round(CHOSEN * len(train)))
        chance = equal_decisions(applicants.inputs, good, group, train, test)
        found["fairlearn ExponentiatedGradient"] = {"chance": chance.tolist()}
    else:
        print("fairlearn is not installed (extra bench): its rows are left out", flush=True)
    weighted("influence, pruned once", kept / kept.mean())
    weighted("influence, pruned once, floors", floors / floors.mean())
    weighted(OURS, iterated(applicants, MEAN, rounds))
    weighted("influence, iterated, floors", iterated(applicants, MEAN, rounds, FLOOR))
    weighted("influence, iterated, worst group", iterated(applicants, WORST, rounds))
    weighted("influence on the gap, iterated", iterated(applicants, GAP, rounds))
    target = np.concatenate([applicants.influencing, applicants.choosing])
    for name, rows in (("the target alone", target), ("oracle", train)):
        proxy = applicants.problem(applicants.blind(rows))
        found[name] = {"scores": applicants.scores(proxy).tolist()}
    return found


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one method makes of the test profiles of one split."""

    group: np.ndarray  # (n,)
    blind: FloatArray  # (n,)
    scores: FloatArray | None  # (n,) none where a method only decides
    chance: FloatArray | None  # (n,) of a good decision; none where scores decide

    @cached_property
    def good(self) -> np.ndarray:
        return top_fraction(self.blind, round(CHOSEN * len(self.blind)))

    @cached_property
    def decided(self) -> FloatArray:
        """Chance of a good decision (n,): 1 for the highest scores."""
        if self.scores is None:
            assert self.chance is not None
            return self.chance
        return top_fraction(self.scores, round(CHOSEN * len(self.scores))).astype(np.float64)

    def at(self, rows: np.ndarray) -> "Judged":
        def some(values: FloatArray | None) -> FloatArray | None:
            return None if values is None else values[rows]

        return Judged(
            group=self.group[rows],
            blind=self.blind[rows],
            scores=some(self.scores),
            chance=some(self.chance),
        )


def gap(judged: Judged) -> float:
    """Largest difference of mean scores between groups."""
    return float("nan") if judged.scores is None else demographic_parity(judged.scores, judged.group)


def error(judged: Judged) -> float:
    """Mean distance from the blind label."""
    return float("nan") if judged.scores is None else float(np.abs(judged.scores - judged.blind).mean())


def worst_error(judged: Judged) -> float:
    """The error of the group that has the highest."""
    if judged.scores is None:
        return float("nan")
    return worst_group(np.abs(judged.scores - judged.blind), judged.group)[0]


def gap_of_decisions(judged: Judged) -> float:
    """Largest difference between groups in the share that is decided for."""
    return demographic_parity(judged.decided, judged.group)


def odds(judged: Judged) -> float:
    return equalised_odds(judged.decided, judged.good, judged.group)


def worst_recall(judged: Judged) -> float:
    """Share of the truly good that is decided for, in the group where it is least."""
    return 1 - worst_group(1 - judged.decided[judged.good], judged.group[judged.good])[0]


Measure = Callable[[Judged], float]


def mean_of(measure: Measure, splits: Sequence[Judged]) -> float:
    return float(np.mean([measure(judged) for judged in splits]))


def draws(measure: Measure, splits: Sequence[Judged]) -> FloatArray:
    """The mean over resampled splits, each with its test profiles resampled; two methods are resampled alike: (DRAWS,)."""
    generator = np.random.default_rng(0)
    found = np.empty(DRAWS)
    for i in range(DRAWS):
        drawn = generator.integers(0, len(splits), len(splits))
        rows = generator.integers(0, TEST, (len(splits), TEST))
        found[i] = mean_of(measure, [splits[k].at(rows[j]) for j, k in enumerate(drawn)])
    return found


def part(name: str, bench: Benchmark, folder: Path, cache: Path, quick: bool) -> None:
    """All methods on one experiment."""
    profiles = read_profiles(folder / FILES[name])
    group = getattr(profiles, name)
    biased = profiles.biased != profiles.blind
    rounds = 2 if quick else ROUNDS
    settings = [CONFIG, CAP, TEMPERATURES, TEST, TARGET, CHOSEN, FLOOR, rounds, installed()]
    splits = [Applicants(profiles=profiles, group=group, seed=seed) for seed in bench.seeds]
    found = [
        cached(cache, ["fairness", name, split.seed, settings], partial(measured, split, rounds), CODE)
        for split in splits
    ]
    judged = {
        method: [
            Judged(
                group=group[split.test],
                blind=profiles.blind[split.test],
                scores=_array(result[method].get("scores")),
                chance=_array(result[method].get("chance")),
            )
            for split, result in zip(splits, found)
        ]
        for method in found[0]
    }
    for method, told in METHODS.items():
        if method not in judged:
            continue
        weights = [_array(result[method].get("weights")) for result in found]
        bench.row(
            method=method,
            told=told,
            **_cells(judged[method]),
            weight_of_biased=_mean(
                None if w is None else w[biased[split.train]].sum() / w.sum()
                for w, split in zip(weights, splits)
            ),
            least_group_weight=_mean(
                None if w is None else min(w[group[split.train] == g].mean() for g in np.unique(group))
                for w, split in zip(weights, splits)
            ),
        )
    targets(name, bench, judged["everything"], judged[OURS])


MEASURES: dict[str, Measure] = {
    "gap": gap,
    "error": error,
    "worst_error": worst_error,
    "gap_of_decisions": gap_of_decisions,
    "equalised_odds": odds,
    "worst_recall": worst_recall,
}


def _cells(splits: Sequence[Judged]) -> dict[str, Any]:
    """Each measure with its interval."""
    cells: dict[str, Any] = {}
    for column, measure in MEASURES.items():
        value = mean_of(measure, splits)
        known = bool(np.isfinite(value))
        cells[column] = value if known else None
        if column in ("gap", "error", "equalised_odds"):
            cells[f"{column}_interval"] = list(interval(draws(measure, splits))) if known else None
    return cells


def targets(name: str, bench: Benchmark, everything: Sequence[Judged], ours: Sequence[Judged]) -> None:
    """Both promises of the gap, and that of the error."""
    for what, measure in {
        "mean scores": gap,
        f"decisions for the top {CHOSEN:.0%}": gap_of_decisions,
    }.items():
        ratio = mean_of(measure, ours) / mean_of(measure, everything)
        bench.target(
            name=f"{name}: gap of {what}, {OURS}, as a share of that of everything",
            target="at most 0.5",
            measured=ratio,
            interval=interval(draws(measure, ours) / draws(measure, everything)),
            reached=ratio <= 0.5,
        )
    difference = mean_of(error, ours) - mean_of(error, everything)
    bench.target(
        name=f"{name}: error on blind labels, {OURS}, minus that of everything",
        target="at most 0",
        measured=difference,
        interval=interval(draws(error, ours) - draws(error, everything)),
        reached=difference <= 0,
    )


def _array(values: list[float] | None) -> FloatArray | None:
    return None if values is None else np.array(values)


def _mean(values: Any) -> float | None:
    known = list(values)
    return None if None in known else float(np.mean(known))


def main() -> int:
    options = arguments(__doc__ or "", "fairness", parts=tuple(FILES))
    data = real_data()
    if data is None or not (data / "faircv").is_dir():
        print("skipped: no real data; set INFLUENCESPACE_DATA to a folder that holds faircv/")
        return 0
    bench = Benchmark("fairness", options.quick, options.out, seeds=(0,) if options.quick else (1, 2, 3))
    folder = data / "faircv"
    bench.measure(
        options.parts,
        lambda name: part(name, bench, folder, options.cache, options.quick),
        tuple(FILES),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
