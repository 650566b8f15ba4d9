"""Other packages' own code beside ours, on a pointwise problem that they support: the same trained classifiers, same loss.

Parts: agreement of the same method (rank correlation of scores, by target group), the linear datamodeling score over half
subsets with classifiers that are really trained again, detection of wrong labels, and the price.
`pip install -e ".[bench]"` gets the packages, and one that is not there is named and left out.
"""

import time
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import wanted
from benchmarks.attribution.digits import (
    RATES,
    Classification,
    Kind,
    classifier,
    retrained,
    right_probability,
    sample_loop,
)
from benchmarks.attribution.lds import Foretold, half_subsets
from benchmarks.attribution.scoring import BLIND, SCORES, Score, damping_at, score_all, tuned
from benchmarks.bench import Bench, Benchmark
from benchmarks.cache import each_seed
from benchmarks.methods.packages import PEERS, SELF_INFLUENCE, Peer, TrainedClassifier, quiet
from influencespace.core.arrays import FloatArray
from influencespace.core.metrics import auroc, interval
from influencespace.estimators.datainf import DataInf
from influencespace.estimators.problem import Problem, per_sample_gradients
from influencespace.estimators.table import TABLE
from influencespace.estimators.trak import Trak, margin_gradients
from influencespace.models.training import HeadsConfig

BENCHMARK = Benchmark()
KINDS: tuple[Kind, ...] = ("linear", "mlp")
FOR_PAIRS = ("ekfac", "clip_score", "neg_clip_loss", "norm_sim")
WHOLE = 10**6  # more dimensions than any block has: nothing is projected
RIDGE, BLOCK_DAMPING = Trak().relative_ridge, DataInf().relative_damping
OURS: dict[str, Score] = {
    **{name: SCORES[name] for name in (*TABLE, "ecif, early stopping") if name not in FOR_PAIRS},
    "datainf, whole": lambda problem: score_all(DataInf(dimension=WHOLE), problem),
    "trak, whole": lambda problem: score_all(Trak(dimension=WHOLE), problem),
}
GAUSS_NEWTON, FACTORS = "Hessian, ours Gauss-Newton", "Kronecker factors, ours none"
LINEAR: tuple[Kind, ...] = ("linear",)
MATCHES: tuple[tuple[str, str, tuple[Kind, ...], str], ...] = (
    ("grad_dot", "dattri Grad-Dot", KINDS, ""),
    ("tracin", "dattri TracIn", KINDS, ""),
    ("tracin", "captum TracInCP", KINDS, ""),
    ("ecif", "dattri influence, explicit", LINEAR, GAUSS_NEWTON),
    ("ecif", "captum influence", LINEAR, GAUSS_NEWTON),
    ("ecif", "dattri influence, CG", (), "ten iterations, no tolerance"),
    ("ecif", "kronfluence EK-FAC", (), FACTORS),
    ("ecif", "dattri EK-FAC", (), FACTORS),
    ("ecif, early stopping", "dattri influence, explicit, early stopping", LINEAR, GAUSS_NEWTON),
    (
        "ecif, early stopping",
        "captum influence, early stopping",
        LINEAR,
        "Hessian less its negative part, ours Gauss-Newton",
    ),
    ("datainf, whole", "dattri DataInf", LINEAR, "one damping for all layers"),
    ("trak, whole", "dattri TRAK, whole, of the loss", KINDS, ""),
    ("trak, whole", "traker TRAK, whole, of the loss", KINDS, ""),
    ("less", "dattri Grad-Cos", (), "end of training alone, target gradients normalised"),
)
"""A line of ours and a peer's that should agree; for which proxies both are the same formula with the same settings; and what
differs for the others."""
RETRAININGS = 10  # seeds of the classifiers on each subset, whose losses are averaged before they are ranked


def provided(study: Classification, problem: Problem) -> TrainedClassifier:
    """What the peers get, with the settings that ours have."""
    gradients = per_sample_gradients(problem, problem.space)(study.pool.inputs, study.pool.image)
    margins = margin_gradients(problem, problem.space)(study.pool.inputs, study.pool.image)
    return TrainedClassifier(
        make=partial(classifier, study.kind),
        state=plain(problem.space.parameters),
        checkpoints=[(plain(c.load().parameters), c.learning_rate) for c in problem.checkpoints],
        pool=(study.pool.inputs[0], study.pool.inputs[1].argmax(1)),
        target=(study.target.inputs[0], study.target.inputs[1].argmax(1)),
        damping=problem.damping,
        early_stopping=damping_at(problem, 1.0),
        block_damping=BLOCK_DAMPING * float(gradients.square().mean()),
        ridge=RIDGE * float(margins.square().sum(0).mean()),
    )


def plain(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Predictor's parameters by the names of its module."""
    return {name.removeprefix("module."): value for name, value in parameters.items()}


def our_scores(study: Classification, name: str, seed: int) -> dict[str, Any]:
    """By group of the target (G, N), and seconds of one core for all groups."""
    groups = study.by_group(study.problem(seed))
    began = time.process_time()
    blind = name in BLIND
    values = [OURS[name](group).tolist() for group in (groups[:1] if blind else groups)]
    return {name: values * len(groups) if blind else values, "seconds": time.process_time() - began}


def peer_scores(study: Classification, name: str, peer: Peer, seed: int) -> dict[str, Any]:
    """The same of another package: of the loss, and for TRAK of the margin too, as it is published."""
    problem = study.problem(seed)
    trained = provided(study, problem)
    began = time.process_time()
    with quiet():
        scores = peer.score(trained)
    seconds = time.process_time() - began
    if scores.shape[1] == 1:
        return {name: [scores[:, 0].tolist()] * study.groups, "seconds": seconds}
    by_group = study.group_means(scores).T.tolist()
    if peer.output == "loss":
        return {name: by_group, "seconds": seconds}
    # the loss is softplus(-margin): its gradient is -(1 - p) times the margin's
    weights = 1 - right_probability(study, problem)
    of_loss = study.group_means(scores * weights).T.tolist()
    return {f"{name}, of the margin": by_group, f"{name}, of the loss": of_loss, "seconds": seconds}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What all methods say of one kind of proxy: (seeds, G, N) by name, and the seconds of the quickest seed."""

    values: dict[str, FloatArray]
    seconds: dict[str, float]
    theirs: tuple[str, ...]

    @property
    def ours(self) -> list[str]:
        return [name for name in self.values if name not in self.theirs]


@cache
def release(package: str) -> str:
    """Version of what is imported by this name."""
    return version(packages_distributions()[package][0])


def scored(bench: Bench, study: Classification, blind: bool = False) -> Scored:
    """Every line of ours that applies and every method of the packages that are installed."""
    values: dict[str, FloatArray] = {}
    seconds: dict[str, float] = {}
    theirs: list[str] = []
    peers = {**PEERS, **(SELF_INFLUENCE if blind else {})}
    for name in (*OURS, *(name for name, peer in peers.items() if peer.installed)):
        key: list[Any] = ["peers", study.key, name]
        if name in OURS:
            runs = each_seed(bench.cache, bench.seeds, key, our_scores, study, name)
        else:
            key.append(release(peers[name].package))
            runs = each_seed(bench.cache, bench.seeds, key, peer_scores, study, name, peers[name])
        seconds[name] = min(run["seconds"] for run in runs)
        names = [name for name in runs[0] if name != "seconds"]
        theirs += [] if name in OURS else names
        values |= {name: np.array([run[name] for run in runs]) for name in names}
    return Scored(values=values, seconds=seconds, theirs=tuple(theirs))


def studies(bench: Bench) -> dict[Kind, Classification]:
    """Proxies at the learning rate that does best on samples that nothing else looks at."""
    torch.set_num_threads(1)
    size, groups, steps = bench.pick((1000, 20, 100), (300, 5, 40))
    config = HeadsConfig(steps=steps, batch_size=100)
    return {
        kind: tuned(Classification(kind=kind, size=size, groups=groups, config=config), RATES, bench.cache)
        for kind in KINDS
    }


def not_installed(bench: Bench, **cells: Any) -> None:
    """A row for every method whose package is missing."""
    for name, peer in PEERS.items():
        if not peer.installed:
            bench.row(method=f"{name} (not installed)", **cells)


@BENCHMARK.part
def agreement(bench: Bench) -> None:
    """Spearman of ours with a peer's over the pool, for each group of the target and each seed."""
    for kind, study in studies(bench).items():
        scores = scored(bench, study)
        for ours, peer, identical, otherwise in MATCHES:
            cells: dict[str, Any] = {"ours": ours, "peer": peer, "proxy": kind}
            if peer not in scores.values:
                bench.row(**cells, what="not installed", version=None, spearman=None, interval=None)
                continue
            pairs = zip(np.concatenate(scores.values[ours]), np.concatenate(scores.values[peer]))
            values = np.array([spearmanr(a, b).statistic for a, b in pairs])
            same, middle = kind in identical, float(np.median(values))
            bench.row(
                **cells,
                what="the same method" if same else otherwise,
                version=release(PEERS[peer.removesuffix(", of the loss")].package),
                spearman=middle,
                interval=list(interval(values)),
            )
            if same:
                name = f"Spearman of `{ours}` with {peer}, {kind} proxy (median and 95 % of target groups)"
                bench.target(name, wanted.at_least(0.95), middle, interval(values))


def subset_losses(study: Classification, subsets: FloatArray, seed: int) -> dict[str, Any]:
    """Loss of each target group of a classifier trained on each subset (S, G)."""
    by_sample = retrained(study.problem(seed), study, subsets, seed)
    return {"losses": study.group_means(by_sample).tolist()}


@BENCHMARK.part
def lds_part(bench: Bench) -> None:
    """Rank correlation over random halves of the pool of the sum of scores with minus the loss of a target group."""
    for kind, study in studies(bench).items():
        scores, subsets = scored(bench, study), half_subsets(study.size, bench.pick(120, 40))
        key = ["peers' subsets", study.key, len(subsets)]
        repeats = range(bench.pick(RETRAININGS, 2))
        runs = each_seed(bench.cache, tuple(repeats), key, subset_losses, study, subsets)
        result = Foretold(subsets, np.array([run["losses"] for run in runs]))
        bench.row(method=result.REPEATED, proxy=kind, lds=result.ceiling, interval=None)
        values, draws = result.lds_of(scores.values)
        for name in sorted(values, key=lambda name: -values[name]):
            bench.row(method=name, proxy=kind, lds=values[name], interval=list(interval(draws[name])))
        not_installed(bench, proxy=kind, lds=None, interval=None)
        if scores.theirs:
            ours, theirs = (
                max(names, key=lambda name: values[name]) for names in (scores.ours, scores.theirs)
            )
            name = f"LDS of the best of ours, `{ours}`, minus that of the best peer, {theirs}, {kind} proxy"
            around = interval(draws[ours] - draws[theirs])
            bench.target(name, wanted.not_significantly_below(0), values[ours] - values[theirs], around)


@BENCHMARK.part
def detection(bench: Bench) -> None:
    """AUROC of wrong labels by minus the score, its mean over all target groups."""
    for kind, study in studies(bench).items():
        scores = scored(bench, study, blind=True)
        result = {
            name: [auroc(-run, study.is_wrong) for run in values.mean(1)]
            for name, values in scores.values.items()
        }
        for name in sorted(result, key=lambda name: -float(np.mean(result[name]))):
            bench.row(method=name, proxy=kind, auroc=float(np.mean(result[name])), lowest=min(result[name]))
        not_installed(bench, proxy=kind, auroc=None, lowest=None)


@BENCHMARK.part
def speed(bench: Bench) -> None:
    """Seconds of one core for the scores of the whole pool for all target groups, and as a share of per-sample gradients."""
    for kind, study in studies(bench).items():
        loop = sample_loop(study.problem(0))
        bench.row(method="(a loop of per-sample gradients)", proxy=kind, seconds=loop, of_the_loop=1.0)
        seconds = scored(bench, study, blind=True).seconds
        for name in sorted(seconds, key=lambda name: seconds[name]):
            bench.row(method=name, proxy=kind, seconds=seconds[name], of_the_loop=seconds[name] / loop)
        not_installed(bench, proxy=kind, seconds=None, of_the_loop=None)
