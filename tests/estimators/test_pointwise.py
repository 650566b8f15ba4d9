"""The table under losses of each sample by itself: classification and regression, against dense truth in float64."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

from influencespace.core.contrastive import Pointwise, cross_entropy, squared_error
from influencespace.core.metrics import auroc
from influencespace.errors import InputError
from influencespace.estimators.datainf import DataInf
from influencespace.estimators.ecif import Ecif
from influencespace.estimators.el2n import El2n
from influencespace.estimators.grad_dot import GradDot
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch
from influencespace.estimators.problem import FloatArray, Problem, scores
from influencespace.estimators.proxy_problem import batch_of, proxy_problem
from influencespace.estimators.table import TABLE
from influencespace.estimators.tracin import TracIn
from influencespace.estimators.trak import Trak
from influencespace.estimators.unrolled import Unrolled
from influencespace.models.predictor import Predictor
from influencespace.models.training import HeadsConfig
from influencespace.models.trajectory import Trajectory

SAMPLES, CLASSES, FEATURES = 60, 3, 4
FOR_PAIRS = {"ekfac", "clip_score", "neg_clip_loss", "norm_sim"}
LOSSES = {"classes": cross_entropy, "numbers": squared_error}
CONFIG = HeadsConfig(steps=60, batch_size=16, learning_rate=0.02)
kinds = pytest.mark.parametrize("kind", LOSSES)


def samples(kind: str, count: int, seed: int, wrong: FloatArray | None = None) -> NegativeBatch:
    """Inputs and the labels that a fixed linear rule gives them; wrong ones are another sample's."""
    rule = torch.from_numpy(np.random.default_rng(99).normal(size=(FEATURES, CLASSES)))
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, FEATURES)))
    y = 2 * x @ rule
    if kind == "classes":
        y = nn.functional.one_hot(y.argmax(1), CLASSES).double()
    if wrong is not None:
        y = torch.where(torch.from_numpy(wrong)[:, None], y.roll(1, 1), y)
    return NegativeBatch(inputs=(x, y), image=np.arange(count))


WRONG = np.random.default_rng(3).random(SAMPLES) < 0.2


@cache
def pool(kind: str) -> NegativeBatch:
    return samples(kind, SAMPLES, 1, WRONG)


@cache
def problem(kind: str) -> Problem:
    torch.manual_seed(0)
    proxy = Predictor(nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)))
    return proxy_problem(
        pool(kind),
        samples(kind, 80, 2),
        CONFIG,
        proxy=proxy,
        objective=Pointwise(LOSSES[kind]),
        curvature=CurvatureConfig(damping_factor=1.0),
    )


def found(name: str, kind: str) -> FloatArray:
    return scores(TABLE[name](), problem(kind), [batch_of(pool(kind))])


def losses(kind: str, theta: Tensor, data: NegativeBatch) -> Tensor:
    space = problem(kind).space
    u, y = functional_call(space.proxy, space.unflatten(theta), data.inputs)
    return LOSSES[kind](u, y)


@cache
def theta(kind: str) -> Tensor:
    space = problem(kind).space
    return space.flatten(space.parameters)


@cache
def gradients(kind: str) -> Tensor:
    """Per-sample gradients (n, p), one backward pass each."""
    x, y = pool(kind).inputs
    rows = []
    for i in range(SAMPLES):
        one = NegativeBatch(inputs=(x[i : i + 1], y[i : i + 1]), image=np.arange(1))
        rows.append(grad(lambda q, one=one: losses(kind, q, one).sum())(theta(kind)))
    return torch.stack(rows)


@kinds
def test_the_target_gradient_is_that_of_the_mean_loss(kind: str) -> None:
    target = samples(kind, 80, 2)
    truth = grad(lambda q: losses(kind, q, target).mean())(theta(kind))
    torch.testing.assert_close(problem(kind).target_gradient, truth)


@kinds
def test_grad_dot_is_the_dot_product(kind: str) -> None:
    truth = gradients(kind) @ problem(kind).target_gradient
    np.testing.assert_allclose(scores(GradDot(), problem(kind), [batch_of(pool(kind))]), truth, rtol=1e-9)


@kinds
def test_ecif_is_influence_through_the_dense_gauss_newton_matrix(kind: str) -> None:
    given = problem(kind)
    G = torch.zeros(given.space.size, given.space.size, dtype=torch.float64)
    for recorded in given.bank:

        def predictions(q: Tensor, data: NegativeBatch = recorded) -> Tensor:
            return functional_call(given.space.proxy, given.space.unflatten(q), data.inputs)[0]

        u, y = predictions(theta(kind)), recorded.inputs[1]
        J = torch.autograd.functional.jacobian(predictions, theta(kind)).flatten(0, 1)
        inner = hessian(lambda v, y=y: LOSSES[kind](v, y).mean())(u).reshape(u.numel(), -1)
        G += J.T @ inner @ J / len(given.bank)
    H = G + given.damping * torch.diag(given.preconditioner)
    truth = gradients(kind) @ torch.linalg.solve(H, given.target_gradient)
    exact = Ecif(curvature=CurvatureConfig(tolerance=1e-10, max_iterations=200))
    np.testing.assert_allclose(scores(exact, given, [batch_of(pool(kind))]), truth, rtol=1e-6, atol=1e-8)


@kinds
def test_datainf_is_its_papers_sum(kind: str) -> None:
    given = problem(kind)
    sizes = [value.numel() for value in given.space.parameters.values()]
    total = torch.zeros(SAMPLES, dtype=torch.float64)
    for g, v in zip(gradients(kind).split(sizes, 1), given.target_gradient.split(sizes)):
        lam = 0.1 * g.square().sum() / g.numel()
        L = g @ g.T
        shrunken = ((g @ v) / (lam + L.diagonal())) @ L / SAMPLES
        total += (g @ v - shrunken) / lam
    np.testing.assert_allclose(scores(DataInf(), given, [batch_of(pool(kind))]), total, rtol=1e-6)


def test_trak_is_the_dense_kernel_of_log_odds() -> None:
    given, (x, y) = problem("classes"), pool("classes").inputs
    probability = functional_call(given.space.proxy, given.space.unflatten(theta("classes")), (x, y))[
        0
    ].softmax(1)
    right = (probability * y).sum(1)
    phi = -gradients("classes") / (1 - right)[:, None]  # the loss's gradient is -(1 - p) that of the log odds
    kernel = phi.T @ phi
    ridge = 0.1 * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=torch.float64)
    truth = gradients("classes") @ torch.linalg.solve(kernel + ridge, given.target_gradient)
    np.testing.assert_allclose(scores(Trak(), given, [batch_of(pool("classes"))]), truth, rtol=1e-7)


def test_el2n_is_the_length_of_the_error() -> None:
    given, (x, y) = problem("classes"), pool("classes").inputs
    u = functional_call(given.space.proxy, given.space.parameters, (x, y))[0]
    truth = -(u.softmax(1) - y).norm(dim=1).detach()
    np.testing.assert_allclose(scores(El2n(), given, [batch_of(pool("classes"))]), truth, rtol=1e-9)


def test_tracin_is_the_sum_over_checkpoints() -> None:
    given = problem("classes")
    target, truth = samples("classes", 80, 2), torch.zeros(SAMPLES, dtype=torch.float64)
    x, y = pool("classes").inputs
    for checkpoint in given.checkpoints:
        space = checkpoint.load()
        at = space.flatten(space.parameters)
        v = grad(lambda q: losses("classes", q, target).mean())(at)
        for i in range(SAMPLES):
            one = NegativeBatch(inputs=(x[i : i + 1], y[i : i + 1]), image=np.arange(1))
            truth[i] += checkpoint.learning_rate * (
                v @ grad(lambda q, one=one: losses("classes", q, one).sum())(at)
            )
    plain = scores(TracIn(preconditioned=False), given, [batch_of(pool("classes"))])
    np.testing.assert_allclose(plain, truth, rtol=1e-8)


@kinds
def test_unrolled_is_leave_one_out_retraining(kind: str) -> None:
    """Proxies really trained again on the same batches less one sample."""
    given, target = problem(kind), samples(kind, 80, 2)
    path = given.trajectory
    assert path is not None

    def loss(rerun: Trajectory) -> float:
        return float(losses(kind, rerun.final, target).mean())

    def less(sample: int) -> Trajectory:
        batches = [rows[rows != sample] for rows in path.batches]
        return Trajectory(
            space=path.space,
            initial=path.initial,
            config=path.config,
            batches=batches,
            inputs=path.inputs,
            objective=path.objective,
            rule=path.rule,
        )

    whole = loss(path)
    truth = np.array([loss(less(i)) - whole for i in range(0, SAMPLES, 2)])
    score = scores(Unrolled(form="whole"), given, [batch_of(pool(kind))])[::2]
    assert np.corrcoef(score, truth)[0, 1] > 0.97
    assert 0.7 < np.polyfit(score, truth, 1)[0] < 1.3


@kinds
@pytest.mark.parametrize("name", sorted(set(TABLE) - FOR_PAIRS - {"random"}))
def test_wrong_labels_score_low(name: str, kind: str) -> None:
    if name == "trak" and kind == "numbers":
        with pytest.raises(InputError, match="trak is for classifiers"):
            found(name, kind)
        return
    assert auroc(-found(name, kind), WRONG) > 0.6


@pytest.mark.parametrize("name", sorted(FOR_PAIRS))
def test_what_is_for_pairs_says_so(name: str) -> None:
    with pytest.raises(InputError, match=name):
        found(name, "classes")


@pytest.mark.parametrize("name", sorted(set(TABLE) - FOR_PAIRS - {"unrolled", "random"}))
def test_a_bad_sample_has_no_score_and_harms_no_other(name: str) -> None:
    batch = batch_of(pool("classes"))
    x, y = batch.inputs
    bad = x.clone()
    bad[3] = torch.nan
    good = np.delete(np.arange(SAMPLES), 3)
    spoilt = NegativeBatch(inputs=(bad, y), image=np.arange(SAMPLES))
    whole = scores(TABLE[name](), problem("classes"), [batch_of(spoilt)])
    alone = scores(TABLE[name](), problem("classes"), [batch_of(pool("classes"), good)])
    assert np.isnan(whole[3])
    np.testing.assert_allclose(whole[good], alone, rtol=1e-9)
