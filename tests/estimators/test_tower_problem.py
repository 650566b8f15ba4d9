"""Influence through the towers of a tiny CLIP against the dense truth by autograd, in float64."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacrev

from influencespace.core.contrastive import InfoNce, added_loss, info_nce, role_losses
from influencespace.errors import InputError
from influencespace.estimators.ecif import Ecif, RoleScorer
from influencespace.estimators.grad_dot import GradDot
from influencespace.estimators.influence import CurvatureConfig, NegativeBatch
from influencespace.estimators.problem import Batch, Estimator, Problem, fitted
from influencespace.estimators.tower_problem import tower_problem
from influencespace.models.encoders import load_encoder
from influencespace.models.space import Inputs
from influencespace.models.streamed import StreamedSpace
from influencespace.models.tiny_clip import train_tiny_clip
from influencespace.models.tower_parameters import tower_parameters
from influencespace.models.tower_tangents import TowerTangents
from influencespace.models.towers import TowerModel

SCALE, BATCH_SIZE = 4.0, 5
LOSS = InfoNce(SCALE)
WORDS = ("red", "blue", "small", "large", "ball", "boat", "old", "new")
EXACT = CurvatureConfig(rank=40, max_rank=40, tolerance=1e-10, max_iterations=500)


@cache
def proxy() -> TowerModel:
    """Trained for a few steps, so that no embedding is like all others."""
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    captions = [" ".join(WORDS[(i * k) % 8] for k in (1, 3, 5)) for i in range(16)]
    with TemporaryDirectory() as folder:
        train_tiny_clip(images, captions, seed=0, out=Path(folder), steps=3, batch_size=8)
        return TowerModel(load_encoder(folder)).double()


def some_pairs(count: int, seed: int) -> Inputs:
    random = np.random.default_rng(seed)
    pixels = torch.from_numpy(random.integers(0, 256, (count, 3, 64, 64), np.uint8))
    return pixels, proxy().tokenize([" ".join(random.choice(WORDS, 3)) for _ in range(count)])


def recorded(count: int, seed: int) -> NegativeBatch:
    return NegativeBatch(inputs=some_pairs(count, seed), image=np.arange(count) + 100 * seed)


@cache
def problem() -> Problem:
    names = tower_parameters(proxy(), "*final_layer_norm*,*post_layernorm*")
    return tower_problem(
        StreamedSpace(proxy(), names, rows=3),
        objective=LOSS,
        batch_size=BATCH_SIZE,
        pool_size=40,
        bank=[recorded(4, 1), recorded(4, 2)],
        target=[recorded(6, 3), recorded(4, 4)],
    )


BATCH = Batch(uid=list("abcd"), inputs=some_pairs(4, 9), image=np.arange(4), row=np.arange(4))


def embedded(theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    u, t = functional_call(proxy(), problem().space.unflatten(theta), inputs)
    return u, t


def derivative(function: object, theta: Tensor) -> Tensor:
    found: Tensor = jacrev(function, chunk_size=1)(theta)  # type: ignore[arg-type]
    return found.detach()


def position() -> Tensor:
    return problem().space.flatten(problem().space.parameters)


@cache
def dense_gradients() -> Tensor:
    """Gradient of what each pair adds to a batch's loss, less the mean of strangers as negatives: (n, p)."""
    bank = [recorded.inputs for recorded in problem().bank]

    def of_context(k: int) -> Tensor:
        def added(theta: Tensor) -> Tensor:
            return added_loss(LOSS, *embedded(theta, BATCH.inputs), *embedded(theta, bank[k]), BATCH_SIZE)

        def offset(theta: Tensor) -> Tensor:
            recorded = embedded(theta, bank[k])
            others = embedded(theta, bank[1 - k])
            return role_losses(LOSS, *others, *recorded, BATCH_SIZE)[1].mean()

        return derivative(added, position()) - derivative(offset, position())

    rows = [of_context(k) for k in range(2)]
    return (rows[0] + rows[1]) / 2


@cache
def dense_curvature() -> Tensor:
    """Gauss-Newton matrix of the bank's mean loss (p, p)."""
    total = torch.zeros(problem().space.size, problem().space.size, dtype=torch.float64)
    for recorded in problem().bank:

        def logits(theta: Tensor, recorded: NegativeBatch = recorded) -> Tensor:
            u, t = embedded(theta, recorded.inputs)
            return (SCALE * u @ t.T).flatten()

        S = logits(position()).detach()
        curvature = hessian(lambda flat: info_nce(flat.reshape(4, 4)))(S)
        jacobian = derivative(logits, position())
        total += jacobian.T @ curvature @ jacobian
    return total / len(problem().bank)


@cache
def dense_target_gradient() -> Tensor:
    def loss(theta: Tensor) -> Tensor:
        parts = []
        for recorded in problem().target:
            u, t = embedded(theta, recorded.inputs)
            parts.append(len(u) * info_nce(SCALE * u @ t.T))
        return torch.stack(parts).sum() / 10

    return derivative(loss, position())


def dense_scores(estimator: Estimator) -> np.ndarray:
    g = dense_target_gradient()
    if not isinstance(estimator, GradDot):
        H = dense_curvature() + problem().damping * torch.eye(len(g), dtype=torch.float64)
        g = torch.linalg.solve(H, g)
    return (dense_gradients() @ g).numpy()


def scorer_of(estimator: Estimator) -> RoleScorer:
    scorer = fitted(estimator.fit(problem()), lambda fold: None)
    assert isinstance(scorer, RoleScorer)
    return scorer


ESTIMATORS = {
    "ecif": Ecif(curvature=EXACT),
    "without a sketch": Ecif(solver="plain", curvature=EXACT),
    "woodbury": Ecif(solver="woodbury", curvature=EXACT),
    "grad_dot": GradDot(),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_through_towers_are_the_dense_truth(name: str) -> None:
    truth = dense_scores(ESTIMATORS[name])
    assert np.ptp(truth) > 0.1 * np.abs(truth).max()
    # the sketch holds all of G: two negative batches of four pairs have a rank of 32 at most
    found = scorer_of(ESTIMATORS[name])(BATCH)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-6 * np.abs(truth).max())


@pytest.mark.parametrize("movement", [0.0, 1e-5])
def test_forward_mode_and_central_differences_give_the_same_scores(movement: float) -> None:
    scorer = scorer_of(ESTIMATORS["ecif"])
    influence, space = scorer.influence, problem().space
    assert isinstance(space, StreamedSpace)
    speed = float(space.tangents(BATCH.inputs, influence.directions).du.norm(dim=-1).max())
    steps = torch.full((1, 2), movement / speed)
    tangents = TowerTangents(space, influence.directions, steps)
    found = replace(scorer, influence=replace(influence, space=tangents))(BATCH)
    truth = scorer(BATCH)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5 * np.abs(truth).max())


def test_a_pair_scores_alone_as_among_others() -> None:
    scorer = scorer_of(ESTIMATORS["ecif"])
    alone = []
    for i in range(4):
        one = slice(i, i + 1)
        inputs = BATCH.inputs[0][one], BATCH.inputs[1][one]
        alone += list(scorer(Batch(uid=["a"], inputs=inputs, image=BATCH.image[one], row=BATCH.row[one])))
    np.testing.assert_allclose(alone, scorer(BATCH), rtol=1e-8)


def test_the_damping_is_a_share_of_the_curvature_along_the_gradient() -> None:
    recorded = problem().bank[0].inputs

    def loss(theta: Tensor) -> Tensor:
        u, t = embedded(theta, recorded)
        return info_nce(SCALE * u @ t.T)

    g = derivative(loss, position())
    curved = problem().space.gauss_newton(recorded, g[None], LOSS)[0]
    assert problem().damping == pytest.approx(float(g @ curved / (g @ g)) / 10)


def test_a_sketch_that_does_not_fit_is_refused_with_its_numbers() -> None:
    small = replace(problem(), memory=400_000)
    with pytest.raises(
        InputError,
        match=r"512 parameters x rank 40 takes 0\.001 GB of memory and there are 0\.000 GB; .* solver=plain",
    ):
        fitted(Ecif(curvature=EXACT).fit(small), lambda fold: None)
    fitted(Ecif(solver="plain").fit(small), lambda fold: None)


def test_a_sketch_grows_only_as_far_as_memory_goes() -> None:
    config = CurvatureConfig(rank=4, max_rank=40, tolerance=1e-10, max_iterations=500)
    small = replace(problem(), memory=6 * 8 * 512 * 9)
    found = fitted(Ecif(curvature=config).fit(small), lambda fold: None)(BATCH)
    np.testing.assert_allclose(found, scorer_of(ESTIMATORS["ecif"])(BATCH), rtol=1e-6)
