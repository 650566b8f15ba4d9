"""Solved directions against their equation, and the sketch's size."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from chain import Chain, Counting, Killed, assert_equal_results, proxy_config
from safetensors.torch import load_file

from influencespace.estimators.influence import CurvatureConfig, curvature_products
from influencespace.stages.proxies.proxies import Proxy, proxy_name
from influencespace.stages.scoring.curvature import ProxySpace, TargetConfig, directions_of

NAMES = ("all", "without_fold_0", "without_fold_1", "without_fold_2")


def space(chain: Chain, name: str) -> ProxySpace:
    return ProxySpace(
        pool=chain.sets["pool"],
        target=chain.sets["target"],
        proxies=chain.proxy,
        config=chain.curvature,
        target_config=chain.target,
        proxy=Proxy(chain.source / "proxy", name),
    )


def curvature_by(truth: Chain, out: Path, **settings: object) -> dict[str, dict[str, float]]:
    """What the curvature stage says about each proxy with other settings."""
    chain = replace(truth, out=out, source_folder=truth.out, curvature=CurvatureConfig(**settings))
    proxies: dict[str, dict[str, float]] = chain.run("curvature").details["proxies"]
    return proxies


@pytest.mark.parametrize("name", NAMES)
def test_directions_solve_the_damped_curvature_for_every_fold_of_the_target(truth: Chain, name: str) -> None:
    """(G + mu D) v = g in the coordinates scaled by the preconditioner, up to the tolerance."""
    s = space(truth, name)
    v, g, root = directions_of(truth.out / "curvature", name), s.target_gradients(), s.preconditioner.sqrt()
    assert v.shape == g.shape == (truth.target.folds, s.space.size)
    x = v * root
    left = curvature_products(s.space, s.contexts, x, s.objective, s.preconditioner) + s.damping * x
    residual = (left - g / root).norm(dim=1) / (g / root).norm(dim=1)
    assert float(residual.max()) < 2 * truth.curvature.tolerance
    note = truth.manifest("curvature").details["proxies"][name]
    assert note["residual"] == pytest.approx(float(residual.max()), rel=0.1, abs=1e-5)
    assert note["damping"] == pytest.approx(
        truth.curvature.damping_factor / s.proxy.sum_of_learning_rates + truth.proxy.train.weight_decay
    )


def test_the_manifest_tells_of_every_proxy(truth: Chain) -> None:
    proxies = truth.manifest("curvature").details["proxies"]
    assert set(proxies) == set(NAMES) == {proxy_name(fold) for fold in (None, 0, 1, 2)}
    for note in proxies.values():
        assert 0 < note["effective_dimension"] <= note["rank"]
        assert note["residual"] <= truth.curvature.tolerance or note["iterations"] == 50


def test_the_sketch_is_doubled_until_it_reaches_the_damping(truth: Chain, tmp_path: Path) -> None:
    for note in curvature_by(truth, tmp_path, rank=4, max_rank=64).values():
        tail = note["smallest_eigenvalue_over_damping"]
        assert tail <= 1 or note["rank"] == 64
        assert note["rank"] in (4, 8, 16, 32, 64)
    damped = curvature_by(truth, tmp_path / "damped", rank=4, max_rank=64, damping_factor=1e9)
    assert {note["rank"] for note in damped.values()} == {4}
    settings = {"rank": 4, "max_rank": 16, "damping_factor": 1e-3, "max_iterations": 1}
    free = curvature_by(truth, tmp_path / "free", **settings)
    assert {note["rank"] for note in free.values()} == {16}


def test_the_result_does_not_depend_on_the_rank(truth: Chain, tmp_path: Path) -> None:
    for rank in (2, 64):
        out = tmp_path / str(rank)
        notes = curvature_by(truth, out, rank=rank, max_rank=rank, tolerance=1e-6)
        assert {note["rank"] for note in notes.values()} == {rank}
    for name in NAMES:
        few, many = (directions_of(tmp_path / rank / "curvature", name) for rank in ("2", "64"))
        torch.testing.assert_close(few, many, rtol=0, atol=1e-4 * float(many.std()))


@pytest.mark.parametrize("settings", [{"rank": 100}, {"rank": 20, "damping_factor": 1e-6}])
def test_a_sketch_is_no_larger_than_the_space(
    truth: Chain, tmp_path: Path, settings: dict[str, float]
) -> None:
    """A proxy of 16 x 2 + 16 x 2 parameters: more probes than these are not asked for."""
    chain = replace(
        truth,
        out=tmp_path,
        proxy=proxy_config(dimension=2, steps=5),
        curvature=CurvatureConfig(max_rank=256, max_iterations=5, **settings),
    )
    chain.run("proxy", "curvature")
    assert {n["rank"] for n in chain.manifest("curvature").details["proxies"].values()} <= {20, 40, 64}
    eigenvalues = load_file(tmp_path / "curvature" / "all.safetensors")["eigenvalues"]
    assert len(eigenvalues) <= 64


def test_a_target_of_fewer_images_than_folds_has_a_fold_an_image(truth: Chain, tmp_path: Path) -> None:
    chain = replace(truth, out=tmp_path, source_folder=truth.out, target=TargetConfig(folds=500))
    chain.run("curvature")
    assert directions_of(tmp_path / "curvature", "all").shape[0] == 40  # half of the target's images


def test_directions_of_the_folds_average_to_that_of_the_whole_target(truth: Chain, tmp_path: Path) -> None:
    for folds in (2, 6):
        chain = replace(
            truth,
            out=tmp_path / str(folds),
            source_folder=truth.out,
            target=TargetConfig(folds=folds),
            curvature=CurvatureConfig(rank=64, tolerance=1e-6),
        )
        chain.run("curvature")
    two, six = (directions_of(tmp_path / folds / "curvature", "all").mean(0) for folds in ("2", "6"))
    torch.testing.assert_close(two, six, rtol=0, atol=1e-4 * float(two.std()))


def test_a_repetition_gives_the_same_bits(truth: Chain, tmp_path: Path) -> None:
    replace(truth, out=tmp_path, source_folder=truth.out).run("curvature")
    assert_equal_results(truth.out / "curvature", tmp_path / "curvature")


@dataclass
class Cores(Counting):
    """The plain loop on a machine that says it has so many cores."""

    number: int = 1

    @property
    def cores(self) -> int:
        return self.number


def test_a_run_killed_amid_the_probes_continues_with_another_number_of_cores(
    truth: Chain, tmp_path: Path
) -> None:
    chain = replace(truth, out=tmp_path, source_folder=truth.out, engine=Cores(most=2))
    with pytest.raises(Killed):
        chain.run("curvature")
    replace(chain, engine=Cores(number=8)).run("curvature")
    assert_equal_results(truth.out / "curvature", tmp_path / "curvature", spreads=1e-3)
