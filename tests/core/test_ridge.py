"""Ridge regression: the truth where there is one, nothing where there is none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influencespace.core.ridge import fit_ridge


def _linear(seed: int, rows: int, features: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, features)) + 3
    truth = X @ rng.normal(size=features) + 7
    return X, truth, truth + noise * rng.normal(size=rows)


def test_finds_a_linear_function_without_noise():
    X, truth, y = _linear(0, 200, 10, 0.0)
    fitted = fit_ridge(X, y)
    np.testing.assert_allclose(fitted.predict(X), truth, atol=1e-3)
    assert fitted.freedom == pytest.approx(10, abs=1e-2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), noise=st.sampled_from([0.5, 5.0, 20.0]))
def test_is_the_ridge_solution_of_one_penalty(seed, noise):
    X, _, y = _linear(seed, 60, 30, noise)
    fitted = fit_ridge(X, y)
    # the penalised loss is least where X'(y - Xb) = penalty b
    centred = X - X.mean(0)
    pull = centred.T @ (y - y.mean() - centred @ fitted.coefficients)
    cosine = pull @ fitted.coefficients / np.linalg.norm(pull) / np.linalg.norm(fitted.coefficients)
    assert cosine == pytest.approx(1, abs=1e-6)


def test_comes_nearer_to_the_truth_than_least_squares_amid_noise():
    errors = []
    for seed in range(10):
        X, truth, y = _linear(seed, 60, 30, 20.0)
        least = np.c_[X, np.ones(60)] @ np.linalg.lstsq(np.c_[X, np.ones(60)], y, rcond=None)[0]
        errors.append([np.mean((found - truth) ** 2) for found in (fit_ridge(X, y).predict(X), least)])
    ours, theirs = np.mean(errors, 0)
    assert ours < 0.5 * theirs


def test_noise_alone_is_shrunken_to_its_mean():
    rng = np.random.default_rng(3)
    X, y = rng.normal(size=(5000, 40)), rng.normal(size=5000) + 2
    fitted = fit_ridge(X, y)
    assert fitted.freedom < 10
    assert fitted.predict(X).std() < 0.1
    assert fitted.predict(X).mean() == pytest.approx(y.mean())


@pytest.mark.parametrize("values", [np.full(9, 3.0), np.arange(9.0)])
def test_features_without_any_spread_leave_the_mean(values):
    fitted = fit_ridge(np.ones((9, 4)), values)
    np.testing.assert_allclose(fitted.predict(np.ones((9, 4))), values.mean())


def test_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="finite"):
        fit_ridge(np.ones((3, 2)), np.array([1.0, np.nan, 2.0]))
    with pytest.raises(ValueError, match="two rows"):
        fit_ridge(np.ones((1, 2)), np.ones(1))
