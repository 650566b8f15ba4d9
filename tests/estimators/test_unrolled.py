"""Unrolled influence against proxies that are really trained again, in float64."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from problems import INPUT, OUTPUT, Small
from torch import Tensor

from influencespace.core.contrastive import InfoNce, info_nce
from influencespace.errors import InputError
from influencespace.estimators.problem import Problem, scores
from influencespace.estimators.unrolled import (
    Form,
    Unrolled,
    gradients_without,
    removal_derivative,
)
from influencespace.models.heads import Heads, initial_heads
from influencespace.models.training import cosine_factor, train_heads
from influencespace.models.trajectory import Rule, loss_gradient

RATE: dict[Rule, float] = {"sgd": 0.1, "adamw": 0.01}

rules = pytest.mark.parametrize("rule", ["sgd", "adamw"])


@cache
def small(rule: Rule, seed: int = 0) -> Small:
    """40 pairs, each in about two batches of five."""
    return Small(pairs=40, steps=30, learning_rate=RATE[rule], temperature=0.5, seed=seed)


@cache
def problem(rule: Rule, seed: int = 0) -> Problem:
    made = small(rule, seed)
    return replace(made.problem, trajectory=replace(made.trajectory, rule=rule))


@cache
def found(rule: Rule, form: Form, seed: int = 0) -> np.ndarray:
    return scores(Unrolled(form=form), problem(rule, seed), small(rule, seed).cut())


def retrained(rule: Rule, weights: Tensor, seed: int = 0) -> float:
    """Target loss after training by torch.optim on the same batches, each pair weighted."""
    of = small(rule, seed)
    heads = initial_heads(INPUT, INPUT, OUTPUT, 0).double()
    make = torch.optim.SGD if rule == "sgd" else torch.optim.AdamW
    optimizer = make(heads.parameters(), lr=of.learning_rate, weight_decay=0.0)
    for index, rows in enumerate(of.batches(np.ones(of.pairs), 0)):
        optimizer.param_groups[0]["lr"] = of.learning_rate * cosine_factor(index, of.steps)
        u, t = heads(*of.rows(rows))
        optimizer.zero_grad()
        of.config.objective.weighted_loss(u, t, weights[rows]).backward()
        optimizer.step()
    return of.target_loss(heads)


def without(rule: Rule, pair: int | None, seed: int = 0) -> float:
    """Target loss after training on the same batches less one pair; AdamW by the trainer itself."""
    of = small(rule, seed)
    batches = [rows[rows != pair] for rows in of.batches(np.ones(of.pairs), 0)]
    heads: Heads = initial_heads(INPUT, INPUT, OUTPUT, 0).double()
    if rule == "adamw":
        return of.target_loss(train_heads(of.rows, batches, heads, of.config).heads)
    optimizer = torch.optim.SGD(heads.parameters(), lr=of.learning_rate)
    for index, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = of.learning_rate * cosine_factor(index, of.steps)
        u, t = heads(*of.rows(rows))
        optimizer.zero_grad()
        info_nce(u @ t.T / of.temperature).backward()
        optimizer.step()
    return of.target_loss(heads)


@cache
def leave_one_out(rule: Rule, seed: int = 0) -> np.ndarray:
    whole = without(rule, None, seed)
    return np.array([without(rule, pair, seed) - whole for pair in range(40)])


def agreement(rule: Rule, form: Form, seed: int) -> tuple[float, float]:
    """Pearson of scores with leave-one-out retraining, and the slope of truth over score."""
    truth, score = leave_one_out(rule, seed), found(rule, form, seed)
    return float(np.corrcoef(score, truth)[0, 1]), float(np.polyfit(score, truth, 1)[0])


def test_a_weight_of_zero_is_the_batch_without_the_pair() -> None:
    S = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    assert float(InfoNce(1.0).weighted_loss(S, torch.eye(len(S)).to(S), ones)) == pytest.approx(
        float(info_nce(S))
    )
    rest = torch.tensor([0, 1, 3, 4, 5])
    less = ones.clone()
    less[2] = 0
    assert float(InfoNce(1.0).weighted_loss(S, torch.eye(len(S)).to(S), less)) == pytest.approx(
        float(info_nce(S[rest][:, rest]))
    )


def test_removals_are_those_of_gradients_pair_by_pair() -> None:
    """By per-sample autograd: `exact` takes the batch without the pair, `taylor` the derivative in its weight."""
    path = problem("sgd").trajectory
    assert path is not None
    space, inputs = path.space, path.inputs(path.batches[0])
    theta = space.flatten(space.parameters)
    c = torch.randn(space.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    base = loss_gradient(space, theta, inputs, path.objective)
    exact = removal_derivative(space, inputs, c, path.objective, "exact")
    taylor = removal_derivative(space, inputs, c, path.objective, "taylor")
    every = torch.cat(list(gradients_without(space, theta, inputs, path.objective)))

    def slope(w: Tensor) -> Tensor:
        x = theta.clone().requires_grad_()
        u, t = torch.func.functional_call(space.proxy, space.unflatten(x), inputs)
        loss = path.objective.weighted_loss(u, t, w)
        return torch.autograd.grad(loss, x, create_graph=True)[0] @ c

    w = torch.ones(len(base[:16]), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(taylor, -torch.autograd.grad(slope(w), w)[0])
    for z in range(16):
        rest = [k for k in range(16) if k != z]
        less = loss_gradient(space, theta, (inputs[0][rest], inputs[1][rest]), path.objective)
        torch.testing.assert_close(every[z], less)
        torch.testing.assert_close(exact[z], c @ (less - base))


@rules
def test_the_derivative_is_that_of_retraining_with_the_pairs_weight(rule: Rule) -> None:
    """Central differences over whole trainings; AdamW's moments are carried."""
    score, h = found(rule, "taylor"), 1e-5
    for pair in (0, 7, 21, 33):
        ends = []
        for weight in (1 - h, 1 + h):
            weights = torch.ones(40, dtype=torch.float64)
            weights[pair] = weight
            ends.append(retrained(rule, weights))
        truth = (ends[0] - ends[1]) / (2 * h)
        assert score[pair] == pytest.approx(truth, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("seed", [0, 1, 2])
@rules
def test_removals_agree_with_leave_one_out_retraining(rule: Rule, seed: int) -> None:
    """In size and sign: a Pearson correlation of 0.97 and a slope near one, with all of a removal in each step."""
    pearson, slope = agreement(rule, "whole", seed)
    assert pearson > 0.97
    assert 0.8 < slope < 1.2


def test_without_gradients_of_single_pairs_adamw_is_near() -> None:
    """AdamW's first steps are all but signs: to first order in the gradient they can be off for a small batch."""
    pearsons, slopes = zip(*(agreement("adamw", "exact", seed) for seed in range(4)), strict=True)
    assert np.mean(pearsons) > 0.92
    assert min(pearsons) > 0.85
    assert all(0.8 < slope < 1.25 for slope in slopes)


def test_for_sgd_the_whole_step_is_the_first_order() -> None:
    np.testing.assert_allclose(found("sgd", "whole"), found("sgd", "exact"), rtol=1e-8, atol=1e-12)


@rules
def test_positive_means_that_removal_raises_the_target_loss(rule: Rule) -> None:
    truth, score = leave_one_out(rule), found(rule, "exact")
    extreme = np.argsort(score)[[0, 1, 2, -3, -2, -1]]
    np.testing.assert_array_equal(np.sign(score[extreme]), np.sign(truth[extreme]))


@rules
def test_any_partition_and_any_order_give_the_same_scores(rule: Rule) -> None:
    order = np.random.default_rng(1).permutation(40)
    again = np.empty(40)
    again[order] = scores(Unrolled(), problem(rule), small(rule).cut([7, 1, 32], order))
    np.testing.assert_array_equal(again, found(rule, "exact"))


def test_a_pair_that_was_in_no_batch_has_no_score() -> None:
    path = problem("sgd").trajectory
    assert path is not None
    first = replace(path, batches=path.batches[:1])
    found = scores(Unrolled(), replace(problem("sgd"), trajectory=first), small("sgd").cut())
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(found)), np.sort(path.batches[0]))


def test_without_a_trajectory_the_error_says_what_to_do() -> None:
    with pytest.raises(InputError, match="record it in training"):
        Unrolled().fit(replace(problem("sgd"), trajectory=None))


@pytest.mark.parametrize("row", [-1, 40])
def test_a_pair_that_is_not_of_the_pool_is_refused(row: int) -> None:
    batch = small("sgd").cut()[0]
    stranger = replace(batch, row=np.full(40, row))
    with pytest.raises(InputError, match=f"row {row} "):
        scores(Unrolled(), problem("sgd"), [stranger])
