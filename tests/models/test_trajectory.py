"""The replayed path is the trainer's, and the adjoint along it is the derivative of what training ends in, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian

from influencespace.core.batches import training_batches
from influencespace.core.contrastive import InfoNce, info_nce
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.space import Inputs, Space
from influencespace.models.training import HeadsConfig, cosine_factor, train_heads
from influencespace.models.trajectory import (
    Rule,
    State,
    Trajectory,
    adjoint,
    hessian_product,
    loss_gradient,
    preconditioner,
    space_at,
    step,
)

N, D_IN = 30, 5
CONFIG = HeadsConfig(
    dimension=3, steps=11, batch_size=8, learning_rate=0.03, weight_decay=0.1, temperature=0.3
)
RULES: list[Rule] = ["adamw", "sgd"]

rules = pytest.mark.parametrize("rule", RULES)


def embeddings(n: int, seed: int) -> Inputs:
    x = torch.randn(2, n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x[0], dim=-1), F.normalize(x[0] + x[1], dim=-1)


POOL, TARGET = embeddings(N, 0), embeddings(12, 1)


def rows(index: np.ndarray) -> Inputs:
    return POOL[0][index], POOL[1][index]


def batches() -> list[np.ndarray]:
    return list(training_batches(np.ones(N), np.arange(N), CONFIG.batch_size, CONFIG.steps, seed=3))


def heads() -> Heads:
    return initial_heads(D_IN, D_IN, CONFIG.dimension, seed=2).double()


def flat(proxy: Heads) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in proxy.parameters()])


def trajectory(rule: Rule = "adamw") -> Trajectory:
    return Trajectory(
        space=Space(heads()),
        initial=flat(heads()),
        config=CONFIG,
        batches=batches(),
        inputs=rows,
        objective=CONFIG.objective,
        rule=rule,
    )


def trained_by_torch(rule: Rule) -> list[Tensor]:
    """Parameters after each step, by the trainer or by torch.optim.SGD."""
    proxy, path = heads(), []
    if rule == "adamw":
        train_heads(rows, batches(), proxy, CONFIG, on_step=lambda step, loss: path.append(flat(proxy)))
        return path
    optimizer = torch.optim.SGD(proxy.parameters(), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    for index, batch in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = CONFIG.learning_rate * cosine_factor(index, CONFIG.steps)
        u, t = proxy(*rows(batch))
        optimizer.zero_grad()
        info_nce(u @ t.T / CONFIG.temperature).backward()
        optimizer.step()
        path.append(flat(proxy))
    return path


SPACE = Space(heads())


def target_loss(theta: Tensor) -> Tensor:
    u, t = functional_call(SPACE.proxy, SPACE.unflatten(theta), TARGET)
    return info_nce(u @ t.T / CONFIG.temperature)


@rules
def test_the_replay_is_the_training(rule: Rule) -> None:
    truth, path = trained_by_torch(rule), trajectory(rule)
    torch.testing.assert_close(path.final, truth[-1], rtol=0, atol=1e-10)
    seen = []
    for index, state in path.backwards():
        before = flat(heads()) if index == 0 else truth[index - 1]
        torch.testing.assert_close(state.theta, before, rtol=0, atol=1e-10)
        seen.append(index)
    assert seen == list(reversed(range(CONFIG.steps)))


def test_about_a_square_root_of_the_states_is_kept() -> None:
    assert len(trajectory().stored) == 5  # before steps 0, 3, 6, 9 and at the end


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_paths_of_any_length_are_walked_back(steps: int) -> None:
    path = replace(trajectory(), batches=batches()[:steps])
    assert [index for index, _ in path.backwards()] == list(reversed(range(steps)))


def test_a_proxy_trained_in_place_does_not_move_its_path() -> None:
    proxy = heads()
    path = replace(trajectory(), space=Space(proxy))
    train_heads(rows, batches(), proxy, CONFIG)
    torch.testing.assert_close(path.final, trajectory().final, rtol=0, atol=0)


def test_products_with_the_hessian_are_those_of_the_dense_one() -> None:
    space, inputs = Space(heads()), rows(batches()[0])

    def loss(theta: Tensor) -> Tensor:
        u, t = functional_call(space.proxy, space.unflatten(theta), inputs)
        return info_nce(4.0 * u @ t.T)

    theta = flat(heads())
    x = torch.randn(space.size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(loss_gradient(space, theta, inputs, InfoNce(4.0)), grad(loss)(theta))
    torch.testing.assert_close(
        hessian_product(space, theta, inputs, InfoNce(4.0), x), hessian(loss)(theta) @ x
    )


def test_a_space_at_other_parameters_leaves_the_first_as_it_was() -> None:
    space = Space(heads())
    moved = space_at(space, flat(heads()) + 1)
    torch.testing.assert_close(moved.flatten(moved.parameters), flat(heads()) + 1)
    torch.testing.assert_close(space.flatten(space.parameters), flat(heads()), rtol=0, atol=0)


@rules
@pytest.mark.parametrize("index", [0, 1, 4, 10])
def test_the_adjoint_is_the_derivative_of_the_end_in_a_steps_gradient(rule: Rule, index: int) -> None:
    """Central differences of training in which one step's gradient is nudged; AdamW with its moments carried."""
    path = trajectory(rule)
    nudge = torch.randn(path.space.size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def end(size: float) -> float:
        state = State(path.initial, torch.zeros_like(path.initial), torch.zeros_like(path.initial))
        for t in range(CONFIG.steps):
            gradient = path.gradient(state, t) + (size * nudge if t == index else 0)
            state = step(state, gradient, t, path.rate(t), CONFIG.weight_decay, rule)
        return float(target_loss(state.theta))

    found = {a.index: a.of_gradient for a in adjoint(path, grad(target_loss)(path.final))}
    size = 1e-6
    truth = (end(size) - end(-size)) / (2 * size)
    assert float(found[index] @ nudge) == pytest.approx(truth, rel=1e-4)


def test_for_plain_sgd_the_adjoint_is_the_published_recursion() -> None:
    """lam_T = g_V, lam_t = lam_{t+1} - eta_t H_t lam_{t+1}, without weight decay."""
    path = replace(trajectory("sgd"), config=replace(CONFIG, weight_decay=0.0))
    lam = grad(target_loss)(path.final)
    for answer in adjoint(path, lam):
        eta, inputs = path.rate(answer.index), rows(path.batches[answer.index])
        torch.testing.assert_close(answer.of_gradient, -eta * lam)
        lam = lam - eta * hessian_product(path.space, answer.state.theta, inputs, path.objective, lam)


def test_a_parameter_without_gradient_has_no_nan() -> None:
    dead = torch.zeros(3, dtype=torch.float64)
    slope = torch.func.grad(lambda v: preconditioner(v, 0).sum())(dead)
    torch.testing.assert_close(slope, dead)


def test_an_adjoint_that_overflows_names_its_step() -> None:
    broken = torch.full((trajectory().space.size,), float("inf"), dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="step 10"):
        list(adjoint(trajectory(), broken))
