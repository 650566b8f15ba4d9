"""The train stage: proxies retrained on what each method trains on, by Ray Train."""

from dataclasses import field as plain_field
from functools import partial
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass as options

from influencespace.engine.local import LocalEngine
from influencespace.errors import STRICT
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.train_many import Training, TrainProxy, train_many
from influencespace.stages.rivals.names import ALL, DEFAULT, DYNAMIC, METHODS, label, list_of, named
from influencespace.stages.rivals.sources import source_of
from influencespace.stages.training.dynamic import DynamicTrainer
from influencespace.stages.training.ray_train import train_by_ray

MANY_SEEDS_PAIRS = 500_000
"""Above, a training takes a thousand steps or more, and seeds differ little."""


@options(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The retraining that judges."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Each method is trained once for each; by default 0, 1 and 2, but 0 and 1 for pools of more than 500,000 pairs."""
    workers: int = Field(default=1, ge=1)
    """Workers that share each run; the global batch does not change with them. 1 trains runs side by side."""
    methods: tuple[str, ...] = plain_field(default=DEFAULT)
    """What is trained and compared; `curated` is always among them, and `rivals` stands for all that is known. Of a name that
    ends in `_validated`, fraction, temperature and steps are chosen by retraining. `dynamic` begins as `curated`, trains for as
    many steps and re-weights the kept pairs meanwhile, by influence on the target as a whole. `NAME=FILE` trains on a list of the
    user's: uids, and perhaps weights."""
    refresh: int = Field(default=50, ge=1)
    """Steps of `dynamic` between two re-weightings."""

    @field_validator("methods", mode="before")
    @classmethod
    def _all_of_them(cls, value: object) -> object:
        names = (value,) if isinstance(value, str) else value
        return named(names) if isinstance(names, list | tuple) else value

    def __post_init__(self) -> None:
        known = (*METHODS, DYNAMIC)
        own = [name for name in self.methods if list_of(name) is not None]
        unknown = sorted(set(self.methods) - set(known) - set(own))
        if unknown or "curated" not in self.methods:
            wrong = ", ".join(unknown) or "no curated"
            raise ValueError(
                f"methods has {wrong}: give curated, NAME=FILE for a list of your own, and any of {ALL}, {', '.join(known[1:])}"
            )
        labels = list(map(label, self.methods))
        for name in own:
            if not label(name).isidentifier() or labels.count(label(name)) > 1 or label(name) in known:
                raise ValueError(
                    f"methods has {name}: the name of a list is a word of its own, such as mine=FILE"
                )
        for name in ("seeds", "methods"):
            values = getattr(self, name)
            if values is None:
                continue
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} = {values}: give one or more, each once")

    def seeds_of(self, pairs: int) -> tuple[int, ...]:
        """The seeds for a pool of so many pairs."""
        if self.seeds is not None:
            return self.seeds
        return (0, 1, 2) if pairs <= MANY_SEEDS_PAIRS else (0, 1)


class Train(Stage):
    """Retrains by every method with every seed, for equally many steps unless retraining chose them; writes one file for each."""

    name = "train"
    version = 3
    needs = ("proxies", "selection", "rivals")

    def settings(self, config: Any) -> Any:
        return config.train, config.proxy.train

    def work(self, run: Run, workers: Workers) -> Details:
        config: TrainConfig = run.config.train
        sources = {method: source_of(run, method) for method in map(label, config.methods)}
        trainings = {
            f"{method}-{seed}": Training(
                name=f"{method}-{seed}",
                weights=source.weights,
                seed=seed,
                steps=source.steps,
                trainer=DynamicTrainer.of(run) if method == DYNAMIC else None,
                pairs=source.pairs,
            )
            for seed in config.seeds_of(len(run.everything))
            for method, source in sources.items()
        }
        ordered, heads = list(trainings.values()), run.config.proxy.train
        if isinstance(workers.engine, LocalEngine):
            records = train_many(run.everything, heads, ordered, workers)
        else:
            make = partial(
                TrainProxy,
                pool=run.everything,
                config=heads,
                folder=workers.folder,
                device=workers.device,
            )
            records = train_by_ray([make(training=one) for one in ordered], config.workers, workers)
        methods = {name: {"method": name.rpartition("-")[0]} for name in trainings}
        return Details(details={"runs": [record | methods[record["name"]] for record in records]})
