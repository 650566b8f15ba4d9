"""What each method trains on, once the rivals stage is done."""

from dataclasses import dataclass

from influencespace.data.joined import TrainingPairs
from influencespace.run import Run
from influencespace.stages.proxies.train_many import Column, Uniform, Weights
from influencespace.stages.rivals.names import CURATED, DYNAMIC, EVERYTHING, TARGET_ALONE, WHOLE, plain
from influencespace.stages.rivals.sets import training_set
from influencespace.stages.selection.weighting import with_chosen


@dataclass(frozen=True, kw_only=True)
class Source:
    """The pairs that a method trains on, how often it meets each, and for how many steps."""

    weights: Weights
    steps: int
    kept_fraction: float
    """Of the pool."""
    pairs: TrainingPairs | None = None
    """None: the pool."""


def source_of(run: Run, method: str) -> Source:
    """Of one of the run's methods; raises InputError where the rivals stage is not finished."""
    steps: int = run.manifest("proxies").details["steps"]
    if method == EVERYTHING:
        return Source(weights=Uniform(), steps=steps, kept_fraction=1.0)
    if method in (CURATED, DYNAMIC):
        decided = Column(run.at("selection") / "curated.parquet", "weight")
        selected = run.manifest("selection").details
        own = with_chosen(run.config.selection, selected).steps(steps)
        return Source(weights=decided, steps=own, kept_fraction=selected["kept_fraction"])
    choice = run.manifest("rivals").details["choices"].get(method, {"steps": steps})
    if plain(method) in WHOLE:
        pairs, weights = training_set(run, plain(method), whole=True)
        kept = float(plain(method) != TARGET_ALONE)
        return Source(pairs=pairs, weights=weights, steps=choice["steps"], kept_fraction=kept)
    weights = Column(run.at("rivals") / "weights.parquet", method)
    return Source(weights=weights, steps=choice["steps"], kept_fraction=choice["fraction"])
