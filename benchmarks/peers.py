"""Other packages' own code beside ours, on a pointwise problem that they support: the same trained classifiers, same loss.

Parts: agreement of the same method (rank correlation of scores, by target group), the linear datamodeling score over half
subsets with classifiers that are really trained again, detection of wrong labels, and the price. See docs/benchmarks.md;
`pip install -e ".[bench]"` gets the packages, and one that is not there is named and left out.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution import half_subsets
from common import ESTIMATING, ROOT, TRAINING, Benchmark, arguments, cached
from digits import Classification, Kind, classifier, retrained, right_probability, sample_loop, tuned
from packages import PEERS, SELF_INFLUENCE, Peer, ProvidedEmbeddings, quiet
from scipy.stats import rankdata, spearmanr
from study import BLIND, FloatArray, score_all, table
from torch import Tensor

from influencespace.core.metrics import auroc, interval
from influencespace.estimators.datainf import DataInf
from influencespace.estimators.influence import CurvatureConfig, damping_of
from influencespace.estimators.problem import Problem, per_sample_gradients
from influencespace.estimators.table import TABLE
from influencespace.estimators.trak import Trak, margin_gradients
from influencespace.models.training import HeadsConfig

KINDS: tuple[Kind, ...] = ("linear", "mlp")
FOR_PAIRS = ("ekfac", "clip_score", "neg_clip_loss", "norm_sim")
WHOLE = 10**6  # more dimensions than any block has: nothing is projected
RIDGE, BLOCK_DAMPING = Trak().relative_ridge, DataInf().relative_damping
OURS: dict[str, Callable[[Problem], FloatArray]] = {
    **{name: score for name, score in table().items() if name in TABLE and name not in FOR_PAIRS},
    "ecif, early stopping": table()["ecif, early stopping"],
    "datainf, whole": lambda problem: score_all(DataInf(dimension=WHOLE), problem),
    "trak, whole": lambda problem: score_all(Trak(dimension=WHOLE), problem),
}


@dataclass(frozen=True, kw_only=True)
class Match:
    """A line of ours and a peer's that should agree."""

    ours: str
    peer: str
    same: tuple[Kind, ...] = ()
    """Proxies for which both are the same formula with the same settings."""
    otherwise: str = ""
    """What differs for the others."""


MATCHES = (
    Match(ours="grad_dot", peer="dattri Grad-Dot", same=KINDS),
    Match(ours="tracin", peer="dattri TracIn", same=KINDS),
    Match(ours="tracin", peer="captum TracInCP", same=KINDS),
    Match(
        ours="ecif",
        peer="dattri influence, explicit",
        same=("linear",),
        otherwise="Hessian, ours Gauss-Newton",
    ),
    Match(ours="ecif", peer="captum influence", same=("linear",), otherwise="Hessian, ours Gauss-Newton"),
    Match(ours="ecif", peer="dattri influence, CG", otherwise="ten iterations, no tolerance"),
    Match(ours="ecif", peer="kronfluence EK-FAC", otherwise="Kronecker factors, ours none"),
    Match(ours="ecif", peer="dattri EK-FAC", otherwise="Kronecker factors, ours none"),
    Match(
        ours="ecif, early stopping",
        peer="dattri influence, explicit, early stopping",
        same=("linear",),
        otherwise="Hessian, ours Gauss-Newton",
    ),
    Match(
        ours="ecif, early stopping",
        peer="captum influence, early stopping",
        same=("linear",),
        otherwise="Hessian less its negative part, ours Gauss-Newton",
    ),
    Match(
        ours="datainf, whole",
        peer="dattri DataInf",
        same=("linear",),
        otherwise="one damping for all layers",
    ),
    Match(ours="trak, whole", peer="dattri TRAK, whole, of the loss", same=KINDS),
    Match(ours="trak, whole", peer="traker TRAK, whole, of the loss", same=KINDS),
    Match(
        ours="less", peer="dattri Grad-Cos", otherwise="end of training alone, target gradients normalised"
    ),
)


def given_of(study: Classification, problem: Problem) -> ProvidedEmbeddings:
    """What the peers get, with the settings that ours have."""
    found = per_sample_gradients(problem, problem.space)(study.pool.inputs, study.pool.image)
    margins = margin_gradients(problem, problem.space)(study.pool.inputs, study.pool.image)
    return ProvidedEmbeddings(
        make=partial(classifier, study.kind),
        state=plain(problem.space.parameters),
        checkpoints=[(plain(c.load().parameters), c.learning_rate) for c in problem.checkpoints],
        pool=(study.pool.inputs[0], study.pool.inputs[1].argmax(1)),
        target=(study.target.inputs[0], study.target.inputs[1].argmax(1)),
        damping=problem.damping,
        early_stopping=early_stopping(problem),
        block_damping=BLOCK_DAMPING * float(found.square().mean()),
        ridge=RIDGE * float(margins.square().sum(0).mean()),
    )


def early_stopping(problem: Problem) -> float:
    """The damping of `ecif, early stopping`."""
    path = problem.trajectory
    assert path is not None
    rates = sum(path.rate(index) for index in range(len(path.batches)))
    return damping_of(CurvatureConfig(damping_factor=1.0), rates, path.config.weight_decay)


def plain(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Predictor's parameters by the names of its module."""
    return {name.removeprefix("module."): value for name, value in parameters.items()}


def our_scores(study: Classification, seed: int, name: str) -> dict[str, Any]:
    """By group of the target (G, N), and seconds of one core for all groups."""
    groups = study.by_group(study.problem(seed))
    began = time.process_time()
    blind = name in BLIND
    found = [OURS[name](group).tolist() for group in (groups[:1] if blind else groups)]
    return {name: found * len(groups) if blind else found, "seconds": time.process_time() - began}


def peer_scores(study: Classification, seed: int, name: str, peer: Peer) -> dict[str, Any]:
    """The same of another package: of the loss, and for TRAK of the margin too, as it is published."""
    problem = study.problem(seed)
    given = given_of(study, problem)
    began = time.process_time()
    with quiet():
        scores = peer.score(given)
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
class Scores:
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


def text_of(name: str) -> str:
    """A benchmark's own code, which its results depend on."""
    return (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")


def all_scores(study: Classification, folder: Path, seeds: Sequence[int], blind: bool = False) -> Scores:
    """Every line of ours that applies and every method of the packages that are installed."""
    values: dict[str, FloatArray] = {}
    seconds: dict[str, float] = {}
    theirs: list[str] = []

    def add(name: str, make: Callable[[int], dict[str, Any]], key: list[Any]) -> list[str]:
        runs = [
            cached(
                folder,
                ["peers", text_of("digits"), study.key, name, key, seed],
                partial(make, seed),
                ESTIMATING,
            )
            for seed in seeds
        ]
        seconds[name] = min(run["seconds"] for run in runs)
        names = [key for key in runs[0] if key != "seconds"]
        for found in names:
            values[found] = np.array([run[found] for run in runs])
        return names

    for name in OURS:
        add(name, partial(our_scores, study, name=name), [])
    for name, peer in {**PEERS, **(SELF_INFLUENCE if blind else {})}.items():
        if peer.installed:
            make = partial(peer_scores, study, name=name, peer=peer)
            theirs += add(name, make, [text_of("packages"), release(peer.package)])
    return Scores(values=values, seconds=seconds, theirs=tuple(theirs))


def missing() -> list[str]:
    """Methods whose package is not installed."""
    return [name for name, peer in PEERS.items() if not peer.installed]


@dataclass(frozen=True, kw_only=True)
class World:
    """What all parts share."""

    bench: Benchmark
    cache: Path
    quick: bool

    @cached_property
    def studies(self) -> dict[Kind, Classification]:
        """Proxies at the learning rate that does best on samples that nothing else looks at."""
        size, groups, steps = (300, 5, 40) if self.quick else (1000, 20, 100)
        config = HeadsConfig(steps=steps, batch_size=100)
        return {
            kind: tuned(Classification(kind=kind, size=size, groups=groups, config=config)) for kind in KINDS
        }

    def scores(self, kind: Kind, blind: bool = False) -> Scores:
        return all_scores(self.studies[kind], self.cache, self.bench.seeds, blind)


def agreement_part(world: World) -> None:
    """Spearman of ours with a peer's over the pool, for each group of the target and each seed."""
    bench = world.bench
    for kind in KINDS:
        scores = world.scores(kind)
        for match in MATCHES:
            if match.peer not in scores.values:
                bench.row(
                    ours=match.ours,
                    peer=match.peer,
                    proxy=kind,
                    what="not installed",
                    version=None,
                    spearman=None,
                    interval=None,
                )
                continue
            pairs = zip(np.concatenate(scores.values[match.ours]), np.concatenate(scores.values[match.peer]))
            found = np.array([spearmanr(a, b).statistic for a, b in pairs])
            same, middle = kind in match.same, float(np.median(found))
            bench.row(
                ours=match.ours,
                peer=match.peer,
                proxy=kind,
                what="the same method" if same else match.otherwise,
                version=release(PEERS[match.peer.removesuffix(", of the loss")].package),
                spearman=middle,
                interval=list(interval(found)),
            )
            if same:
                bench.target(
                    name=f"Spearman of `{match.ours}` with {match.peer}, {kind} proxy (median and 95 % of target groups)",
                    target="at least 0.95",
                    measured=middle,
                    interval=interval(found),
                    reached=middle >= 0.95,
                )


RETRAININGS = 10  # seeds of the classifiers on each subset, whose losses are averaged before they are ranked


def lds_part(world: World) -> None:
    """Rank correlation over random halves of the pool of the sum of scores with minus the loss of a target group."""
    bench, quick = world.bench, world.quick
    for kind in KINDS:
        study, scores = world.studies[kind], world.scores(kind)
        subsets = half_subsets(study.size, 40 if quick else 120)

        def losses(seed: int, study: Classification = study, subsets: FloatArray = subsets) -> dict[str, Any]:
            by_sample = retrained(study.problem(seed), study, subsets, seed)
            return {"losses": study.group_means(by_sample).tolist()}

        repeats = np.array(
            [
                cached(
                    world.cache,
                    ["peers' subsets", text_of("digits"), study.key, len(subsets), seed],
                    partial(losses, seed),
                    TRAINING,
                )["losses"]
                for seed in range(2 if quick else RETRAININGS)
            ]
        )  # (seeds, S, G)
        truth = -repeats.mean(0)
        rest = [-np.delete(repeats, seed, 0).mean(0) for seed in range(len(repeats))]
        ceiling = float(np.mean([lds(-one, other) for one, other in zip(repeats, rest)]))
        bench.row(method="(one seed's proxies against the others')", proxy=kind, lds=ceiling, interval=None)
        resampled = [np.random.default_rng(d).integers(0, len(subsets), len(subsets)) for d in range(500)]
        draws: dict[str, FloatArray] = {}
        values: dict[str, float] = {}
        for name, found in scores.values.items():
            predicted = subsets @ np.nan_to_num(found.mean(0)).T  # (S, G)
            values[name] = lds(predicted, truth)
            draws[name] = np.array([lds(predicted[rows], truth[rows]) for rows in resampled])
        for name in sorted(values, key=lambda name: -values[name]):
            bench.row(method=name, proxy=kind, lds=values[name], interval=list(interval(draws[name])))
        not_installed(bench, proxy=kind, lds=None, interval=None)
        if not scores.theirs:
            continue
        ours, theirs = (max(names, key=lambda name: values[name]) for names in (scores.ours, scores.theirs))
        low, high = interval(draws[ours] - draws[theirs])
        bench.target(
            name=f"LDS of the best of ours, `{ours}`, minus that of the best peer, {theirs}, {kind} proxy",
            target="at least 0, or not surely below",
            measured=values[ours] - values[theirs],
            interval=(low, high),
            reached=high >= 0,
        )


def lds(predicted: FloatArray, truth: FloatArray) -> float:
    """Spearman over subsets, mean over groups: two (S, G)."""
    a, b = (rankdata(x, axis=0) - (len(x) + 1) / 2 for x in (predicted, truth))
    lengths = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return float(((a * b).sum(0) / np.where(lengths > 0, lengths, 1)).mean())


def not_installed(bench: Benchmark, **cells: Any) -> None:
    for name in missing():
        bench.row(method=f"{name} (not installed)", **cells)


def detection_part(world: World) -> None:
    """AUROC of wrong labels by minus the score, its mean over all target groups."""
    for kind in KINDS:
        study, scores = world.studies[kind], world.scores(kind, blind=True)
        found = {
            name: [auroc(-run, study.is_wrong) for run in values.mean(1)]
            for name, values in scores.values.items()
        }
        for name in sorted(found, key=lambda name: -float(np.mean(found[name]))):
            world.bench.row(
                method=name, proxy=kind, auroc=float(np.mean(found[name])), lowest=min(found[name])
            )
        not_installed(world.bench, proxy=kind, auroc=None, lowest=None)


def speed_part(world: World) -> None:
    """Seconds of one core for the scores of the whole pool for all target groups, and as a share of per-sample gradients."""
    for kind in KINDS:
        study = world.studies[kind]
        loop = sample_loop(study.problem(0))
        world.bench.row(method="(a loop of per-sample gradients)", proxy=kind, seconds=loop, of_the_loop=1.0)
        seconds = world.scores(kind, blind=True).seconds
        for name in sorted(seconds, key=lambda name: seconds[name]):
            share = seconds[name] / loop
            world.bench.row(method=name, proxy=kind, seconds=seconds[name], of_the_loop=share)
        not_installed(world.bench, proxy=kind, seconds=None, of_the_loop=None)


PARTS: dict[str, Callable[[World], None]] = {
    "agreement": agreement_part,
    "lds": lds_part,
    "detection": detection_part,
    "speed": speed_part,
}


def main() -> None:
    options = arguments(__doc__ or "", "peers", parts=tuple(PARTS))
    torch.set_num_threads(1)
    bench = Benchmark("peers", options.quick, options.out, seeds=(0,) if options.quick else (0, 1, 2))
    if missing():
        print(f'not installed (pip install -e ".[bench]"): {", ".join(missing())}')
    world = World(bench=bench, cache=options.cache, quick=options.quick)
    bench.measure(options.parts, lambda part: PARTS[part](world), tuple(PARTS))


if __name__ == "__main__":
    main()
