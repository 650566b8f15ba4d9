"""The rivals stage: what the methods that ours is compared with train on, at the same size or validated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from influencespace.core.select import KEPT
from influencespace.data.buckets import Columns
from influencespace.data.weight_list import weight_list_digest
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.ingest.embed import encoder_identity
from influencespace.stages.passes import RANGE, RangePasses
from influencespace.stages.proxies.train_many import Weights, training_memory
from influencespace.stages.rivals.datainf import NAME as DATAINF
from influencespace.stages.rivals.datainf import write_datainf
from influencespace.stages.rivals.descent import NAME as MGD
from influencespace.stages.rivals.descent import write_descent
from influencespace.stages.rivals.likeness import write_likeness
from influencespace.stages.rivals.listed import Listed, scaled
from influencespace.stages.rivals.mix import MIX, learn_mix_of
from influencespace.stages.rivals.names import (
    GIVEN,
    LIKENESS,
    RANKED,
    SETS,
    SUFFIX,
    VALIDATED,
    label,
    list_of,
    orders_of,
    plain,
    scores_of,
)
from influencespace.stages.rivals.ranking import Rankings
from influencespace.stages.rivals.scores import write_scores
from influencespace.stages.rivals.validation import Choice, Orders, Validation

WEIGHTS = "weights"


def _lists(run: Run) -> dict[str, str]:
    """The user's own lists by their names."""
    paths = {label(name): list_of(name) for name in run.config.train.methods}
    return {name: path for name, path in paths.items() if path is not None}


@dataclass(frozen=True)
class WeightsOfRange:
    """Columns of weights.parquet: the weights of each method that trains on the first pairs of an order."""

    weights: Mapping[str, Weights]

    def __call__(self, start: int, stop: int) -> Columns:
        return {method: one.read(start, stop) for method, one in self.weights.items()}


class Rivals(Stage):
    """Ranks the pairs by each rival's score and cuts its order where curated is cut, or where retraining likes it best.

    Writes weights.parquet and, as far as methods need them, the scores: scores.parquet, likeness.parquet, datainf.parquet and
    mgd.parquet; of all pairs.
    """

    name = "rivals"
    needs = ("proxies", "cluster", "selection")

    def settings(self, config: Any) -> Any:
        own = (*RANKED, *SETS, *VALIDATED)
        methods = [name for name in config.train.methods if name in own or list_of(name)]
        return methods, config.proxy, config.curvature, config.influence.bucket_size, config.seed

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The encoder's temperature is that of negCLIPLoss; lists are the user's."""
        encoder, lists = run.config.embed.encoder, _lists(run)
        inputs = {"encoder": encoder_identity(encoder)} if encoder and self._scores(run) else {}
        return inputs | {name: weight_list_digest(path) for name, path in lists.items()}

    def work(self, run: Run, workers: Workers) -> Details:
        methods: Sequence[str] = run.config.train.methods
        rows = run.first.manifest("proxies").rows_out
        kept: int = run.manifest("selection").details["reasons"][KEPT]
        facts = self._tables(run, workers)
        rankings = self._rankings(run, workers, methods)
        orders = Orders(
            rankings=rankings,
            rows=rows,
            passes=RangePasses(workers),
            cap=run.config.selection.max_weight,
        )
        steps: int = run.manifest("proxies").details["steps"]
        given = [Choice(method=name, steps=steps, fraction=kept / rows) for name in methods if name in RANKED]
        orders.cut([choice.first(rows) for choice in given])
        names = [plain(name) for name in methods if name in VALIDATED]
        validation = Validation(run=run, orders=orders, workers=workers)
        best = validation.best(names, steps) if names else {}
        chosen = {choice.method: choice for choice in given}
        chosen |= {f"{name}{SUFFIX}": choice for name, choice in best.items()}
        ranked = {name: choice for name, choice in chosen.items() if choice.method in RANKED}
        weights: dict[str, Weights] = dict(zip(ranked, orders.weights(list(ranked.values())), strict=True))
        for name, path in _lists(run).items():
            weights[name], count = scaled(Listed(path=path, pool=run.everything), orders.passes, rows)
            chosen[name] = Choice(method=name, steps=steps, fraction=count / rows)
        if weights:
            workers.table(WEIGHTS, WeightsOfRange(weights), rows, RANGE, label=WEIGHTS)
        details = {"choices": {name: vars(choice) for name, choice in chosen.items()}}
        trials = [vars(choice) | {"target_loss": loss} for choice, loss in validation.losses.items()]
        details |= {"mix": dict(rankings.mix), "trials": trials} | facts
        return Details(rows_in=rows, rows_out=rows, details=details)

    def _scores(self, run: Run) -> tuple[str, ...]:
        return scores_of(orders_of(run.config.train.methods))

    def _tables(self, run: Run, workers: Workers) -> dict[str, Any]:
        """Write what the orders are made of; facts for the manifest."""
        orders, facts = orders_of(run.config.train.methods), dict[str, Any]()
        needs = {"resources": workers.heavy(memory=training_memory(run.everything))}
        if scores := self._scores(run):
            facts = write_scores(run, scores, workers, **needs)
        if alike := tuple(name for name in LIKENESS if name in orders):
            write_likeness(run, alike, workers, **needs)
        if DATAINF in orders or MIX in orders:
            write_datainf(run, workers)
        if MGD in orders:
            write_descent(run, workers, **needs)
        return facts

    def _rankings(self, run: Run, workers: Workers, methods: Sequence[str]) -> Rankings:
        """The orders, with the mix learned and the moments of what is mixed, or softened by validation."""
        passes, rows = RangePasses(workers), run.first.manifest("proxies").rows_out
        rankings = Rankings(folder=workers.folder, pool=run.everything, seed=run.seed)
        if MIX in orders_of(methods):
            rankings = rankings.standardised(GIVEN, passes, rows)
            rankings = replace(rankings, mix=learn_mix_of(run, rankings, workers))
        validated = [plain(name) for name in methods if name in VALIDATED]
        return rankings.standardised([name for name in validated if name in RANKED], passes, rows)
