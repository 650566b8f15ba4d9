"""Solved directions against their equation, and the sketch's size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import World, assert_equal_results, beside, carry, carry_beside, run_on
from safetensors.torch import load_file

from influencespace.data.buckets import Columns
from influencespace.run import Run
from influencespace.stages.proxies.proxy import proxy_name
from influencespace.stages.scoring import curvature
from influencespace.stages.scoring.curvature import ProbeProducts, directions_of
from influencespace.stages.scoring.scoring import ScoringInputs

FOLDS = (None, 0, 1, 2)
NAMES = [proxy_name(fold) for fold in FOLDS]


def solved(truth: Run, out: Path, **settings: Any) -> dict[str, dict[str, float]]:
    """What the curvature stage reports of each proxy with other settings."""
    proxies: dict[str, dict[str, float]] = (
        carry_beside(truth, out, "curvature", **settings).manifest("curvature").details["proxies"]
    )
    return proxies


@pytest.mark.parametrize("fold", FOLDS)
def test_directions_solve_the_damped_curvature_for_every_fold_of_the_target(
    truth: Run, fold: int | None
) -> None:
    """(G + mu D) v = g in the coordinates scaled by the preconditioner, up to the tolerance."""
    inputs, config = ScoringInputs.of(truth), truth.config.curvature
    problem = inputs.problem(fold, path=False)
    v, g = directions_of(truth.at("curvature"), proxy_name(fold)), inputs.target_gradients(problem)
    root = problem.preconditioner.sqrt()
    assert v.shape == g.shape == (config.target_folds, problem.space.size)
    x = v * root
    left = problem.curvature(x) + problem.damping * x
    residual = (left - g / root).norm(dim=1) / (g / root).norm(dim=1)
    assert float(residual.max()) < 2 * config.tolerance
    record = truth.manifest("curvature").details["proxies"][proxy_name(fold)]
    assert record["residual"] == pytest.approx(float(residual.max()), rel=0.1, abs=1e-5)
    rates, decay = inputs.trained(fold).sum_of_learning_rates, truth.config.proxy.train.weight_decay
    assert record["damping"] == pytest.approx(config.damping_factor / rates + decay)


def test_every_proxy_is_reported(truth: Run) -> None:
    proxies = truth.manifest("curvature").details["proxies"]
    assert list(proxies) == NAMES
    for record in proxies.values():
        assert 0 < record["effective_dimension"] <= record["rank"]
        assert record["residual"] <= truth.config.curvature.tolerance or record["iterations"] == 50


def test_the_sketch_is_doubled_until_it_reaches_the_damping(truth: Run, tmp_path: Path) -> None:
    for record in solved(truth, tmp_path / "a", rank=4, max_rank=64).values():
        assert record["smallest_eigenvalue_over_damping"] <= 1 or record["rank"] == 64
        assert record["rank"] in (4, 8, 16, 32, 64)
    damped = solved(truth, tmp_path / "b", rank=4, max_rank=64, damping_factor=1e9)
    assert {record["rank"] for record in damped.values()} == {4}
    free = solved(truth, tmp_path / "c", rank=4, max_rank=16, damping_factor=1e-3, max_iterations=1)
    assert {record["rank"] for record in free.values()} == {16}


def test_the_result_does_not_depend_on_the_rank(truth: Run, tmp_path: Path) -> None:
    for rank in (2, 64):
        records = solved(truth, tmp_path / str(rank), rank=rank, max_rank=rank, tolerance=1e-6)
        assert {record["rank"] for record in records.values()} == {rank}
    for name in NAMES:
        few, many = (directions_of(tmp_path / rank / "curvature", name) for rank in ("2", "64"))
        torch.testing.assert_close(few, many, rtol=0, atol=1e-4 * float(many.std()))


@pytest.mark.parametrize("settings", [{"rank": 100}, {"rank": 20, "damping_factor": 1e-6}])
def test_a_sketch_is_no_larger_than_the_space(
    world: World, tmp_path: Path, settings: dict[str, float]
) -> None:
    """A proxy of 16 x 2 + 16 x 2 parameters: more probes than these are not asked for."""
    settings = {f"curvature.{name}": value for name, value in settings.items()}
    settings |= {"proxy.train.dimension": 2, "proxy.train.steps": 5}
    settings |= {"curvature.max_rank": 256, "curvature.max_iterations": 5}
    run = run_on(tmp_path, world, settings)
    details = carry(run, "proxies", "curvature").details
    assert {record["rank"] for record in details["proxies"].values()} <= {20, 40, 64}
    assert len(load_file(tmp_path / "curvature" / "all.safetensors")["eigenvalues"]) <= 64


def test_a_target_of_fewer_images_than_folds_has_a_fold_an_image(truth: Run, tmp_path: Path) -> None:
    run = carry_beside(truth, tmp_path, "curvature", target_folds=500)
    assert directions_of(run.at("curvature"), "all").shape[0] == 40  # half of the target's images


def test_directions_of_the_folds_average_to_that_of_the_whole_target(truth: Run, tmp_path: Path) -> None:
    for folds in (2, 6):
        solved(truth, tmp_path / str(folds), target_folds=folds, rank=64, tolerance=1e-6)
    two, six = (directions_of(tmp_path / folds / "curvature", "all").mean(0) for folds in ("2", "6"))
    torch.testing.assert_close(two, six, rtol=0, atol=1e-4 * float(two.std()))


def test_an_estimator_without_directions_asks_for_none(truth: Run, tmp_path: Path) -> None:
    run = beside(truth, tmp_path, "curvature", settings={"influence.estimator": "datainf"})
    assert carry(run, "curvature").details == {"proxies": {}}


def test_tasks_of_any_size_give_the_same_directions(
    truth: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature, "PROBES", 5)
    monkeypatch.setattr(curvature, "DIRECTIONS", 2)
    run = beside(truth, tmp_path, "curvature")
    carry(run, "curvature")
    assert_equal_results(truth.at("curvature"), run.at("curvature"), spreads=1e-3)


def test_a_larger_sketch_goes_on_from_the_probes_of_the_smaller_one(
    truth: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No probe is multiplied twice, and the directions are solved once."""
    monkeypatch.setattr(curvature, "PROBES", 3)
    multiplied: list[tuple[int | None, int, int]] = []

    def products(self: ProbeProducts, start: int, stop: int) -> Columns:
        multiplied.append((self.fold, start, stop))
        return real(self, start, stop)

    real = ProbeProducts.__call__
    monkeypatch.setattr(ProbeProducts, "__call__", products)
    free = solved(truth, tmp_path / "a", rank=4, max_rank=16, damping_factor=1e-3, max_iterations=1)
    spans = [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 14), (14, 16)]
    assert sorted(multiplied, key=str) == sorted(((fold, *span) for fold in FOLDS for span in spans), key=str)
    at_once = solved(truth, tmp_path / "b", rank=16, max_rank=16, damping_factor=1e-3, max_iterations=1)
    for name in NAMES:
        assert free[name]["effective_dimension"] == pytest.approx(
            at_once[name]["effective_dimension"], rel=1e-3
        )


def test_a_second_device_gives_the_same(truth: Run) -> None:
    here, there = (ScoringInputs.of(truth, device) for device in ("cpu", "cpu:0"))
    products = [ProbeProducts(inputs, 0)(2, 6)["products"] for inputs in (here, there)]
    np.testing.assert_array_equal(*products)
    assert products[0].shape == (4, here.problem(0, path=False).space.size)
