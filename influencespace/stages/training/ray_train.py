"""Retraining by Ray Train: runs side by side, or all workers sharing every batch of one run after another."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from influencespace.data.mirror import arrow_storage, is_file
from influencespace.engine.placement import share
from influencespace.models.training import Alone, Exchange
from influencespace.run import Workers
from influencespace.stages.proxies.train_many import TrainProxy, training_memory

LOST_WORKERS = 3
"""As often is the group of workers begun again; runs that are done are not repeated."""


class Gloo:
    """The exchange of a Ray Train worker group, by torch.distributed, over the CPU: workers may share one GPU."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def gather(self, part: Tensor) -> list[Tensor]:
        own = part.detach().cpu()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(own)]))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, own.shape[1], dtype=own.dtype)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        return [whole[: int(size)].to(part.device) for whole, size in zip(parts, sizes)]

    def add_up(self, gradient: Tensor) -> None:
        added = gradient.cpu()
        torch.distributed.all_reduce(added)
        gradient.copy_(added)


def train_share(config: dict[str, Any]) -> None:
    """What every worker does: its share of the runs alone, or its share of every batch of all runs."""
    import ray.train

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    exchange: Exchange = Gloo() if config["shared"] and size > 1 else Alone()
    for training in config["trainings"] if config["shared"] else config["trainings"][rank::size]:
        training(exchange)
    ray.train.report({})


def train_by_ray(trainings: Sequence[TrainProxy], sharing: int, workers: Workers) -> list[dict[str, Any]]:
    """Train what is left; the records of all, in their order.

    With `sharing` = 1 there are as many runs at once as there are cores, else `sharing` workers share each run.
    """
    if left := [one for one in trainings if one.proxy.record is None]:
        _fit(left, sharing, workers)
    records = [one.proxy.record for one in trainings]
    missing = [one.training.name for one, record in zip(trainings, records) if record is None]
    assert not missing, f"training ended without {missing}"
    return [record for record in records if record is not None]


def _fit(left: Sequence[TrainProxy], sharing: int, workers: Workers) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    engine = workers.engine
    storage, filesystem = arrow_storage(workers.folder / ".ray")
    need = workers.heavy(cpus=0, memory=training_memory(left[0].pool))
    # all must find a place at once; on a cluster the job's own driver may hold a core
    free = engine.cores - (engine.cores_per_task < engine.cores)
    placed = share(
        engine.machines,
        sharing if sharing > 1 else min(len(left), max(1, free)),
        need=need,
        max_cpus=max(1, min(engine.cores_per_task, free // sharing if sharing > 1 else 1)),
    )
    trainer = TorchTrainer(
        train_share,
        train_loop_config={"trainings": left, "shared": sharing > 1},
        scaling_config=ray.train.ScalingConfig(
            num_workers=placed.workers,
            use_gpu=need.gpus > 0,
            resources_per_worker={"CPU": placed.resources.cpus, "memory": need.memory}
            | ({"GPU": need.gpus} if need.gpus else {}),
        ),
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(
            name=f"train-{time.time_ns()}",
            storage_path=storage,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=LOST_WORKERS),
        ),
    )
    with workers.progress(len(left), "proxies") as bar, _watching(left, bar.advance):
        _in_a_thread(trainer.fit)


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
def _watching(trainings: Sequence[TrainProxy], advance: Callable[[int], None]) -> Iterator[None]:
    """Report finished runs while the worker group is at it: their files appear on disk."""
    ended = threading.Event()

    def watch() -> None:
        seen = 0
        while True:
            last = ended.wait(1.0)
            done = sum(is_file(one.proxy.path) for one in trainings)
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
