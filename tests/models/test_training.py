"""Training is seeded, equals a plain loop, and does not depend on the number of workers."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from influencespace.core.batches import training_batches
from influencespace.core.contrastive import info_nce
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.training import (
    Exchange,
    HeadsConfig,
    Trained,
    adam_preconditioner,
    cosine_factor,
    train_heads,
)

CONFIG = HeadsConfig(dimension=4, steps=8, batch_size=10, learning_rate=0.02, weight_decay=0.01)
N = 40


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(2, N, 6, generator=generator, dtype=torch.float64)
    return F.normalize(common + noise[0], dim=-1).to(dtype), F.normalize(common + noise[1], dim=-1).to(dtype)


def batches(config: HeadsConfig = CONFIG) -> list[np.ndarray]:
    return list(training_batches(np.ones(N), np.arange(N), config.batch_size, config.steps, seed=1))


def fit(config: HeadsConfig = CONFIG, exchange: Exchange | None = None) -> Trained:
    images, texts = data()
    heads = initial_heads(6, 6, config.dimension, seed=2).double()
    return train_heads(
        lambda rows: (images[rows], texts[rows]), batches(config), heads, config, exchange=exchange
    )


def flat(heads: Heads) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in heads.parameters()])


def test_the_learning_rate_falls_along_half_a_cosine() -> None:
    factors = [cosine_factor(step, 10) for step in range(11)]
    assert factors[0] == 1
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0)
    assert factors == sorted(factors, reverse=True)


def test_training_lowers_the_loss() -> None:
    losses = fit(replace(CONFIG, steps=60)).losses
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


def test_training_is_deterministic_and_tells_every_step() -> None:
    seen: list[tuple[int, float]] = []
    images, texts = data()
    heads = initial_heads(6, 6, CONFIG.dimension, seed=2).double()
    with_hook = train_heads(
        lambda rows: (images[rows], texts[rows]),
        batches(),
        heads,
        CONFIG,
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    first = fit()
    torch.testing.assert_close(flat(first.heads), flat(with_hook.heads), rtol=0, atol=0)
    assert first.losses == with_hook.losses
    assert seen == list(enumerate(first.losses))


@dataclass(frozen=True)
class ManualAdamW:
    """AdamW with a cosine schedule, written out (Loshchilov and Hutter 2019)."""

    parameters: Tensor
    first: Tensor
    second: Tensor

    def step(self, gradient: Tensor, t: int, rate: float, decay: float) -> "ManualAdamW":
        first = 0.9 * self.first + 0.1 * gradient
        second = 0.999 * self.second + 0.001 * gradient**2
        move = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        return ManualAdamW(self.parameters * (1 - rate * decay) - rate * move, first, second)


def test_training_is_adamw_on_info_nce_and_records_its_response() -> None:
    """The parameters, the preconditioner sqrt(v_hat) + eps and the sum of learning rates, from first principles."""
    images, texts = data()
    start = flat(initial_heads(6, 6, CONFIG.dimension, seed=2).double())
    state = ManualAdamW(start, torch.zeros_like(start), torch.zeros_like(start))
    rates = 0.0
    for t, rows in enumerate(batches(), start=1):
        rate = CONFIG.learning_rate * cosine_factor(t - 1, CONFIG.steps)

        def loss(parameters: Tensor, rows: np.ndarray = rows) -> Tensor:
            image_head, text_head = parameters.reshape(2, 6, CONFIG.dimension)
            u = F.normalize(images[rows] @ image_head, dim=-1)
            t = F.normalize(texts[rows] @ text_head, dim=-1)
            return info_nce(u @ t.T / CONFIG.temperature)

        gradient = torch.func.grad(loss)(state.parameters)
        state = state.step(gradient, t, rate, CONFIG.weight_decay)
        rates += rate
    trained = fit()
    torch.testing.assert_close(flat(trained.heads), state.parameters)
    preconditioner = (state.second / (1 - 0.999**CONFIG.steps)).sqrt() + 1e-8
    torch.testing.assert_close(trained.preconditioner, preconditioner)
    assert trained.sum_of_learning_rates == pytest.approx(rates)


def test_the_preconditioner_of_one_step_is_the_gradients_size() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(parameters, eps=1e-6)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients = torch.cat(
        [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    )
    optimizer.step()
    torch.testing.assert_close(adam_preconditioner(optimizer), gradients.abs() + 1e-6)


@dataclass
class Board:
    """What workers in threads of one process write for each other."""

    size: int
    barrier: threading.Barrier = field(init=False)
    notes: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)

    def swap(self, rank: int, value: Tensor) -> list[Tensor]:
        self.notes[rank] = value.detach().clone()
        self.barrier.wait()
        everyone = [self.notes[k] for k in range(self.size)]
        self.barrier.wait()
        return everyone


@dataclass(frozen=True)
class Threads:
    """An Exchange between threads."""

    board: Board
    rank: int

    @property
    def size(self) -> int:
        return self.board.size

    def gather(self, part: Tensor) -> list[Tensor]:
        return self.board.swap(self.rank, part)

    def add_up(self, gradient: Tensor) -> None:
        gradient.copy_(torch.stack(self.board.swap(self.rank, gradient)).sum(0))


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("batch_size", [10, 7])
def test_workers_that_share_every_batch_train_the_same_proxy(workers: int, batch_size: int) -> None:
    config = replace(CONFIG, batch_size=batch_size)
    alone = fit(config)
    board = Board(workers)
    with ThreadPoolExecutor(workers) as pool:
        together = list(pool.map(lambda rank: fit(config, Threads(board, rank)), range(workers)))
    for trained in together:
        torch.testing.assert_close(flat(trained.heads), flat(alone.heads), rtol=0, atol=1e-6)
        torch.testing.assert_close(trained.preconditioner, alone.preconditioner, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(trained.losses, alone.losses, rtol=1e-6)


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    images, texts = data()
    third = batches()[2][0]
    images[third] = float("nan")
    first = next(step for step, rows in enumerate(batches()) if third in rows)
    heads = initial_heads(6, 6, 4, seed=0).double()
    with pytest.raises(FloatingPointError, match=rf"loss is nan at step {first}"):
        train_heads(lambda rows: (images[rows], texts[rows]), batches(), heads, CONFIG)
