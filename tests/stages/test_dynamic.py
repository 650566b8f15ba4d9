"""Dynamic curation: the curated proxy until the first refresh, then weights by what pairs are worth to it by now."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import Counting, Killed, assert_equal_results, beside, carry, carry_beside, columns
from safetensors.torch import load_file
from torch import Tensor

from influencespace.config import load_config
from influencespace.core.additive import fit_additive
from influencespace.core.select import SelectionConfig, capped_weights
from influencespace.data.pair_set import PairSet
from influencespace.errors import InputError
from influencespace.estimators.filters import neg_clip_loss
from influencespace.models.gradients import PairGradients
from influencespace.models.heads import Heads
from influencespace.models.space import Space
from influencespace.models.training import Alone, Trained
from influencespace.run import Run
from influencespace.stages.proxies.train_many import Given, WeightedPool
from influencespace.stages.rivals.sources import source_of
from influencespace.stages.selection.evidence import KNOTS, VALUE_AXES
from influencespace.stages.training import dynamic
from influencespace.stages.training.dynamic import DynamicTrainer, Reweighting

BOTH = ("curated", "dynamic")


def train_by(truth: Run, out: Path, refresh: int) -> Run:
    """The train stage with one seed."""
    return carry_beside(truth, out, "train", seeds=[0], methods=list(BOTH), refresh=refresh)


def heads_of(run: Run, name: str) -> dict[str, Tensor]:
    state = load_file(run.at("train") / f"{name}.safetensors")
    return {side: state[side] for side in ("image", "text")}


def curated_weights(truth: Run) -> np.ndarray:
    return columns(truth, "selection/curated", "weight")["weight"].astype(np.float64)


def reweighting_of(run: Run) -> Reweighting:
    return DynamicTrainer.of(run).reweighting


def trained(
    truth: Run, pool: PairSet, weights: np.ndarray, reweighting: Reweighting, refresh: int
) -> Trained:
    trainer = DynamicTrainer(reweighting=reweighting, refresh=refresh)
    return trainer(pool, Given(weights), truth.config.proxy.train, 0, Alone(), "cpu")


@pytest.mark.parametrize("times", [1, 50])
def test_without_a_refresh_it_is_the_curated_proxy(truth: Run, tmp_path: Path, times: int) -> None:
    """As none is due before the last step."""
    steps = source_of(truth, "curated").steps
    run = train_by(truth, tmp_path, times * steps)
    torch.testing.assert_close(heads_of(run, "dynamic-0"), heads_of(run, "curated-0"), rtol=0, atol=0)


def test_a_refresh_changes_the_proxy_from_then_on(truth: Run, tmp_path: Path) -> None:
    runs = [train_by(truth, tmp_path / str(refresh), refresh) for refresh in (5, 15)]
    proxies = [heads_of(run, "dynamic-0")["text"] for run in runs]
    proxies.append(heads_of(runs[0], "curated-0")["text"])
    for k, left in enumerate(proxies):
        for right in proxies[:k]:
            assert not torch.equal(left, right)


def test_pairs_that_are_not_kept_are_never_drawn_and_others_by_other_weights(
    truth: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    anew: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    reweighted, train_heads = dynamic.reweighted_batches, dynamic.train_heads

    def watched(*arguments: Any, every: int, reweigh: Any) -> Any:
        def recorded() -> WeightedPool:
            pairs = reweigh()
            anew.append(pairs.weights.read(0, len(pairs)))
            return pairs

        return reweighted(*arguments, every=every, reweigh=recorded)

    def recording(inputs: Any, batches: Iterable[np.ndarray], *arguments: Any, **options: Any) -> Any:
        return train_heads(inputs, (drawn.append(rows) or rows for rows in batches), *arguments, **options)

    monkeypatch.setattr(dynamic, "reweighted_batches", watched)
    monkeypatch.setattr(dynamic, "train_heads", recording)
    weights = curated_weights(truth)
    assert 0 < (weights == 0).sum() < len(weights)
    proxy = trained(truth, truth.pool, weights, reweighting_of(truth), 5)
    assert (len(anew), len(drawn), len(proxy.losses)) == (3, 20, 20)
    for weight in anew:
        assert ((weight > 0) == (weights > 0)).all()
        assert weight[weights > 0].mean() == pytest.approx(1)
        assert weight.max() <= truth.config.selection.max_weight * (1 + 1e-9)
        assert weight.std() > 0
    assert (weights[np.concatenate(drawn)] > 0).all()


CHOSEN = SelectionConfig(weighting="influence", temperature=0.5, clip_score_share=0.5)


def trained_so_far(truth: Run, steps: int) -> tuple[Heads, Tensor]:
    """Heads and preconditioner of the curated proxy in the midst of its training."""
    seen: list[tuple[Heads, Tensor]] = []

    class Stopped(Exception):
        pass

    class Watched(Reweighting):
        def at(self, pool: Any, before: Any, heads: Heads, preconditioner: Tensor) -> Any:
            seen.append((heads, preconditioner))
            raise Stopped

    watched = Watched(**vars(reweighting_of(truth)))
    with pytest.raises(Stopped):
        trained(truth, truth.pool, curated_weights(truth), watched, steps)
    return seen[0]


def test_the_weights_are_those_of_their_definition(truth: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of every pair by autograd, in place of tangents; the target's gradient half alone."""
    monkeypatch.setattr(dynamic, "MAX_SCORED", 50)
    heads, D = trained_so_far(truth, 7)
    pool, target, train = truth.pool, truth.target, truth.config.proxy.train
    reweighting = replace(reweighting_of(truth), decided=CHOSEN)
    inputs = reweighting.inputs
    kept = np.flatnonzero(curated_weights(truth) > 0)
    reweighted = reweighting.at(pool, Given(curated_weights(truth)), heads, D)
    weights = reweighted.read(0, len(pool))[kept]
    parts = [reweighted.read(start, start + 60) for start in range(0, len(pool), 60)]
    np.testing.assert_allclose(np.concatenate(parts)[kept], weights, rtol=1e-5)

    terms, pairs = torch.zeros(()), 0
    for rows in inputs.target_batches:
        terms = terms + train.objective.terms(*heads(*target.inputs(rows))).sum()
        pairs += len(rows)
    gradient = torch.autograd.grad(terms / pairs, list(heads.parameters()))
    v = torch.cat([part.flatten() for part in gradient]) / D.clamp_min(1e-3 * float(D.mean()))

    scored = columns(truth, "influence/influence", "pair")["pair"]
    sample = np.array([row for row in scored if row in set(kept)][:50])
    bank = inputs.trained().reference_bank(pool)
    gradients = PairGradients(
        space=Space(heads), bank=bank, objective=train.objective, batch_size=train.batch_size
    )
    influence = (gradients(pool.inputs(sample), pool.image[sample]) @ v.double()).numpy()
    strata = columns(truth, "influence/strata")
    axes = np.stack([strata[name][kept] for name in VALUE_AXES], 1)
    with torch.no_grad():
        embedded = [(*heads(*batch.inputs), batch.image) for batch in bank]
        u, t = heads(*pool.inputs(kept))
    in_sample = neg_clip_loss(u, t, pool.image[kept], embedded, 1 / train.temperature)
    axes[:, VALUE_AXES.index("in_sample")] = in_sample
    rows = np.array([list(kept).index(row) for row in sample])
    quantile = strata["quantile"][kept]
    stands_for = np.array(
        [np.sum(quantile == quantile[row]) / np.sum(quantile[rows] == quantile[row]) for row in rows]
    )
    predicted, _ = fit_additive(axes[rows], influence, KNOTS, stands_for).predict(axes)
    given = strata["pretrained"][kept]
    followed = predicted + 0.5 * predicted.std() * (given - given.mean()) / given.std()
    spread = np.sqrt(np.cov(influence, aweights=stands_for, bias=True))
    expected = capped_weights(followed / (spread * 0.5), CHOSEN.max_weight)
    np.testing.assert_allclose(weights, expected, rtol=1e-3)
    assert weights.std() > 0.01


@pytest.mark.parametrize(("weighting", "temperature"), [("uniform", 1.0), ("influence", 0.25)])
def test_the_temperature_is_the_chosen_one(truth: Run, weighting: Any, temperature: float) -> None:
    decided = SelectionConfig(weighting=weighting, temperature=0.25)
    assert replace(reweighting_of(truth), decided=decided).rule.temperature == temperature


def test_a_later_rounds_pool_is_part_of_what_is_trained_on(truth: Run, tmp_path: Path) -> None:
    """The scored pairs lie elsewhere among all pairs: the same weights, their rows named otherwise."""
    pool, weights, reweighting = truth.pool, curated_weights(truth), reweighting_of(truth)
    rows = np.sort(np.random.default_rng(0).permutation(len(pool))[: len(pool) - 40])
    np.save(tmp_path / "rows.npy", rows)
    part = PairSet(pool.folder, tmp_path / "rows.npy")
    later = replace(reweighting, inputs=replace(reweighting.inputs, pool=part))
    inside = rows[weights[rows] > 0]
    np.testing.assert_array_equal(part.rows[later.scored(pool, inside)], inside)
    np.testing.assert_array_equal(reweighting.scored(pool, inside), inside)


def test_more_than_a_block_is_weighed_where_it_is_read(truth: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are fitted to the first block alone, and are of mean 1 there; other blocks follow the same rule."""
    monkeypatch.setattr(dynamic, "BLOCK", 100)
    heads, D = trained_so_far(truth, 7)
    weights = curated_weights(truth)
    reweighted = reweighting_of(truth).at(truth.pool, Given(weights), heads, D)
    first, rest = reweighted.read(0, 100), reweighted.read(100, len(weights))
    assert first[weights[:100] > 0].mean() == pytest.approx(1)
    assert ((rest > 0) == (weights[100:] > 0)).all()
    assert rest[weights[100:] > 0].mean() == pytest.approx(1, abs=0.3)


def test_a_killed_one_continues_to_the_same(truth: Run, tmp_path: Path) -> None:
    whole = train_by(truth, tmp_path / "whole", 6)
    settings = {"train.seeds": [0], "train.methods": list(BOTH), "train.refresh": 6}
    cut, again = beside(truth, tmp_path / "cut", "train", settings=settings), Counting()
    with pytest.raises(Killed):
        carry(cut, "train", engine=Counting(limit=1))
    carry(cut, "train", engine=again)
    assert again.tasks == 3  # one finds its proxy, one trains, one reads digests
    assert_equal_results(whole.at("train"), cut.at("train"))


def test_evaluation_counts_the_pairs_it_begins_with(truth: Run, tmp_path: Path) -> None:
    settings = {"train.seeds": [0], "train.methods": list(BOTH), "train.refresh": 5}
    run = beside(truth, tmp_path, "train", "evaluate", settings=settings)
    details = carry(run, "train", "evaluate").details
    assert set(details["comparisons"]) == {"dynamic"}
    kept = {method: measures["kept_fraction"] for method, measures in details["methods"].items()}
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
