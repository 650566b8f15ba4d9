"""The train stage: proxies retrained on each method's weighted subset, at equal steps, by Ray Train."""

from dataclasses import field as plain_field
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as options

from influencespace.engine.local import LocalEngine
from influencespace.errors import STRICT
from influencespace.run import Details, Run, Stage, Workers
from influencespace.stages.proxies.train_many import Column, Training, TrainProxy, train_many
from influencespace.stages.selection.selection import DYNAMIC, METHODS, weights_of
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
    methods: tuple[str, ...] = plain_field(default=METHODS)
    """What is trained and compared; `curated` is always among them. `dynamic` can be asked for beside the default ones: it
    begins as `curated` and re-weights the kept pairs while it trains, by influence on the target as a whole."""
    refresh: int = Field(default=50, ge=1)
    """Steps of `dynamic` between two re-weightings."""

    def __post_init__(self) -> None:
        known = (*METHODS, DYNAMIC)
        if "curated" not in self.methods or not set(self.methods) <= set(known):
            raise ValueError(f"methods = {self.methods}: curated and any of {', '.join(known[1:])} are known")
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
    """Retrains on every method's subset with every seed, for equally many steps; writes one file for each."""

    name = "train"
    version = 2
    needs = ("selection",)

    def settings(self, config: Any) -> Any:
        return config.train, config.proxy.train

    def work(self, run: Run, workers: Workers) -> Details:
        config: TrainConfig = run.config.train
        steps, weights = run.manifest("proxies").details["steps"], run.at("selection") / "weights.parquet"
        trainings = {
            f"{method}-{seed}": Training(
                name=f"{method}-{seed}",
                weights=Column(weights, weights_of(method)),
                seed=seed,
                steps=steps,
                trainer=DynamicTrainer.of(run) if method == DYNAMIC else None,
            )
            for seed in config.seeds_of(len(run.everything))
            for method in config.methods
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
