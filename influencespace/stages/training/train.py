"""The train stage: proxies retrained on each method's weighted subset, at equal steps, by Ray Train."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as plain_field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as options
from safetensors.torch import save_file
from torch import Tensor

from influencespace.data.artifacts import Manifest, atomic_path, fingerprint, reopen, write_json
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.engine.local import Engine, LocalEngine, run_task
from influencespace.engine.progress import progress
from influencespace.models.training import Alone, Exchange, HeadsConfig, Trained
from influencespace.stages.finish import finish_stage, finished_stage
from influencespace.stages.proxies.proxies import read_note, train_subset
from influencespace.stages.selection.selection import DYNAMIC, METHODS, weights_of
from influencespace.stages.training.dynamic import Reweighting, train_dynamically


@options(frozen=True, kw_only=True)
class TrainConfig:
    """The retraining that judges."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    """Each method is trained once for each."""
    workers: int = Field(default=1, ge=1)
    """Workers of a run; the global batch does not change with them."""
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
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name} = {given}: give one or more, each once")


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """One training run: a method's subset with a seed."""

    pool: PairSet
    weights: Path
    method: str
    seed: int
    proxy: HeadsConfig
    folder: Path
    mark: str
    refresh: int
    reweighting: Reweighting | None

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def note(self) -> Path:
        return self.folder / f"{self.name}.json"

    def done(self) -> dict[str, Any] | None:
        return read_note(self.note, self.mark)

    def __call__(self, exchange: Exchange | None = None) -> dict[str, Any]:
        """Train, unless that is done; worker 0 writes the result."""
        done = self.done()
        if done is not None:
            return done
        exchange = exchange or Alone()
        if exchange.rank == 0:
            self.note.unlink(missing_ok=True)  # of another config: never beside weights that are not its own
        began = time.monotonic()
        trained = self.train(exchange)
        result = {
            "mark": self.mark,
            "method": self.method,
            "seed": self.seed,
            "steps": len(trained.losses),
            "training_loss": trained.losses[-1],
            "seconds": time.monotonic() - began,
        }
        if exchange.rank == 0:
            state = {name: value.detach().contiguous() for name, value in trained.heads.state_dict().items()}
            with atomic_path(self.path) as aside:
                save_file(state, aside)
            write_json(self.note, result)
        return result

    def train(self, exchange: Exchange) -> Trained:
        column = weights_of(self.method)
        weights = read_columns(self.weights, column)[column]
        steps, seed = self.proxy.steps, self.seed
        if self.method == DYNAMIC:
            assert self.reweighting is not None, "nothing says what to weigh by"
            return train_dynamically(
                self.pool, weights, self.reweighting, self.refresh, steps, seed, exchange
            )
        return train_subset(self.pool, weights, self.proxy, steps, seed, exchange)


class Gloo:
    """The exchange of a Ray Train worker group, by torch.distributed."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def gather(self, part: Tensor) -> list[Tensor]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(part)]))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, part.shape[1], dtype=part.dtype)
        padded[: len(part)] = part.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        return [whole[: int(size)] for whole, size in zip(parts, sizes)]

    def add_up(self, gradient: Tensor) -> None:
        torch.distributed.all_reduce(gradient)


def run_all(config: dict[str, Any]) -> None:
    """What every Ray Train worker does: all training runs, one after another, sharing each batch."""
    import ray.train

    exchange: Exchange = Gloo() if ray.train.get_context().get_world_size() > 1 else Alone()
    for run in config["runs"]:
        ray.train.report({"run": run.name, "seconds": run(exchange)["seconds"]})


def train(
    pool: PairSet,
    weights: Path,
    proxy: HeadsConfig,
    steps: int,
    inputs: dict[str, str],
    config: TrainConfig,
    out: Path,
    engine: Engine,
    reweighting: Reweighting | None = None,
) -> Manifest:
    """Retrain on every method's subset with every seed, for equally many steps; `dynamic` needs to know its re-weighting."""
    mark = fingerprint({"stage": "train", "config": config, "proxy": proxy, "steps": steps, "inputs": inputs})
    if (done := finished_stage(out, mark)) is not None:
        return done
    began = time.monotonic()
    reopen(out)
    make = partial(
        Retrain,
        pool=pool,
        weights=weights,
        proxy=replace(proxy, steps=steps),
        folder=out,
        mark=mark,
        refresh=config.refresh,
        reweighting=reweighting,
    )
    runs = [make(method=method, seed=seed) for seed in config.seeds for method in config.methods]
    left = [run for run in runs if run.done() is None]
    with progress("train", len(left), "proxies") as bar:
        if isinstance(engine, LocalEngine):
            for _ in engine.map(run_task, left):
                bar.advance()
        elif left:
            _train_on_ray(left, config, engine, out, mark, bar.advance)
    notes = [run.done() for run in runs]
    missing = [run.name for run, note in zip(runs, notes) if note is None]
    assert not missing, f"training ended without {missing}"
    manifest = Manifest(stage="train", fingerprint=mark, inputs=inputs, details={"runs": notes})
    return finish_stage(out, manifest, began)


def _train_on_ray(
    runs: list[Retrain],
    config: TrainConfig,
    engine: Engine,
    out: Path,
    mark: str,
    advance: Callable[[int], None],
) -> None:
    """Ray Train over the worker group; a lost worker restarts the group, and finished runs are not repeated."""
    import ray.train
    from ray.train.torch import TorchTrainer

    storage = out / "ray"
    cores = max(1, min(engine.cores_per_task, engine.cores // config.workers))
    trainer = TorchTrainer(
        run_all,
        train_loop_config={"runs": runs},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, resources_per_worker={"CPU": cores}
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{mark[:12]}-{time.time_ns()}",
            storage_path=str(storage.absolute()),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    with _watching(runs, advance):
        _in_a_thread(trainer.fit)
    shutil.rmtree(storage, ignore_errors=True)


def _in_a_thread(work: Callable[[], object]) -> None:
    """Do the work in a thread and wait: Ctrl-C then interrupts this run as in every stage.

    In the main thread Ray Train answers it itself, by an end of the process without a word.
    """
    ended: Future[None] = Future()

    def run() -> None:
        try:
            work()
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    ended.result()


@contextmanager
def _watching(runs: list[Retrain], advance: Callable[[int], None]) -> Iterator[None]:
    """Report finished runs while the worker group is at it: their notes appear on disk."""
    ended = threading.Event()

    def watch() -> None:
        seen = 0
        while True:
            last = ended.wait(1.0)
            done = sum(run.done() is not None for run in runs)
            advance(done - seen)
            seen = done
            if last:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
