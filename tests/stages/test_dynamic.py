"""Dynamic curation: the curated proxy until the first refresh, then weights by what pairs are worth to it by now."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import Chain, Counting, Idle, Killed, assert_equal_results, times
from safetensors.torch import load_file
from torch import Tensor

from influencespace.config import load_config
from influencespace.core.additive import fit_additive
from influencespace.core.select import SelectionConfig, capped_weights
from influencespace.data.buckets import read_columns
from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.estimators.filters import neg_clip_loss
from influencespace.models.gradients import PairGradients
from influencespace.models.heads import Heads
from influencespace.models.space import Space
from influencespace.stages.proxies.proxies import TargetHalves
from influencespace.stages.selection.evidence import KNOTS, VALUE_AXES
from influencespace.stages.training import dynamic
from influencespace.stages.training.dynamic import Reweighting, train_dynamically
from influencespace.stages.training.train import TrainConfig

BOTH = ("curated", "dynamic")


def train_by(truth: Chain, out: Path, **settings: Any) -> Chain:
    """The train stage alone, with one seed."""
    config = TrainConfig(**{"seeds": (0,), "methods": BOTH} | settings)
    chain = replace(truth, out=out, source_folder=truth.out, train=config)
    chain.run("train")
    return chain


def proxy(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / "train" / f"{name}.safetensors")


def curated_weights(truth: Chain) -> np.ndarray:
    return read_columns(truth.out / "curate" / "weights.parquet", "curated")["curated"]


@pytest.mark.parametrize("refresh", [20, 1000])
def test_without_a_refresh_it_is_the_curated_proxy(truth: Chain, tmp_path: Path, refresh: int) -> None:
    train_by(truth, tmp_path, refresh=refresh)
    torch.testing.assert_close(proxy(tmp_path, "dynamic-0"), proxy(tmp_path, "curated-0"), rtol=0, atol=0)


def test_a_refresh_changes_the_proxy_from_then_on(truth: Chain, tmp_path: Path) -> None:
    proxies = []
    for refresh in (5, 15):
        train_by(truth, tmp_path / str(refresh), refresh=refresh)
        proxies.append(proxy(tmp_path / str(refresh), "dynamic-0")["text"])
    proxies.append(proxy(tmp_path / "5", "curated-0")["text"])
    for k, left in enumerate(proxies):
        for right in proxies[:k]:
            assert not torch.equal(left, right)


def test_pairs_that_are_not_kept_are_never_drawn_and_others_by_other_weights(
    truth: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    reweighted, train_heads = dynamic.reweighted_batches, dynamic.train_heads

    def watched(weights: Any, images: Any, size: int, steps: int, seed: int, every: int, reweigh: Any) -> Any:
        def noted() -> np.ndarray:
            found.append(reweigh())
            return found[-1]

        return reweighted(weights, images, size, steps, seed, every, noted)

    def noting(inputs: Any, batches: Iterable[np.ndarray], *arguments: Any, **options: Any) -> Any:
        return train_heads(inputs, (drawn.append(rows) or rows for rows in batches), *arguments, **options)

    monkeypatch.setattr(dynamic, "reweighted_batches", watched)
    monkeypatch.setattr(dynamic, "train_heads", noting)
    weights = curated_weights(truth)
    assert 0 < (weights == 0).sum() < len(weights)
    trained = train_dynamically(truth.sets["pool"], weights, truth.reweighting, 5, 20, seed=0)
    assert (len(found), len(drawn), len(trained.losses)) == (3, 20, 20)
    for weight in found:
        assert ((weight > 0) == (weights > 0)).all()
        assert weight[weights > 0].mean() == pytest.approx(1)
        assert weight.max() <= truth.select.max_weight * (1 + 1e-9)
        assert weight.std() > 0
    assert (weights[np.concatenate(drawn)] > 0).all()


CHOSEN = SelectionConfig(weighting="influence", temperature=0.5, clip_score_share=0.5)


def trained_so_far(truth: Chain, steps: int) -> tuple[Heads, Tensor]:
    """Heads and preconditioner of the curated proxy in the midst of its training."""
    seen: list[tuple[Heads, Tensor]] = []

    class Stopped(Exception):
        pass

    class Watched(Reweighting):
        def weights(self, kept: Any, heads: Heads, preconditioner: Tensor) -> np.ndarray:
            seen.append((heads, preconditioner))
            raise Stopped

    watched = Watched(**vars(truth.reweighting))
    with pytest.raises(Stopped):
        train_dynamically(truth.sets["pool"], curated_weights(truth), watched, steps, 20, seed=0)
    return seen[0]


def test_the_weights_are_those_of_their_definition(truth: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of every pair by autograd, in place of tangents; the target's gradient half alone."""
    monkeypatch.setattr(dynamic, "MAX_SCORED", 50)
    heads, D = trained_so_far(truth, 7)
    pool, target, config = truth.sets["pool"], truth.sets["target"], truth.proxy
    reweighting = replace(truth.reweighting, decided=CHOSEN)
    kept = np.flatnonzero(curated_weights(truth) > 0)
    found = reweighting.weights(kept, heads, D)

    halves = TargetHalves(target, config.seed)
    terms, pairs = torch.zeros(()), 0
    for rows in halves.contexts(halves.gradient, config.train.batch_size):
        terms = terms + config.train.objective.terms(*heads(*target.inputs(rows))).sum()
        pairs += len(rows)
    gradient = torch.autograd.grad(terms / pairs, list(heads.parameters()))
    v = torch.cat([part.flatten() for part in gradient]) / D.clamp_min(1e-3 * float(D.mean()))

    scored = read_columns(truth.out / "attribute" / "influence.parquet", "pair")["pair"]
    sample = np.array([row for row in scored if row in set(kept)][:50])
    bank = reweighting.proxy.reference_bank(pool)
    gradients = PairGradients(
        space=Space(heads), bank=bank, objective=config.train.objective, batch_size=config.train.batch_size
    )
    influence = (gradients(pool.inputs(sample), pool.image[sample]) @ v.double()).numpy()
    strata = read_columns(truth.out / "attribute" / "strata.parquet")
    axes = np.stack([strata[name][kept] for name in VALUE_AXES], 1)
    with torch.no_grad():
        contexts = [(*heads(*context.inputs), context.image) for context in bank]
        u, t = heads(*pool.inputs(kept))
    seen = neg_clip_loss(u, t, pool.image[kept], contexts, 1 / config.train.temperature)
    axes[:, VALUE_AXES.index("seen")] = seen
    rows = np.array([list(kept).index(row) for row in sample])
    stratum = (strata["cluster"] * 1000 + strata["quantile"])[kept]
    stands_for = np.array(
        [np.sum(stratum == stratum[row]) / np.sum(stratum[rows] == stratum[row]) for row in rows]
    )
    predicted, _ = fit_additive(axes, rows, influence, KNOTS, stands_for).predict(axes)
    given = strata["given"][kept]
    followed = predicted + 0.5 * predicted.std() * (given - given.mean()) / given.std()
    spread = np.sqrt(np.cov(influence, aweights=stands_for, bias=True))
    expected = capped_weights(followed / (spread * 0.5), CHOSEN.max_weight)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found.std() > 0.01


@pytest.mark.parametrize(("weights", "temperature"), [("uniform", 1.0), ("influence", 0.25)])
def test_the_temperature_is_the_confirmed_one(truth: Chain, weights: Any, temperature: float) -> None:
    decided = SelectionConfig(weights=weights, temperature=0.25)
    assert replace(truth.reweighting, decided=decided).rule.temperature == temperature


def test_a_later_rounds_pool_is_part_of_what_is_trained_on(truth: Chain, tmp_path: Path) -> None:
    """The scored pairs lie elsewhere among all pairs: the same proxy, its rows named otherwise."""
    pool, weights = truth.sets["pool"], curated_weights(truth)
    rows = np.sort(np.random.default_rng(0).permutation(len(pool))[: len(pool) - 40])
    seen: list[np.ndarray] = []

    class Watched(Reweighting):
        def weights(self, kept: np.ndarray, heads: Heads, preconditioner: Tensor) -> np.ndarray:
            seen.append(kept)
            return np.arange(1.0, len(kept) + 1) * 2 / (len(kept) + 1)

    np.save(tmp_path / "rows.npy", rows)
    part = PairSet(pool.folder, tmp_path / "rows.npy")
    inside = np.zeros(len(pool))
    inside[rows] = weights[rows]
    watched = Watched(**vars(replace(truth.reweighting, pool=part)))
    train_dynamically(pool, inside, watched, 10, 20, seed=0)
    np.testing.assert_array_equal(part.rows[seen[0]], pool.rows[inside > 0])


def test_a_finished_proxy_is_not_trained_again_and_a_killed_one_is(truth: Chain, tmp_path: Path) -> None:
    settings = {"seeds": (0, 1), "refresh": 6}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_by(truth, whole, **settings)
    before = times(whole)
    train_by(replace(truth, engine=Idle()), whole, **settings)
    assert times(whole) == before
    with pytest.raises(Killed):
        train_by(replace(truth, engine=Counting(most=2)), cut, **settings)
    again = Counting()
    train_by(replace(truth, engine=again), cut, **settings)
    assert again.tasks == 2
    assert_equal_results(whole / "train", cut / "train")


def test_evaluation_counts_the_pairs_it_begins_with(truth: Chain, tmp_path: Path) -> None:
    chain = replace(train_by(truth, tmp_path, refresh=5), source_folder=None)
    for name in ("proxy", "curate"):
        (tmp_path / name).symlink_to(truth.out / name)
    details = chain.run("evaluate").details
    assert set(details["comparisons"]) == {"dynamic"}
    kept = {method: found["kept_fraction"] for method, found in details["methods"].items()}
    assert kept["dynamic"] == kept["curated"] == pytest.approx((curated_weights(truth) > 0).mean())


@pytest.mark.parametrize("refresh", ["0", "-3", "half"])
def test_a_refresh_that_is_no_number_of_steps_is_refused(refresh: str) -> None:
    with pytest.raises(InputError, match=r"config: train\.refresh is"):
        load_config(None, {"train.refresh": refresh})


def test_it_is_trained_only_where_it_is_asked_for() -> None:
    assert "dynamic" not in load_config(None, {}).train.methods
    asked = load_config(None, {"train.methods": "[curated, dynamic]"}).train
    assert asked.methods == BOTH
    with pytest.raises(InputError, match="dynamics"):
        load_config(None, {"train.methods": "[curated, dynamics]"})
